//! Which cores the workers run on: the affinity mask, with SMT siblings counted once, and the CPU
//! quota of the cgroups.

use std::fmt::Display;
use std::fs;
use std::num::NonZeroUsize;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use core_affinity::CoreId;
use procfs::process::MountInfo;
use procfs::{FromRead, ProcessCGroup, ProcessCGroups};

use crate::config::Switch;
use crate::limits::WORKERS_MAX;

/// How many workers there are, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// One for each worker; `None` where it is not pinned.
    pub cores: Vec<Option<CoreId>>,
    /// How this came about, in a sentence for the log.
    pub reason: String,
}

/// Plans for this process: `workers` of them, or else one for each core that it may use.
///
/// What the system does not tell is left out of account, so there is always a plan.
pub fn plan(workers: Option<NonZeroUsize>, pin: Switch) -> Plan {
    let cpus = core_affinity::get_core_ids().unwrap_or_default();
    plan_in(Path::new("/"), &cpus, workers, pin)
}

/// The same with the file system below `root`, for tests.
fn plan_in(root: &Path, cpus: &[CoreId], workers: Option<NonZeroUsize>, pin: Switch) -> Plan {
    let (first, siblings): (Vec<CoreId>, Vec<CoreId>) =
        cpus.iter().partition(|&&cpu| is_first_sibling(root, cpu, cpus));
    // A quota that all the process's CPUs together cannot exceed never throttles. It is what the
    // kubelet's static CPU manager sets, along with the mask.
    let quota = Quota::smallest(root).filter(|quota| quota.milli < cpus.len() as u64 * 1000);

    let usable = quota.map_or(first.len(), |quota| first.len().min(quota.cores()));
    let count = workers.map_or(usable, NonZeroUsize::get).clamp(1, WORKERS_MAX);
    let (pinned, pin_reason) = match pin {
        Switch::On => (!cpus.is_empty(), "as configured"),
        Switch::Off => (false, "as configured"),
        Switch::Auto if quota.is_some() => (false, "a pinned worker would wait for a busy core"),
        Switch::Auto if count > first.len() => (false, "there are more workers than cores"),
        // A mask of all CPUs keeps nobody else off them.
        Switch::Auto if online(root).is_none_or(|online| cpus.len() >= online) => {
            (false, "others may run on all of the machine's CPUs")
        }
        Switch::Auto => (true, "the CPUs are a part of the machine's"),
    };

    // The second siblings serve only when there are more workers than cores.
    let order: Vec<CoreId> = first.iter().chain(&siblings).copied().collect();
    let core = |worker: usize| order.get(worker % order.len().max(1)).copied();
    let cores = (0..count).map(|worker| core(worker).filter(|_| pinned)).collect();

    let quota = quota.map(|q| format!(" and a CPU quota of {}", q.milli as f64 / 1000.0));
    let reason = format!(
        "{} ({}) for {} with {}{}, {} ({pin_reason})",
        counted(count, "worker"),
        if workers.is_some() { "as configured" } else { "auto" },
        counted(first.len(), "core"),
        counted(cpus.len(), "usable CPU"),
        quota.unwrap_or_default(),
        if pinned { "pinned" } else { "not pinned" },
    );
    Plan { cores, reason }
}

fn counted(n: usize, noun: impl Display) -> String {
    format!("{n} {noun}{}", if n == 1 { "" } else { "s" })
}

/// Whether no lower CPU among `cpus` is on the same physical core.
fn is_first_sibling(root: &Path, cpu: CoreId, cpus: &[CoreId]) -> bool {
    let file = format!("sys/devices/system/cpu/cpu{}/topology/thread_siblings_list", cpu.id);
    let Ok(list) = fs::read_to_string(root.join(file)) else { return true };
    let is_sibling = |other: usize| cpu_ranges(&list).any(|range| range.contains(&other));
    // A list without the CPU itself is no list of its siblings.
    !is_sibling(cpu.id) || !cpus.iter().any(|other| other.id < cpu.id && is_sibling(other.id))
}

/// How many CPUs the machine runs on.
fn online(root: &Path) -> Option<usize> {
    let list = fs::read_to_string(root.join("sys/devices/system/cpu/online")).ok()?;
    let count = cpu_ranges(&list).map(Iterator::count).sum();
    (count > 0).then_some(count)
}

/// What a list such as `0,4` or `0-1` names, after Documentation/admin-guide/cputopology.rst of
/// the kernel.
fn cpu_ranges(list: &str) -> impl Iterator<Item = RangeInclusive<usize>> {
    list.trim().split(',').filter_map(|range| {
        let (low, high) = range.split_once('-').unwrap_or((range, range));
        Some(low.parse().ok()?..=high.parse().ok()?)
    })
}

/// CPU time per wall time, in thousandths of a core.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Quota {
    milli: u64,
}

impl Quota {
    fn new(quota_us: u64, period_us: u64) -> Option<Self> {
        (quota_us > 0 && period_us > 0)
            .then(|| Self { milli: quota_us.saturating_mul(1000).div_ceil(period_us) })
    }

    /// In whole cores, rounded up: a part of a core is better used than left.
    fn cores(self) -> usize {
        usize::try_from(self.milli.div_ceil(1000)).unwrap_or(usize::MAX)
    }

    /// The smallest of all that apply to this process, as far as it can see.
    fn smallest(root: &Path) -> Option<Self> {
        let groups = ProcessCGroups::from_file(root.join("proc/self/cgroup")).ok()?;
        let mounts = fs::read_to_string(root.join("proc/self/mountinfo")).ok()?;
        let mounts: Vec<_> =
            mounts.lines().filter_map(|line| MountInfo::from_line(line).ok()).collect();
        let in_group = |group: &ProcessCGroup| {
            let version = Version::of(group)?;
            let mount = mounts.iter().find(|mount| version.is_mounted_at(mount))?;
            visible_directories(root, mount, group)
                .iter()
                .filter_map(|directory| version.read(directory))
                .min()
        };
        groups.0.iter().filter_map(in_group).min()
    }
}

/// The group's directory and those above it, as far up as they are mounted.
fn visible_directories(root: &Path, mount: &MountInfo, group: &ProcessCGroup) -> Vec<PathBuf> {
    // Without a cgroup namespace the mount shows only the container's part of the hierarchy, but
    // the group's path starts at the host's root. `..` leads out of a namespace.
    let below = Path::new(&group.pathname)
        .strip_prefix(&mount.root)
        .ok()
        .filter(|path| !path.components().any(|part| part.as_os_str() == ".."))
        .unwrap_or(Path::new(""));
    let top = root.join(mount.mount_point.strip_prefix("/").unwrap_or(&mount.mount_point));
    below.ancestors().map(|path| top.join(path)).collect()
}

/// The two versions of cgroups; a host may have both mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

impl Version {
    /// The group's version, if it can limit CPU time.
    fn of(group: &ProcessCGroup) -> Option<Self> {
        if group.hierarchy == 0 {
            Some(Self::V2)
        } else {
            group.controllers.iter().any(|name| name == "cpu").then_some(Self::V1)
        }
    }

    fn is_mounted_at(self, mount: &MountInfo) -> bool {
        match self {
            Self::V1 => mount.fs_type == "cgroup" && mount.super_options.contains_key("cpu"),
            Self::V2 => mount.fs_type == "cgroup2",
        }
    }

    /// The directory's own quota. None is written as `max` or `-1`.
    fn read(self, directory: &Path) -> Option<Quota> {
        match self {
            Self::V1 => Quota::new(
                read_number(&directory.join("cpu.cfs_quota_us"))?,
                read_number(&directory.join("cpu.cfs_period_us"))?,
            ),
            Self::V2 => {
                let text = fs::read_to_string(directory.join("cpu.max")).ok()?;
                let (quota, period) = text.trim().split_once(' ')?;
                Quota::new(quota.parse().ok()?, period.parse().ok()?)
            }
        }
    }
}

fn read_number<T: FromStr>(file: &Path) -> Option<T> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const V2: &str = "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n";
    const V1: &str = "30 24 0:26 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n";

    /// A file system that goes away with the test.
    struct Root(PathBuf);

    impl Root {
        fn new(files: &[(&str, &str)]) -> Self {
            let name = format!("aegis-cores-{}-{:x}", std::process::id(), fastrand::u64(..));
            let root = Self(std::env::temp_dir().join(name));
            for (path, content) in files {
                root.write(path, content);
            }
            root
        }

        fn with_cgroup(cgroup: &str, mounts: &str, files: &[(&str, &str)]) -> Self {
            let root = Self::new(files);
            root.write("proc/self/cgroup", cgroup);
            root.write("proc/self/mountinfo", mounts);
            root
        }

        fn write(&self, path: &str, content: &str) {
            let path = self.0.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }

        fn siblings(&self, lists: &[&str]) {
            self.write("sys/devices/system/cpu/online", &format!("0-{}\n", lists.len() - 1));
            for (cpu, list) in lists.iter().enumerate() {
                let topology = format!("sys/devices/system/cpu/cpu{cpu}/topology");
                self.write(&format!("{topology}/thread_siblings_list"), &format!("{list}\n"));
            }
        }

        fn plan(&self, cpus: &[usize], workers: usize, pin: Switch) -> Plan {
            let cpus: Vec<_> = cpus.iter().map(|&id| CoreId { id }).collect();
            plan_in(&self.0, &cpus, NonZeroUsize::new(workers), pin)
        }

        fn quota(&self) -> Option<u64> {
            Quota::smallest(&self.0).map(|quota| quota.milli)
        }
    }

    impl Drop for Root {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn ids(plan: &Plan) -> Vec<Option<usize>> {
        plan.cores.iter().map(|core| core.map(|core| core.id)).collect()
    }

    #[test]
    fn on_a_part_of_the_machine_there_is_a_pinned_worker_for_each_core() {
        let root = Root::with_cgroup("0::/\n", V2, &[("sys/fs/cgroup/cpu.max", "max 100000\n")]);
        root.siblings(&["0,4", "1,5", "2,6", "3,7", "0,4", "1,5", "2,6", "3,7"]);
        let plan = root.plan(&[1, 2, 4, 5, 6], 0, Switch::Auto);
        // CPU 4 stands for its core, as CPU 0 is not ours.
        assert_eq!(ids(&plan), [Some(1), Some(2), Some(4)]);
        assert_eq!(
            plan.reason,
            "3 workers (auto) for 3 cores with 5 usable CPUs, pinned (the CPUs are a part of the \
             machine's)"
        );
        assert_eq!(ids(&root.plan(&[1, 2], 0, Switch::Off)), [None, None]);
    }

    #[test]
    fn workers_are_not_pinned_unasked_where_everybody_may_run() {
        let root = Root::new(&[]);
        root.siblings(&["0", "1"]);
        let plan = root.plan(&[0, 1], 0, Switch::Auto);
        assert_eq!(ids(&plan), [None; 2]);
        assert_eq!(
            plan.reason,
            "2 workers (auto) for 2 cores with 2 usable CPUs, not pinned (others may run on all of \
             the machine's CPUs)"
        );
        assert_eq!(ids(&root.plan(&[0, 1], 0, Switch::On)), [Some(0), Some(1)]);
        for unknown in ["", "0-", "many"] {
            root.write("sys/devices/system/cpu/online", unknown);
            assert_eq!(ids(&root.plan(&[0], 0, Switch::Auto)), [None], "{unknown:?}");
        }
        // Some are off.
        root.write("sys/devices/system/cpu/online", "0-1,3,6-7\n");
        assert_eq!(ids(&root.plan(&[0, 1, 3, 6], 0, Switch::Auto)), [0, 1, 3, 6].map(Some));
        assert_eq!(ids(&root.plan(&[0, 1, 3, 6, 7], 0, Switch::Auto)), [None; 5]);
    }

    #[test]
    fn a_quota_bounds_the_workers_and_unpins_them() {
        let root = Root::with_cgroup("0::/\n", V2, &[("sys/fs/cgroup/cpu.max", "150000 100000\n")]);
        let plan = root.plan(&[0, 1, 2, 3], 0, Switch::Auto);
        assert_eq!(ids(&plan), [None, None]);
        assert_eq!(
            plan.reason,
            "2 workers (auto) for 4 cores with 4 usable CPUs and a CPU quota of 1.5, not pinned \
             (a pinned worker would wait for a busy core)"
        );
        assert_eq!(ids(&root.plan(&[0, 1, 2, 3], 3, Switch::On)), [Some(0), Some(1), Some(2)]);
        // The mask is narrower than the quota, which then never throttles.
        root.write("sys/devices/system/cpu/online", "0-3\n");
        assert_eq!(ids(&root.plan(&[3], 0, Switch::Auto)), [Some(3)]);
    }

    #[test]
    fn more_workers_than_cores_wrap_around_and_are_not_pinned_unasked() {
        let root = Root::new(&[]);
        root.siblings(&["0-1", "0-1", "2-3", "2-3"]);
        let cpus = [0, 1, 2, 3];
        root.write("sys/devices/system/cpu/online", "0-7\n");
        assert_eq!(ids(&root.plan(&cpus, 2, Switch::Auto)), [Some(0), Some(2)]);
        assert_eq!(ids(&root.plan(&cpus, 3, Switch::Auto)), [None; 3]);
        let all = [0, 2, 1, 3, 0].map(Some);
        assert_eq!(ids(&root.plan(&cpus, 5, Switch::On)), all);
    }

    #[test]
    fn the_smallest_quota_of_all_visible_groups_counts() {
        let files = [
            ("sys/fs/cgroup/pods/cpu.max", "400000 100000"),
            ("sys/fs/cgroup/pods/a/cpu.max", "200000 100000"),
            ("sys/fs/cgroup/pods/a/c/cpu.max", "max 100000"),
            ("sys/fs/cgroup/pods/a/c/other/cpu.max", "10000 100000"),
        ];
        assert_eq!(Root::with_cgroup("0::/pods/a/c\n", V2, &files).quota(), Some(2000));
        assert_eq!(Root::with_cgroup("0::/pods\n", V2, &files).quota(), Some(4000));
        assert_eq!(Root::with_cgroup("0::/\n", V2, &files).quota(), None);
    }

    #[test]
    fn only_the_mounted_part_of_the_hierarchy_is_seen() {
        // As in a container without a cgroup namespace.
        let mount = "30 24 0:26 /pods/a /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        let files = [("sys/fs/cgroup/cpu.max", "50000 100000")];
        assert_eq!(Root::with_cgroup("0::/pods/a\n", mount, &files).quota(), Some(500));
        // The process was moved out of what it sees.
        assert_eq!(Root::with_cgroup("0::/../b\n", V2, &files).quota(), Some(500));
    }

    #[test]
    fn version_1_has_two_files_a_group() {
        let group = "5:memory:/m\n4:cpu,cpuacct:/pods/a\n0::/\n";
        let files = [
            ("sys/fs/cgroup/cpu,cpuacct/pods/cpu.cfs_quota_us", "250000\n"),
            ("sys/fs/cgroup/cpu,cpuacct/pods/cpu.cfs_period_us", "100000\n"),
            ("sys/fs/cgroup/cpu,cpuacct/pods/a/cpu.cfs_quota_us", "-1\n"),
            ("sys/fs/cgroup/cpu,cpuacct/pods/a/cpu.cfs_period_us", "100000\n"),
        ];
        let root = Root::with_cgroup(group, V1, &files);
        assert_eq!(root.quota(), Some(2500));
        assert_eq!(root.plan(&[0, 1, 2, 3], 0, Switch::Auto).cores.len(), 3);
    }

    #[test]
    fn what_makes_no_sense_is_left_out() {
        for max in ["", "max", "100000", "x 100000", "100000 0", "0 100000", "-5 100000", "1 2 3"] {
            let root = Root::with_cgroup("0::/\n", V2, &[("sys/fs/cgroup/cpu.max", max)]);
            assert_eq!(root.quota(), None, "{max:?}");
        }
        let huge = format!("{} 1", u64::MAX);
        let root = Root::with_cgroup("0::/\n", V2, &[("sys/fs/cgroup/cpu.max", &huge)]);
        assert_eq!(root.plan(&[0], 0, Switch::Auto).cores.len(), 1);

        let root = Root::with_cgroup("garbage", "garbage\n- - -\n", &[]);
        root.siblings(&["", "0-", "x,y", "7"]);
        assert_eq!(ids(&root.plan(&[0, 1, 2, 3], 0, Switch::On)), [0, 1, 2, 3].map(Some));
        // A line that makes no sense does not hide the next.
        let files = [("sys/fs/cgroup/cpu.max", "100000 100000")];
        let root = Root::with_cgroup("0::/\n", &format!("garbage\n{V2}"), &files);
        assert_eq!(root.quota(), Some(1000));

        let nothing = Root::new(&[]);
        assert_eq!(ids(&nothing.plan(&[], 0, Switch::Auto)), [None]);
        assert_eq!(ids(&nothing.plan(&[], 2, Switch::On)), [None; 2]);
    }

    #[test]
    fn there_is_a_plan_for_this_machine() {
        let plan = plan(None, Switch::On);
        assert!((1..=WORKERS_MAX).contains(&plan.cores.len()), "{}", plan.reason);
    }
}
