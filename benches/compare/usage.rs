//! What a program used, from the kernel's own accounting, summed over its processes and threads.

use std::fs;
use std::ops::Sub;
use std::time::Duration;

use nix::time::ClockId;
use nix::unistd::Pid;

/// Counted since the program's start.
#[derive(Debug, Clone, Copy, Default)]
pub struct Usage {
    /// Time on a core, in user space and in the kernel.
    pub cpu_ns: u64,
    /// Times that a thread went to sleep, without threads that have ended; none of the contestants
    /// serves traffic on threads that come and go.
    pub switches: u64,
}

impl Sub for Usage {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            cpu_ns: self.cpu_ns.saturating_sub(before.cpu_ns),
            switches: self.switches.saturating_sub(before.switches),
        }
    }
}

/// The processes of a program: its first one and all that descend from it.
#[derive(Debug, Clone, Default)]
pub struct Processes(pub Vec<u32>);

impl Processes {
    /// Those that exist now.
    pub fn of(first: u32) -> Self {
        let parents: Vec<(u32, u32)> = fs::read_dir("/proc")
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter_map(|pid| Some((pid, parent(pid)?)))
            .collect();
        let mut all = vec![first];
        let mut at = 0;
        while let Some(&of) = all.get(at) {
            all.extend(parents.iter().filter(|(_, parent)| *parent == of).map(|(pid, _)| pid));
            at += 1;
        }
        Self(all)
    }

    /// What they have used until now.
    pub fn usage(&self) -> Usage {
        let mut sum = Usage::default();
        for pid in &self.0 {
            sum.cpu_ns += cpu_ns(*pid).unwrap_or(0);
            for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
                let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
                sum.switches += field(&status, "voluntary_ctxt_switches:");
            }
        }
        sum
    }

    /// Bytes of user space that are theirs, without program text and other pages of files, whose
    /// share depends on who else runs.
    pub fn memory(&self) -> u64 {
        let rollup = |pid| fs::read_to_string(format!("/proc/{pid}/smaps_rollup"));
        let kib = |rollup: &str| field(rollup, "Pss_Anon:") + field(rollup, "Pss_Shmem:");
        self.0.iter().map(|pid| kib(&rollup(pid).unwrap_or_default()) * 1024).sum()
    }
}

/// CPU time of a process, with that of threads that have ended.
fn cpu_ns(pid: u32) -> Option<u64> {
    let pid = Pid::from_raw(i32::try_from(pid).ok()?);
    let time = Duration::from(ClockId::pid_cpu_clock_id(pid).ok()?.now().ok()?);
    u64::try_from(time.as_nanos()).ok()
}

fn parent(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    u32::try_from(field(&status, "PPid:")).ok()
}

fn number(text: &str, at: usize) -> u64 {
    text.split_whitespace().nth(at).and_then(|word| word.parse().ok()).unwrap_or(0)
}

fn field(text: &str, name: &str) -> u64 {
    text.lines().find_map(|line| line.strip_prefix(name)).map_or(0, |rest| number(rest, 0))
}
