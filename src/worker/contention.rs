//! Whether others want the core that a worker runs on.
//!
//! The scheduler counts for how long each thread was ready to run and had to wait for a core: the
//! second figure of `/proc/<pid>/schedstat` (Linux, `Documentation/scheduler/sched-stats.rst`). The
//! wait for a new CPU quota, where one is used up, counts too.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// Room for three numbers of 64 bits.
const LINE_MAX: usize = 64;

/// The count of one thread.
#[derive(Debug)]
pub struct CoreWait(Option<File>);

impl CoreWait {
    /// That of the calling thread.
    pub fn of_this_thread() -> Self {
        let file = File::open("/proc/thread-self/schedstat");
        if let Err(error) = &file {
            tracing::debug!(%error, "how long this thread waits for a core is not known");
        }
        Self(file.ok())
    }

    /// One that stays at zero, for simulations.
    #[cfg(test)]
    pub fn none() -> Self {
        Self(None)
    }

    /// For how long the thread has waited since it began; zero if the kernel does not tell.
    pub fn total(&self) -> Duration {
        let mut line = [0; LINE_MAX];
        let read = self.0.as_ref().and_then(|file| file.read_at(&mut line, 0).ok());
        read.and_then(|read| waited(&line[..read])).unwrap_or_default()
    }
}

fn waited(line: &[u8]) -> Option<Duration> {
    let word = std::str::from_utf8(line).ok()?.split_ascii_whitespace().nth(1)?;
    word.parse().ok().map(Duration::from_nanos)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Instant;

    use super::*;

    #[test]
    fn the_second_figure_is_what_was_waited() {
        assert_eq!(waited(b"111789785 100090 120\n"), Some(Duration::from_nanos(100_090)));
        for wrong in [&b""[..], b"1\n", b"1 x 2\n", b"\xff\xff"] {
            assert_eq!(waited(wrong), None);
        }
    }

    #[test]
    fn two_threads_on_one_core_wait_for_each_other() {
        let core = core_affinity::get_core_ids().and_then(|cores| cores.first().copied());
        if core.is_none() || CoreWait::of_this_thread().0.is_none() {
            return eprintln!(
                "SKIPPED: how long threads wait for a core: the kernel does not tell"
            );
        }
        let enough = AtomicBool::new(false);
        let busy = || {
            core.map(core_affinity::set_for_current);
            let wait = CoreWait::of_this_thread();
            let deadline = Instant::now() + Duration::from_secs(10);
            while !enough.load(Ordering::Relaxed) && Instant::now() < deadline {
                if wait.total() >= Duration::from_millis(20) {
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
