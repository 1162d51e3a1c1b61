//! Counts system calls with `perf`, where it is installed and allowed.

use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use crate::usage::Processes;

/// A count that is under way.
pub struct Counter(Child);

impl Counter {
    /// Begins to count the calls of `processes`.
    pub fn start(processes: &Processes) -> Option<Self> {
        let pids: Vec<String> = processes.0.iter().map(ToString::to_string).collect();
        let child = Command::new("perf")
            .args(["stat", "-x,", "-e", "raw_syscalls:sys_enter", "-p", &pids.join(",")])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        child.ok().map(Self)
    }

    /// The calls since then.
    pub fn stop(self) -> Option<u64> {
        let pid = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw)?;
        let _ = kill_process(pid, Signal::INT);
        let output = self.0.wait_with_output().ok()?;
        let text = String::from_utf8_lossy(&output.stderr);
        let line = text.lines().find(|line| line.contains("raw_syscalls"))?;
        line.split(',').next()?.parse().ok()
    }
}
