//! How steps look.

use std::collections::BTreeMap;

use anyhow::Result;
use purelb_tests::sys;

pub struct Screen {
    pub colour: bool,
    pub step: u32,
    pub failed: Vec<String>,
}

impl Screen {
    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    pub fn step(&mut self, title: &str, work: impl FnOnce(&Self) -> Result<()>) {
        self.step += 1;
        println!("\n{}", self.paint("1;36", &format!("== {}. {title}", self.step)));
        match work(self) {
            Ok(()) => println!("{}", self.paint("32", "   held")),
            Err(error) => {
                println!("{}", self.paint("1;31", &format!("   FAILED: {error:#}")));
                self.failed.push(format!("{}. {title}", self.step));
            }
        }
        sys::pause(if self.colour { 1_500 } else { 0 });
    }

    pub fn say(&self, text: &str) {
        println!("   {text}");
    }

    pub fn command(&self, text: &str) {
        println!("   {}", self.paint("33", &format!("$ {text}")));
    }

    pub fn shown(&self, text: &str, limit: usize) {
        for line in text.lines().take(limit) {
            println!("   | {line}");
        }
        let more = text.lines().count().saturating_sub(limit);
        if more > 0 {
            println!("   | … {more} more lines");
        }
    }

    pub fn bars(&self, found: &BTreeMap<String, usize>) {
        for (pod, count) in found {
            println!("   {pod:<12} {} {count}", self.paint("34", &"#".repeat(*count)));
        }
    }
}
