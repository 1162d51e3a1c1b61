//! How busy a worker is, and whether others want the core that it runs on.
//!
//! The scheduler counts for how long each thread ran, and for how long it was ready to run and had to
//! wait for a core: the first two figures of `/proc/<pid>/schedstat` (Linux, `Documentation/scheduler/sched-stats.rst`). The
//! wait for a new CPU quota, where one is used up, counts too.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// Room for three numbers of 64 bits.
const LINE_MAX: usize = 64;

/// What the scheduler has counted of a thread since that began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CoreTime {
    /// For how long it ran.
    pub ran: Duration,
    /// For how long it was ready to run and had no core.
    pub waited: Duration,
}

/// The counts of one thread.
#[derive(Debug)]
pub struct CoreTimes(Option<File>);

impl CoreTimes {
    /// Those of the calling thread.
    pub fn of_this_thread() -> Self {
        let file = File::open("/proc/thread-self/schedstat");
        if let Err(error) = &file {
            tracing::debug!(%error, "how long this thread runs, and waits for a core, is not known");
        }
        Self(file.ok())
    }

    /// Such as stay at zero, for simulations.
    #[cfg(test)]
    pub fn none() -> Self {
        Self(None)
    }

    /// What they are now; zero if the kernel does not tell.
    pub fn total(&self) -> CoreTime {
        let mut line = [0; LINE_MAX];
        let read = self.0.as_ref().and_then(|file| file.read_at(&mut line, 0).ok());
        read.and_then(|read| parse(&line[..read])).unwrap_or_default()
    }
}

fn parse(line: &[u8]) -> Option<CoreTime> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let mut next = || words.next()?.parse().ok().map(Duration::from_nanos);
    Some(CoreTime { ran: next()?, waited: next()? })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Instant;

    use super::*;

    #[test]
    fn the_first_figure_is_what_it_ran_and_the_second_what_it_waited() {
        let expected =
            CoreTime { ran: Duration::from_nanos(111), waited: Duration::from_nanos(100_090) };
        assert_eq!(parse(b"111 100090 120\n"), Some(expected));
        for wrong in [&b""[..], b"1\n", b"1 x 2\n", b"\xff\xff"] {
            assert_eq!(parse(wrong), None);
        }
    }

    #[test]
    fn two_threads_on_one_core_wait_for_each_other() {
        let core = core_affinity::get_core_ids().and_then(|cores| cores.first().copied());
        if core.is_none() || CoreTimes::of_this_thread().0.is_none() {
            return eprintln!(
                "SKIPPED: how long threads wait for a core: the kernel does not tell"
            );
        }
        let enough = AtomicBool::new(false);
        let busy = || {
            core.map(core_affinity::set_for_current);
            let times = CoreTimes::of_this_thread();
            let deadline = Instant::now() + Duration::from_secs(10);
            while !enough.load(Ordering::Relaxed) && Instant::now() < deadline {
                if times.total().waited >= Duration::from_millis(20) {
                    enough.store(true, Ordering::Relaxed);
                }
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(busy);
            scope.spawn(busy);
        });
        assert!(enough.into_inner(), "two threads were busy on one core for 10 s");
    }
}
