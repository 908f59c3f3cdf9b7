//! The commands for people and scripts. They read the pins and the last snapshot where there is one, or the folder,
//! so they answer while the agent is down.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "their very purpose")]

pub mod cleanup;
pub mod drops;
pub mod explain;
mod inventory;
pub(crate) mod live;
pub mod pools;
pub(crate) mod reason;
pub mod services;
pub mod status;
pub mod validate;

use anstyle::{AnsiColor, Style};
use comfy_table::{ContentArrangement, Table, presets};
use serde_json::Value;

/// Exit code: wrong usage, or the pins cannot be read.
pub const UNUSABLE: u8 = 2;

/// A line on standard error, in colours only on a terminal.
pub fn complain(line: &str) {
    anstream::eprintln!("{line}");
}

/// A line on standard output, in colours only on a terminal. False: the reader went away.
pub fn say(line: &str) -> bool {
    use std::io::Write as _;
    writeln!(anstream::stdout(), "{line}").is_ok()
}

/// Tells an error of a command that reads; its exit code.
pub(crate) fn told(result: anyhow::Result<u8>) -> u8 {
    result.unwrap_or_else(|error| {
        complain(&format!("purelb-agent: {error:#}"));
        UNUSABLE
    })
}

const GOOD: Style = AnsiColor::Green.on_default().bold();
const BAD: Style = AnsiColor::Red.on_default().bold();
const NOTE: Style = AnsiColor::Yellow.on_default();

fn painted(style: Style, text: &str) -> String {
    format!("{style}{text}{style:#}")
}

/// Columns under a header, without lines.
fn table(header: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header.iter().map(ToString::to_string).collect::<Vec<_>>());
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.trim_fmt()
}

/// A field as text.
fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or_default()
}

/// A field as a list.
fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value.get(key).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}
