//! What the node's metrics say of a proxy that has nothing to do.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::support::backend::Backend;
use crate::support::client::{connect, expect_echo};
use crate::support::proxy::Builder;
use crate::support::{Io, PATIENCE, eventually, on_both_drivers, skip};

on_both_drivers![an_idle_proxy_is_not_taken_for_one_that_waits_for_disks];

/// The kernel sums pressure up every two seconds, so this holds one whole sum at least.
const WATCHED: Duration = Duration::from_millis(4_500);

/// A control group of the test's own.
struct ControlGroup(PathBuf);

impl ControlGroup {
    fn new(name: &str) -> io::Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mounts")?;
        let mut mounts = mounts.lines().map(|line| line.split(' '));
        let root = mounts.find_map(|mut words| {
            let at = words.nth(1)?;
            (words.next()? == "cgroup2").then_some(at)
        });
        let root = root.ok_or_else(|| io::Error::other("cgroup2 is not mounted"))?;
        let path = PathBuf::from(root).join(format!("aegis-{name}-{}", std::process::id()));
        fs::create_dir(&path)?;
        let group = Self(path);
        group.waited_for_disks()?;
        Ok(group)
    }

    fn add(&self, process: u32) -> io::Result<()> {
        fs::write(self.0.join("cgroup.procs"), process.to_string())
    }

    /// How long anything in it has waited for disks.
    fn waited_for_disks(&self) -> io::Result<Duration> {
        let text = fs::read_to_string(self.0.join("io.pressure"))?;
        let total = text.split_whitespace().find_map(|word| word.strip_prefix("total="));
        let total = total.and_then(|total| total.parse().ok());
        total.map(Duration::from_micros).ok_or_else(|| io::Error::other(text))
    }
}

impl Drop for ControlGroup {
    fn drop(&mut self) {
        // The process that was in it is gone, or about to be.
        eventually("the control group is empty", PATIENCE, || fs::remove_dir(&self.0).ok());
    }
}

fn an_idle_proxy_is_not_taken_for_one_that_waits_for_disks(io: Io) {
    let group = match ControlGroup::new(io.name()) {
        Ok(group) => group,
        Err(error) => return skip(&format!("no control group with pressure to be had: {error}")),
    };
    let backend = Backend::echo();
    let proxy = Builder::on(io).backends(&[backend.address()]).start();
    let reason = proxy.log_field("io driver", "reason");
    if reason.contains("6.15") {
        return skip(&format!("the kernel cannot tell: {reason}"));
    }
    let client = connect(proxy.address());
    expect_echo(&client, 0, 1 << 10).unwrap();
    group.add(proxy.id()).unwrap();

    let (begin, before) = (Instant::now(), group.waited_for_disks().unwrap());
    eventually("time passes", PATIENCE, || (begin.elapsed() >= WATCHED).then_some(()));
    let waited = group.waited_for_disks().unwrap().saturating_sub(before);
    assert!(waited < WATCHED / 10, "{waited:?} of {WATCHED:?}");
}
