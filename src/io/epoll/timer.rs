//! The limit to a wait.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

/// Ends a wait. It stands over many of them: a limit given to each would set and clear one of the
/// kernel's timers every time.
pub(super) struct Timer {
    pub(super) fd: OwnedFd,
    /// When it fires, if it is set.
    fires_at: Option<Instant>,
}

impl Timer {
    pub(super) fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let fd = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        Ok(Self { fd, fires_at: None })
    }

    /// Makes sure that it fires at `at` at the latest.
    pub(super) fn fire_by(&mut self, at: Instant) -> io::Result<()> {
        if self.fires_at.is_some_and(|set| set <= at) {
            return Ok(());
        }
        let delay = at.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
        let value = Timespec::try_from(delay).map_err(io::Error::other)?;
        let once = Itimerspec { it_interval: Timespec::default(), it_value: value };
        timerfd_settime(&self.fd, TimerfdTimerFlags::empty(), &once)?;
        self.fires_at = Some(at);
        Ok(())
    }

    /// It has fired.
    pub(super) fn on_fired(&mut self) {
        self.fires_at = None;
    }
}
