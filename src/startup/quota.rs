//! How much CPU time the control groups allow this process.

use std::fmt::{self, Display};
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use procfs::process::MountInfo;
use procfs::{FromRead, ProcessCGroup, ProcessCGroups};

/// CPU time per wall time, in thousandths of a core.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Quota {
    milli: u64,
}

impl Display for Quota {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (self.milli as f64 / 1000.0).fmt(f)
    }
}

impl Quota {
    /// So many thousandths of a core.
    pub fn of_milli(milli: u64) -> Self {
        Self { milli }
    }

    /// In thousandths of a core.
    pub(super) fn milli(self) -> u64 {
        self.milli
    }

    fn new(quota_us: u64, period_us: u64) -> Option<Self> {
        (quota_us > 0 && period_us > 0)
            .then(|| Self { milli: quota_us.saturating_mul(1000).div_ceil(period_us) })
    }

    /// In whole cores, rounded up: a part of a core is better used than left.
    pub fn cores(self) -> usize {
        usize::try_from(self.milli.div_ceil(1000)).unwrap_or(usize::MAX)
    }

    /// The smallest of all that apply to this process, as far as it can see.
    pub(super) fn smallest(root: &Path) -> Option<Self> {
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

pub(super) fn read_number<T: FromStr>(file: &Path) -> Option<T> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Root, V1, V2, ids};
    use crate::config::Switch;

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
}
