//! `status`: agent, tables, uplinks with their hooks and why, problems with file and line.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Value, json};

use super::live::{seconds, silence};
use super::{BAD, GOOD, list, painted, say, table, text};
use crate::args::{Output, Query};
use crate::bpf::{BpfError, Maps};
use crate::{lock, snapshot};

/// Exit code 0, or 1 when the instance is not ready.
#[must_use]
pub fn run(query: &Query) -> u8 {
    let answer = answer(&query.instance.bpf_root);
    if query.output == Output::Json {
        say(&answer.to_string());
    } else {
        show(&answer);
    }
    u8::from(answer.get("ready") != Some(&Value::Bool(true)))
}

fn answer(root: &Path) -> Value {
    let seen = snapshot::read(root);
    let holder = lock::holder(root);
    let tables = tables(root);
    let links = links(root);
    let fine = tables.as_ref().is_ok_and(|t| t.get("stale") == Some(&Value::Bool(false)));
    // Without a snapshot, what is pinned speaks for itself.
    let programmed = seen.as_ref().map_or(!links.is_empty(), |s| s.get("ready") == Some(&Value::Bool(true)));
    let empty = Value::Null;
    let seen = seen.as_ref().unwrap_or(&empty);
    let field = |key: &str| seen.get(key).cloned();
    let fronts = list(seen, "services");
    let uplinks = uplinks(list(seen, "uplinks"), &links);
    let attached = |u: &Value| u.get("attached") == Some(&Value::Bool(true)) || text(u, "hook") == "off";
    // Tables that no packet meets serve nobody.
    let met = uplinks.is_empty() || uplinks.iter().any(attached);
    let services: BTreeSet<&str> = fronts.iter().map(|front| text(front, "service")).collect();
    json!({
        "node": field("node").unwrap_or_else(|| json!("")),
        "ready": fine && programmed && met,
        "agent": {"alive": holder.is_some(), "pid": holder.and_then(|h| h.pid)},
        "tables": tables.unwrap_or_else(|e| json!({"error": e.to_string()})),
        "services": services.len(),
        "frontends": fronts.len(),
        "snapshot": !seen.is_null(),
        "uplinks": uplinks,
        "vip_device": field("vip_device"),
        "election": field("election"),
        "problems": field("problems").unwrap_or_else(|| json!([])),
    })
}

/// Heartbeat of the pinned tables.
fn tables(root: &Path) -> Result<Value, BpfError> {
    let maps = Maps::open(root)?;
    let (config, clock) = (maps.config()?, maps.clock()?);
    let (silent, stale) = silence(&config, clock.tick);
    let limit = seconds(config.heartbeat_limit, clock.hz);
    Ok(json!({"heartbeat_age": seconds(silent, clock.hz), "heartbeat_limit": limit, "stale": stale}))
}

/// Interface -> hooks, by the names of the pinned links: `eth0-xdp`, dots as colons.
pub(super) fn links(root: &Path) -> BTreeMap<String, BTreeSet<String>> {
    let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for entry in std::fs::read_dir(root.join("links")).into_iter().flatten().flatten() {
        if let Some((name, hook)) = entry.file_name().to_string_lossy().rsplit_once('-') {
            found.entry(name.replace(':', ".")).or_default().insert(hook.to_owned());
        }
    }
    found
}

/// What packets that arrive there meet.
pub(super) fn ingress_hook(hooks: &BTreeSet<String>) -> Option<&'static str> {
    let names = [("xdp", "xdp"), ("generic", "xdp-generic"), ("ingress", "tcx")];
    names.into_iter().find(|(pin, _)| hooks.contains(*pin)).map(|(_, name)| name)
}

/// As the agent saw them, if their links are still pinned; else as the pins have them.
fn uplinks(seen: &[Value], links: &BTreeMap<String, BTreeSet<String>>) -> Vec<Value> {
    if !seen.is_empty() {
        return seen
            .iter()
            .map(|uplink| {
                let mut uplink = uplink.clone();
                let pinned = links.get(text(&uplink, "name")).is_some_and(|h| ingress_hook(h).is_some());
                if !pinned && let Some(fields) = uplink.as_object_mut() {
                    fields.insert("attached".to_owned(), json!(false));
                }
                uplink
            })
            .collect();
    }
    let pinned = links.iter().filter_map(|(name, hooks)| Some((name, ingress_hook(hooks)?, hooks)));
    pinned
        .map(|(name, hook, hooks)| {
            let whole = hooks.contains("egress");
            json!({"name": name, "hook": hook, "why": "as pinned; no snapshot says why", "attached": whole})
        })
        .collect()
}

fn show(answer: &Value) {
    let flag = |at: &str| answer.pointer(at) == Some(&Value::Bool(true));
    let number = |at: &str| answer.pointer(at).and_then(Value::as_f64).unwrap_or(0.0);
    let ready = if flag("/ready") { painted(GOOD, "ready") } else { painted(BAD, "not ready") };
    let node = match text(answer, "node") {
        "" => "this node".to_owned(),
        name => format!("node {name}"),
    };
    let services = if flag("/snapshot") {
        let services = number("/services");
        let word = if services == 1.0 { "Service" } else { "Services" };
        format!("{services} {word} on {} addresses and ports", number("/frontends"))
    } else {
        "no snapshot of an agent (names and reasons are unknown)".to_owned()
    };
    say(&format!("{node}: {ready}, {services}"));
    let pid = answer.pointer("/agent/pid").and_then(Value::as_u64).map_or(String::new(), |pid| format!(" (pid {pid})"));
    let (alive, age, limit) =
        (flag("/agent/alive"), number("/tables/heartbeat_age"), number("/tables/heartbeat_limit"));
    match (alive, answer.pointer("/tables/error").and_then(Value::as_str)) {
        (true, Some(error)) => say(&format!("agent: runs{pid}, but: {error}")),
        (false, Some(error)) => say(&format!("agent: {}, and: {error}", painted(BAD, "does not run"))),
        (true, None) => say(&format!("agent: runs{pid}, last heard of {age:.0} s ago")),
        (false, None) => {
            let down = painted(BAD, "is down");
            say(&format!("agent: {down} since {age:.0} s; the data path goes on by its pins"))
        }
    };
    if flag("/tables/stale") {
        let stale = painted(BAD, "stale");
        say(&format!("tables: {stale}, the agent was silent for more than {limit:.0} s: new flows go to kube-proxy"));
    }
    let row = |u: &Value| {
        let attached = if u.get("attached") == Some(&Value::Bool(true)) { "yes" } else { "no" };
        [text(u, "name"), text(u, "hook"), attached, text(u, "why")].map(str::to_owned).to_vec()
    };
    match list(answer, "uplinks") {
        [] => say("uplinks: none"),
        uplinks => say(&table(&["UPLINK", "HOOK", "ATTACHED", "WHY"], uplinks.iter().map(row).collect())),
    };
    if let Some(device) = answer.get("vip_device").filter(|device| !device.is_null()) {
        let addresses: Vec<_> = list(device, "addresses").iter().filter_map(Value::as_str).collect();
        let addresses = if addresses.is_empty() { "nothing".to_owned() } else { addresses.join(", ") };
        say(&format!("remote addresses on {} ({}): {addresses}", text(device, "name"), text(device, "kind")));
    }
    if let Some(election) = answer.get("election").filter(|election| !list(election, "subnets").is_empty()) {
        let subnets: Vec<_> = list(election, "subnets").iter().filter_map(Value::as_str).collect();
        let count = |key: &str| election.get(key).and_then(Value::as_u64).unwrap_or_default();
        let others = match count("purelbs") {
            0 => String::new(),
            some => format!(", {some} of them with PureLB's agent: one owner is likely there, not proven"),
        };
        let (phase, members) = (text(election, "phase"), count("members"));
        say(&format!("election: {phase}, {members} nodes{others}; stands in {}", subnets.join(", ")));
        let addresses = election.get("addresses").and_then(Value::as_object).into_iter().flatten();
        let addresses: Vec<_> =
            addresses.map(|(ip, on)| format!("{ip} on {}", on.as_str().unwrap_or_default())).collect();
        let addresses = if addresses.is_empty() { "none".to_owned() } else { addresses.join(", ") };
        say(&format!("local addresses of this node: {addresses}"));
    }
    for p in list(answer, "problems") {
        let (origin, field) = (text(p, "origin"), text(p, "field"));
        let at = if origin.is_empty() { String::new() } else { format!(" ({origin})") };
        let field = if field.is_empty() { String::new() } else { format!(", {field}") };
        let word = painted(BAD, "problem:");
        say(&format!("{word} {}{field}{at}: {}; {}", text(p, "object"), text(p, "message"), text(p, "remedy")));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hooks_from_the_pins() {
        let temp = tempfile::tempdir().unwrap();
        std::fs::create_dir(temp.path().join("links")).unwrap();
        for name in ["eth0-xdp", "eth0-egress", "bond0:12-ingress", "bond0:12-egress", "wg-a-egress"] {
            std::fs::write(temp.path().join("links").join(name), "").unwrap();
        }
        let links = links(temp.path());
        let lines: Vec<String> =
            uplinks(&[], &links).iter().map(|u| format!("{} {}", text(u, "name"), text(u, "hook"))).collect();
        assert_eq!(lines, ["bond0.12 tcx", "eth0 xdp"], "wg-a has the egress program alone");
        let seen = [json!({"name": "eth0", "attached": true}), json!({"name": "eth1", "attached": true})];
        let attached: Vec<_> = uplinks(&seen, &links).iter().map(|u| u.get("attached") == Some(&json!(true))).collect();
        assert_eq!(attached, [true, false], "nothing is pinned for eth1");
    }

    #[test]
    fn without_anything_it_is_not_ready() {
        let temp = tempfile::tempdir().unwrap();
        let answer = answer(temp.path());
        assert_eq!(answer.pointer("/ready"), Some(&json!(false)));
        assert_eq!(answer.pointer("/agent/alive"), Some(&json!(false)));
        assert!(answer.pointer("/tables/error").is_some(), "{answer}");
    }
}
