//! One line per check and a count at the end.

use std::time::Instant;

use anyhow::{Result, bail};

use crate::sh::{print, say};

/// Results of a command that goes on after a failure.
#[derive(Default)]
pub struct Report {
    passed: u32,
    failed: u32,
}

impl Report {
    /// Runs one check, says how it went and how long it took.
    pub fn check(&mut self, name: &str, check: impl FnOnce() -> Result<()>) {
        let start = Instant::now();
        let result = check();
        let seconds = start.elapsed().as_secs_f32();
        match result {
            Ok(()) => {
                self.passed += 1;
                print(format!("ok   {name} ({seconds:.1} s)"));
            }
            Err(error) => {
                self.failed += 1;
                say(format!("{name}: {error:#}"));
                print(format!("FAIL {name} ({seconds:.1} s)"));
            }
        }
    }

    /// Prints the count; an error when something failed.
    pub fn finish(self) -> Result<()> {
        print(format!("{} passed, {} failed", self.passed, self.failed));
        if self.failed > 0 {
            bail!("{} of {} failed", self.failed, self.passed + self.failed);
        }
        Ok(())
    }
}
