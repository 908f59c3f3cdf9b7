//! `services`: every VIP and port with its endpoints, states and shares.

use serde_json::Value;

use crate::args::{Output, Query};

use super::{list, say, snapshot, text};

/// Prints them.
///
/// # Errors
/// No agent ever ran with that root.
pub fn run(query: &Query) -> anyhow::Result<u8> {
    let seen = snapshot(&query.instance.bpf_root)?;
    if query.output == Output::Json {
        say(&seen.get("services").cloned().unwrap_or_else(|| Value::Array(Vec::new())).to_string());
        return Ok(0);
    }
    for s in list(&seen, "services") {
        let port = s.get("port").and_then(Value::as_u64).unwrap_or(0);
        say(&format!(
            "{} {} {port}/{} -> {}",
            text(s, "service"),
            text(s, "vip"),
            text(s, "protocol"),
            text(s, "answer")
        ));
        for e in list(s, "endpoints") {
            let share = e.get("share").and_then(Value::as_f64).unwrap_or(0.0) * 100.0;
            let port = e.get("port").and_then(Value::as_u64).unwrap_or(0);
            say(&format!("    {:<40} {port:>5} {:<12} {share:5.1} %", text(e, "addr"), text(e, "state")));
        }
    }
    Ok(0)
}
