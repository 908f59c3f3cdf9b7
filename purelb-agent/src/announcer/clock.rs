//! The clock of the election and of the fence: it runs while the machine sleeps, and nobody sets it.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{self, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::time::{ClockId, clock_gettime};
use tokio::io::unix::AsyncFd;

use crate::bpf::watch_descriptor;

/// Milliseconds since boot.
#[must_use]
pub fn now() -> u64 {
    // CLOCK_BOOTTIME is there since Linux 2.6.39.
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

/// Rings at a time of this clock. Tokio's timers stand still while the machine sleeps, so they ring late afterwards.
pub struct Alarm {
    timer: TimerFd,
    rings: AsyncFd<OwnedFd>,
}

impl Alarm {
    /// Must be made inside the runtime that will wait for it.
    pub fn new() -> io::Result<Self> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let timer = TimerFd::new(timerfd::ClockId::CLOCK_BOOTTIME, flags)?;
        let rings = watch_descriptor(timer.as_fd().try_clone_to_owned()?)?;
        Ok(Self { timer, rings })
    }

    /// Waits until then, or not at all where that is over.
    pub async fn at(&self, time: u64) -> io::Result<()> {
        // Zero would be never, and so is what the kernel cannot count.
        let time = Duration::from_millis(time.clamp(1, i64::MAX as u64 / 1_000_000));
        let Self { timer, rings } = self;
        timer.set(Expiration::OneShot(TimeSpec::from_duration(time)), TimerSetTimeFlags::TFD_TIMER_ABSTIME)?;
        loop {
            let mut ready = rings.readable().await?;
            // What rang before it was set anew rings no more.
            if timer.get()?.is_none() {
                ready.clear_ready();
                return Ok(());
            }
            ready.clear_ready();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_when_it_is_time_and_not_before() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let alarm = Alarm::new().unwrap();
            let begin = now();
            alarm.at(begin + 30).await.unwrap();
            assert!(now() >= begin + 30);
            alarm.at(5).await.unwrap();
            let never = tokio::time::timeout(Duration::from_millis(20), alarm.at(u64::MAX)).await;
            assert!(never.is_err(), "what was set is set anew");
            let begin = now();
            alarm.at(begin + 10).await.unwrap();
            assert!(now() >= begin + 10, "and dropped half-way it was");
        });
    }
}
