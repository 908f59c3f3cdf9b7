//! When something that is done again and again is due.

use std::time::{Duration, Instant};

/// It rests so many times as long as it took: changes wait for it, ...
const REST: u32 = 200;
/// ... and this many times as long as usual at most: it may have been held up.
const MOST: u32 = 12;

/// Of one thing.
#[derive(Debug)]
pub struct Pace {
    /// Then.
    pub next: Instant,
}

impl Pace {
    /// After so long for the first time.
    pub fn new(first: Duration) -> Self {
        Self { next: Instant::now() + first }
    }

    /// It was done from `begin` until now.
    pub fn ended(&mut self, begin: Instant, usual: Duration) {
        let now = Instant::now();
        self.next = now + (now.duration_since(begin) * REST).clamp(usual, usual * MOST);
    }
}
