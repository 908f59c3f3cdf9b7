//! The commands for people and scripts. They read the pins and the last snapshot, so they answer
//! while the agent is down.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "their very purpose")]

pub mod cleanup;
pub mod drops;
pub mod explain;
pub mod services;
pub mod status;

use std::path::Path;

use serde_json::Value;

/// A line on standard error.
pub fn complain(line: &str) {
    eprintln!("{line}");
}

/// A line on standard output; a reader that went away is no fault of ours.
pub fn say(line: &str) {
    use std::io::Write as _;
    drop(writeln!(std::io::stdout(), "{line}"));
}

/// The last snapshot, or why there is none.
///
/// # Errors
/// No agent ever ran with that root.
pub fn snapshot(root: &Path) -> anyhow::Result<Value> {
    crate::snapshot::read(root).ok_or_else(|| {
        anyhow::anyhow!("no agent has run with --bpf-root {}; start `purelb-agent node`", root.display())
    })
}

/// A field as text.
#[must_use]
pub fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or_default()
}

/// A field as a list.
#[must_use]
pub fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value.get(key).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}
