//! `datapath.mode: off`: the tables hand all to kube-proxy, and the programs stay until what runs through them has
//! ended, or long enough. What begins meanwhile is told apart, so to switch on again breaks nothing either.

use std::time::{Duration, Instant};

/// A flow that said nothing for so long is taken for ended, ...
pub const QUIET: Duration = Duration::from_secs(3);
/// ... and one that still runs after this breaks.
const DEADLINE: Duration = Duration::from_secs(10);
/// How often it is looked whether something still runs.
pub const PACE: Duration = Duration::from_millis(500);

/// Where it stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Drain {
    /// The mode is another one.
    #[default]
    No,
    /// Since then.
    Since(Instant),
    /// Nothing needs to hang.
    Over,
}

impl Drain {
    /// The next step. `off`: the mode is; `hangs`: programs do; `in_use`: something ran through them of late.
    #[must_use]
    pub fn next(self, off: bool, hangs: bool, now: Instant, in_use: impl FnOnce() -> bool) -> Self {
        match self {
            _ if !off => Self::No,
            Self::No if hangs => Self::Since(now),
            Self::No | Self::Over => Self::Over,
            Self::Since(begin) => {
                let elapsed = now.duration_since(begin);
                if elapsed < QUIET || elapsed < DEADLINE && in_use() { self } else { Self::Over }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drain_ends() {
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let since = Drain::default().next(true, true, begin, || true);
        assert_eq!(since, Drain::Since(begin));
        assert_eq!(since.next(true, true, at(2), || false), since, "silence must last a while");
        assert_eq!(since.next(true, true, at(4), || true), since);
        assert_eq!(since.next(true, true, at(4), || false), Drain::Over);
        assert_eq!(since.next(true, true, at(10), || true), Drain::Over, "but not for ever");
        assert_eq!(since.next(false, true, at(4), || true), Drain::No);
        assert_eq!(Drain::Over.next(true, false, at(60), || true), Drain::Over);
        assert_eq!(Drain::No.next(true, false, begin, || true), Drain::Over, "nothing hangs, nothing to wait for");
    }
}
