//! `pools`: every range of every ServiceGroup, and what is in use of it.

use purelb_plan::alloc::status::{FAMILIES, status};
use purelb_plan::observed::Family;
use serde_json::{Value, json};

use super::{BAD, complain, inventory, list, painted, say, table, text, told};
use crate::args::{Manifests, Output};
use crate::source::estate::Register;

/// Prints them. Exit code 0, or 2 when the source cannot be read.
pub async fn run(args: &Manifests) -> u8 {
    told(show(args).await)
}

async fn show(args: &Manifests) -> anyhow::Result<u8> {
    let answer = answer(&inventory::read(args).await?.register);
    if args.output == Output::Json {
        say(&answer.to_string());
        return Ok(0);
    }
    let number = |row: &Value, key: &str| row.get(key).map_or_else(String::new, Value::to_string);
    let row = |row: &Value| {
        let (size, used) = (row.get("size").and_then(Value::as_f64), row.get("used").and_then(Value::as_f64));
        let share = size.zip(used).filter(|(size, _)| *size > 0.0).map_or(0.0, |(size, used)| used / size * 100.0);
        let mut cells: Vec<_> =
            ["group", "announce", "range", "subnet", "family"].map(|key| text(row, key).to_owned()).to_vec();
        cells.extend(["size", "used", "available"].map(|key| number(row, key)));
        cells.push(format!("{share:.1}"));
        cells
    };
    let header = ["SERVICEGROUP", "TYPE", "RANGE", "SUBNET", "FAMILY", "SIZE", "USED", "AVAIL", "UTIL%"];
    say(&table(&header, list(&answer, "ranges").iter().map(row).collect()));
    for problem in list(&answer, "problems") {
        let line = format!(
            "{} {}: {}; {}",
            text(problem, "object"),
            text(problem, "field"),
            text(problem, "message"),
            text(problem, "remedy")
        );
        complain(&painted(BAD, &line));
    }
    Ok(0)
}

fn answer(register: &Register) -> Value {
    let ledger = register.ledger();
    let (mut ranges, mut groups) = (Vec::new(), Vec::new());
    for group in register.estate.catalog.groups() {
        for pool in &group.pools {
            let used = ledger.used(pool).count();
            let busy = ledger.used(pool).filter(|ip| !group.excluded.contains(**ip)).count();
            let size = group.size_of(pool);
            ranges.push(json!({
                "group": group.name, "announce": group.announce.name(), "range": pool.text,
                "subnet": pool.subnet.to_string(), "family": family(pool.range.family()), "size": size, "used": used,
                "available": size.saturating_sub(i64::try_from(busy).unwrap_or(i64::MAX)),
            }));
        }
        let said = status(group, &ledger);
        let of = |values: [i64; 2]| FAMILIES.into_iter().zip(values).map(|(of, n)| (family(of).to_owned(), n.into()));
        groups.push(json!({
            "group": group.name, "namespace": group.namespace, "announce": said.announce,
            "allocated": Value::Object(of(said.allocated).collect()),
            "available": Value::Object(of(said.available).collect()), "namespaces": said.namespaces,
        }));
    }
    json!({"ranges": ranges, "groups": groups, "problems": register.problems()})
}

const fn family(of: Family) -> &'static str {
    match of {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::source::Look;
    use crate::source::estate::FolderEstate;

    #[test]
    fn ranges_and_sums() {
        let temp = tempfile::tempdir().unwrap();
        let text = "apiVersion: purelb.io/v2\nkind: ServiceGroup\nmetadata: {name: default, namespace: purelb}\nspec:\n  \
                    exclude: [10.0.0.1, 10.0.0.1/32]\n  remote:\n    v4pools: [{pool: 10.0.0.0/30, subnet: 10.0.0.0/24}]\n    \
                    v6pool: {pool: '2001:db8::/64', subnet: '2001:db8::/64'}\n---\napiVersion: v1\nkind: Service\n\
                    metadata: {name: a}\nspec: {type: LoadBalancer}\nstatus: {loadBalancer: {ingress: [{ip: 10.0.0.2}, {ip: '2001:db8::7'}]}}\n";
        fs::write(temp.path().join("all.yaml"), text).unwrap();
        let mut estate = FolderEstate::new(temp.path(), &temp.path().join("state"));
        assert!(estate.look(&Look::All));
        let answer = answer(&estate.register);
        let number = |path: &str| answer.pointer(path).and_then(Value::as_i64);
        let first = ["size", "used", "available"].map(|key| number(&format!("/ranges/0/{key}")));
        assert_eq!(first, [Some(3), Some(1), Some(2)]);
        assert_eq!(number("/ranges/1/available"), Some(i64::MAX - 1));
        assert_eq!(number("/groups/0/allocated/IPv4"), Some(1));
        assert_eq!(answer.pointer("/problems"), Some(&json!([])));
    }
}
