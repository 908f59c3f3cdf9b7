//! Rows with their limits: as a table for people, as JSON, and as an exit code.

use std::fmt::Write as _;

use serde_json::{Value, json};

/// How far above its limit a row may be before the benchmark fails: machines are noisy.
const NOISE: f64 = 1.25;

/// How a row stands to its limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// It has no limit.
    None,
    /// At or below it.
    Within,
    /// Above it, by no more than noise explains.
    Above,
    /// Further above.
    Failed,
}

/// One figure.
#[derive(Clone, Debug)]
pub struct Row {
    /// What was measured.
    pub name: String,
    /// The figure that the limit is about.
    pub value: f64,
    /// Of `value` and `limit`.
    pub unit: &'static str,
    /// What it must not exceed.
    pub limit: Option<f64>,
    /// More about it, for people.
    pub detail: String,
    /// More about it, for programs.
    pub more: Value,
}

impl Row {
    /// How it stands.
    #[must_use]
    pub fn mark(&self) -> Mark {
        match self.limit {
            None => Mark::None,
            Some(limit) if self.value <= limit => Mark::Within,
            Some(limit) if self.value <= limit * NOISE => Mark::Above,
            Some(_) => Mark::Failed,
        }
    }

    fn json(&self) -> Value {
        json!({
            "name": self.name,
            "value": self.value,
            "unit": self.unit,
            "limit": self.limit,
            "mark": self.mark().name(),
            "more": self.more,
        })
    }
}

impl Mark {
    const fn name(self) -> &'static str {
        match self {
            Self::None => "",
            Self::Within => "ok",
            Self::Above => "above limit",
            Self::Failed => "FAILED: above limit + 25 %",
        }
    }
}

/// Figures of one kind, measured by one method.
#[derive(Clone, Debug)]
pub struct Section {
    /// Its heading, and its key in JSON.
    pub name: &'static str,
    /// How it was measured.
    pub method: String,
    /// Its figures.
    pub rows: Vec<Row>,
}

/// True when no row is further above its limit than noise explains.
#[must_use]
pub fn good(sections: &[Section]) -> bool {
    sections.iter().flat_map(|section| &section.rows).all(|row| row.mark() != Mark::Failed)
}

/// For people.
#[must_use]
pub fn table(sections: &[Section]) -> String {
    let mut text = String::new();
    for section in sections {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{} ({})", section.name, section.method);
        let width = section.rows.iter().map(|row| row.name.chars().count()).max().unwrap_or(0);
        for row in &section.rows {
            let limit = row.limit.map_or_else(String::new, |limit| format!("<= {limit}"));
            let Row { name, value, unit, detail, .. } = row;
            let figure = if *value < 100.0 { format!("{value:.2}") } else { format!("{value:.0}") };
            let line =
                format!("  {name:<width$}  {figure:>7} {unit:<3} {limit:<8} {:<11}  {detail}", row.mark().name());
            let _ = writeln!(text, "{}", line.trim_end());
        }
        text.push('\n');
    }
    text.pop();
    text
}

/// For programs.
#[must_use]
pub fn json(sections: &[Section]) -> Value {
    let sections: serde_json::Map<String, Value> = sections
        .iter()
        .map(|section| {
            let rows: Vec<_> = section.rows.iter().map(Row::json).collect();
            (section.name.to_owned(), json!({"method": section.method, "rows": rows}))
        })
        .collect();
    json!({"machine": machine(), "sections": sections})
}

/// What the figures were measured on.
#[must_use]
pub fn machine() -> Value {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpus = read("/proc/cpuinfo");
    let models: Vec<_> = cpus.lines().filter_map(|line| line.strip_prefix("model name")?.split_once(": ")).collect();
    json!({
        "cpu": models.first().map(|(_, model)| *model),
        "cpus": models.len(),
        "load": read("/proc/loadavg").split(' ').next(),
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(value: f64, limit: Option<f64>) -> Row {
        Row { name: "x".into(), value, unit: "x", limit, detail: String::new(), more: Value::Null }
    }

    #[test]
    fn only_more_than_noise_fails() {
        let marks = [2.0, 2.4, 2.6].map(|value| row(value, Some(2.0)).mark());
        assert_eq!(marks, [Mark::Within, Mark::Above, Mark::Failed]);
        let section = |value| Section { name: "s", method: String::new(), rows: vec![row(value, Some(2.0))] };
        assert!(good(&[section(2.4)]));
        assert!(!good(&[section(2.4), section(2.6)]));
        assert_eq!(row(9.0, None).mark(), Mark::None);
    }
}
