//! `status`: uplinks with their hooks and why, problems with file and line.

use serde_json::{Value, json};

use crate::args::{Output, Query};
use crate::bpf::Maps;

use super::{list, say, snapshot, text};

/// Exit code 0, or 1 when the instance is not ready.
///
/// # Errors
/// No agent ever ran with that root.
pub fn run(query: &Query) -> anyhow::Result<u8> {
    let root = &query.instance.bpf_root;
    let mut seen = snapshot(root)?;
    let pid = seen.get("pid").and_then(Value::as_u64).unwrap_or(0);
    let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let alive = String::from_utf8_lossy(&command).contains("purelb-agent");
    let pinned = Maps::open(root).is_ok();
    let ready = pinned && seen.get("ready").and_then(Value::as_bool).unwrap_or(false);
    let services = list(&seen, "services").len();
    if let Some(fields) = seen.as_object_mut() {
        fields.remove("pid");
        fields.insert("services".to_owned(), json!(services));
        fields.insert("agent".to_owned(), json!({"alive": alive, "pid": pid}));
        fields.insert("ready".to_owned(), json!(ready));
    }
    if query.output == Output::Json {
        say(&seen.to_string());
        return Ok(0);
    }
    let word = if alive { "runs" } else { "is down; the data path goes on by its pins" };
    say(&format!(
        "node {}: agent {word}, {}, {services} services",
        text(&seen, "node"),
        if ready { "ready" } else { "not ready" }
    ));
    for uplink in list(&seen, "uplinks") {
        say(&format!("  uplink {:12} {:12} {}", text(uplink, "name"), text(uplink, "hook"), text(uplink, "why")));
    }
    for p in list(&seen, "problems") {
        let (origin, field) = (text(p, "origin"), text(p, "field"));
        let at = if origin.is_empty() { String::new() } else { format!(" ({origin})") };
        let field = if field.is_empty() { String::new() } else { format!(", {field}") };
        say(&format!("  problem: {}{field}{at}: {}; {}", text(p, "object"), text(p, "message"), text(p, "remedy")));
    }
    Ok(u8::from(!ready))
}
