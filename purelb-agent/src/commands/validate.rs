//! `validate`: what is wrong or doubtful about ServiceGroups and LBNodeAgents, before it hurts.

use std::collections::{BTreeMap, BTreeSet};

use purelb_plan::problem::Problem;
use serde_json::json;

use super::inventory::{self, Inventory};
use super::{say, table, told};
use crate::args::{Output, Validate};
use crate::source::parse::{Found, Kind, Object};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict {
    Pass,
    Warn,
    Fail,
}

impl Verdict {
    const fn name(self) -> &'static str {
        match self {
            Self::Pass => "PASS",
            Self::Warn => "WARN",
            Self::Fail => "FAIL",
        }
    }
}

/// A line of the answer.
type Finding = (Verdict, String, String);

/// Prints them. Exit code 1 with a FAIL, with `--strict` also with a WARN; 2 when the source cannot be read.
pub async fn run(args: &Validate) -> u8 {
    told(show(args).await)
}

async fn show(args: &Validate) -> anyhow::Result<u8> {
    let findings = findings(&inventory::read(&args.manifests).await?);
    let worst = findings.iter().map(|finding| finding.0).max().unwrap_or(Verdict::Pass);
    if args.manifests.output == Output::Json {
        let row = |(verdict, object, message): &Finding| json!({"result": verdict.name(), "object": object, "message": message});
        say(&json!({"findings": findings.iter().map(row).collect::<Vec<_>>(), "result": worst.name()}).to_string());
    } else {
        let row = |(verdict, object, message): &Finding| vec![verdict.name().into(), object.clone(), message.clone()];
        say(&table(&["RESULT", "OBJECT", "MESSAGE"], findings.iter().map(row).collect()));
    }
    Ok(u8::from(worst == Verdict::Fail || args.strict && worst == Verdict::Warn))
}

fn findings(inventory: &Inventory) -> Vec<Finding> {
    let fault = |p: Problem| {
        let field = if p.field.is_empty() { String::new() } else { format!("{}: ", p.field) };
        (Verdict::Fail, p.object, format!("{field}{}; {}", p.message, p.remedy))
    };
    let mut out: Vec<Finding> =
        inventory.problems.iter().cloned().chain(inventory.register.problems()).map(fault).collect();
    groups(inventory, &mut out);
    agents(inventory, &mut out);
    let faulty: BTreeSet<String> = out.iter().map(|finding| finding.1.clone()).collect();
    for (namespace, name) in inventory.register.groups.keys() {
        let object = format!("ServiceGroup {namespace}/{name}");
        if !faulty.contains(&object) {
            out.push((Verdict::Pass, object, "can be allocated from".to_owned()));
        }
    }
    out.sort_by(|a, b| (b.0, &a.1, &a.2).cmp(&(a.0, &b.1, &b.2)));
    out
}

fn groups(inventory: &Inventory, out: &mut Vec<Finding>) {
    let mut namespaces: BTreeMap<&String, Vec<&purelb_plan::alloc::group::Group>> = BTreeMap::new();
    for group in inventory.register.estate.catalog.groups() {
        if group.multi_pool && group.balance_pools {
            let object = format!("ServiceGroup {}/{}", group.namespace, group.name);
            out.push((Verdict::Fail, object, "multiPool and balancePools exclude each other; keep one".to_owned()));
        }
        for namespace in &group.namespaces {
            namespaces.entry(namespace).or_default().push(group);
        }
    }
    for (namespace, groups) in namespaces.into_iter().filter(|(_, groups)| groups.len() > 1) {
        if groups.iter().filter(|group| group.default).count() != 1 {
            let names: Vec<_> = groups.iter().map(|group| group.name.as_str()).collect();
            let end = if groups.iter().any(|group| group.enforce) { "are refused" } else { "get the group default" };
            let message = format!(
                "{} serve it and not exactly one is its default: Services that name none {end}",
                names.join(", ")
            );
            out.push((Verdict::Fail, format!("namespace {namespace}"), message));
        }
    }
    if inventory.register.groups.is_empty() {
        out.push((Verdict::Warn, "ServiceGroup".to_owned(), "there is none: nothing can be allocated".to_owned()));
    }
}

fn agents(inventory: &Inventory, out: &mut Vec<Finding>) {
    let nodes: Vec<_> = inventory
        .objects
        .all(Kind::Node)
        .filter_map(|(key, found)| match &found.object {
            Object::Node(node) => Some((&key.1, &node.metadata.labels)),
            _ => None,
        })
        .collect();
    let mut selected: BTreeMap<&String, Vec<&String>> = BTreeMap::new();
    let (mut any, mut all) = (false, false);
    for (key, found) in inventory.objects.all(Kind::NodeAgent) {
        let Found { object: Object::NodeAgent(agent), .. } = &**found else { continue };
        any = true;
        let object = format!("LBNodeAgent {}", key.1);
        let interface = agent.spec.local.as_ref().and_then(|l| l.get("localInterface")).and_then(|v| v.as_str());
        if let Some(pattern) = interface.filter(|text| !matches!(*text, "" | "default")) {
            if let Err(error) = regex::Regex::new(pattern) {
                out.push((
                    Verdict::Fail,
                    object.clone(),
                    format!("spec.local.localInterface: {pattern} is no regular expression: {error}"),
                ));
            } else if !(pattern.starts_with('^') && pattern.ends_with('$')) {
                let message = format!(
                    "spec.local.localInterface: {pattern} matches any part of a name; write ^{pattern}$ to match whole ones"
                );
                out.push((Verdict::Warn, object.clone(), message));
            }
        }
        let Some(selector) = agent.spec.node_selector.as_ref().filter(|selector| !selector.is_empty()) else {
            all = true;
            continue;
        };
        let matching: Vec<_> = nodes.iter().filter(|(_, labels)| selector.matches(labels)).collect();
        if matching.is_empty() {
            out.push((Verdict::Warn, object, "spec.nodeSelector selects no node that is listed".to_owned()));
        }
        for (node, _) in matching {
            selected.entry(node).or_default().push(&key.1);
        }
    }
    if !any {
        out.push((Verdict::Warn, "LBNodeAgent".to_owned(), "there is none: every node uses the defaults".to_owned()));
    }
    for (node, _) in &nodes {
        match selected.get(node).map(Vec::as_slice) {
            Some([first, _, ..]) => {
                let message = format!("several LBNodeAgents select it; {first} counts");
                out.push((Verdict::Warn, format!("Node {node}"), message));
            }
            None if any && !all => {
                out.push((Verdict::Warn, format!("Node {node}"), "no LBNodeAgent selects it".to_owned()));
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::commands::inventory::of_folder;
    use crate::source::Look;
    use crate::source::estate::FolderEstate;

    fn found(text: &str) -> Vec<String> {
        let temp = tempfile::tempdir().unwrap();
        fs::write(temp.path().join("all.yaml"), text).unwrap();
        let mut estate = FolderEstate::new(temp.path(), &temp.path().join("state"));
        estate.look(&Look::All);
        findings(&of_folder(estate))
            .into_iter()
            .map(|(verdict, object, message)| format!("{} {object} {message}", verdict.name()))
            .collect()
    }

    fn group(name: &str, pool: &str, more: &str) -> String {
        format!(
            "---\napiVersion: purelb.io/v2\nkind: ServiceGroup\nmetadata: {{name: {name}, namespace: purelb}}\n\
             spec: {{local: {{v4pools: [{{pool: {pool}, subnet: 10.0.0.0/16}}]}}{more}}}\n"
        )
    }

    fn agent(spec: &str) -> String {
        format!(
            "---\napiVersion: purelb.io/v2\nkind: LBNodeAgent\nmetadata: {{name: a, namespace: purelb}}\nspec: {{{spec}}}\n"
        )
    }

    #[test]
    fn each_check() {
        let node = "---\napiVersion: v1\nkind: Node\nmetadata: {name: n1, labels: {rack: r1}}\n";
        let good = group("a", "10.0.0.0/24", "") + &agent("local: {}") + node;
        assert_eq!(found(&good), ["PASS ServiceGroup purelb/a can be allocated from"]);
        let rows = [
            (group("b", "10.0.0.5/32", ""), "FAIL ServiceGroup purelb/b spec: 10.0.0.5/32 overlaps 10.0.0.0/24"),
            (group("b", "10.9.0.0/8", ""), "FAIL ServiceGroup purelb/b spec.local.v4pools[0].pool"),
            (group("b", "10.0.2.0/24", ", remote: {}"), "FAIL ServiceGroup purelb/b spec: must have exactly one"),
            (
                group("b", "10.0.2.0/24", ", namespaces: [x]") + &group("c", "10.0.3.0/24", ", namespaces: [x]"),
                "FAIL namespace x b, c serve it",
            ),
            (
                agent("nodeSelector: {matchLabels: {rack: r9}}").replace("name: a", "name: z"),
                "WARN LBNodeAgent purelb/z spec.nodeSelector selects no node",
            ),
            (
                agent("local: {localInterface: 'eth['}").replace("name: a", "name: z"),
                "FAIL LBNodeAgent purelb/z spec.local.localInterface",
            ),
            (
                agent("local: {localInterface: eth}").replace("name: a", "name: z"),
                "WARN LBNodeAgent purelb/z spec.local.localInterface",
            ),
            ("---\nkind: [\n".to_owned(), "FAIL file "),
        ];
        for (more, want) in rows {
            let found = found(&(good.clone() + &more));
            assert!(found.iter().any(|line| line.starts_with(want)), "{want}: {found:#?}");
        }
        let multi = good.replace("v4pools: [", "multiPool: true, balancePools: true, v4pools: [");
        assert!(
            found(&multi)[0].starts_with("FAIL ServiceGroup purelb/a multiPool and balancePools"),
            "{:?}",
            found(&multi)
        );
        let alone = found(&group("a", "10.0.0.0/24", ""));
        assert!(alone.iter().any(|line| line.starts_with("WARN LBNodeAgent there is none")), "{alone:?}");
        let narrow = found(&(group("a", "10.0.0.0/24", "") + &agent("nodeSelector: {matchLabels: {rack: r9}}") + node));
        assert!(narrow.iter().any(|line| line.starts_with("WARN Node n1 no LBNodeAgent")), "{narrow:?}");
    }
}
