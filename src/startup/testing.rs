//! A host that the tests of this module make up.

use std::fs;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use core_affinity::CoreId;

use super::cores::{self, Plan};
use super::quota::Quota;
use crate::config::{Resources, Switch};

pub(super) const V2: &str = "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n";
pub(super) const V1: &str =
    "30 24 0:26 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n";

/// A file system that goes away with the test.
pub(super) struct Root(PathBuf);

impl Root {
    pub(super) fn new(files: &[(&str, &str)]) -> Self {
        let name = format!("aegis-cores-{}-{:x}", std::process::id(), fastrand::u64(..));
        let root = Self(std::env::temp_dir().join(name));
        for (path, content) in files {
            root.write(path, content);
        }
        root
    }

    pub(super) fn with_cgroup(cgroup: &str, mounts: &str, files: &[(&str, &str)]) -> Self {
        let root = Self::new(files);
        root.write("proc/self/cgroup", cgroup);
        root.write("proc/self/mountinfo", mounts);
        root
    }

    pub(super) fn write(&self, path: &str, content: &str) {
        let path = self.0.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    pub(super) fn siblings(&self, lists: &[&str]) {
        self.write("sys/devices/system/cpu/online", &format!("0-{}\n", lists.len() - 1));
        for (cpu, list) in lists.iter().enumerate() {
            let topology = format!("sys/devices/system/cpu/cpu{cpu}/topology");
            self.write(&format!("{topology}/thread_siblings_list"), &format!("{list}\n"));
        }
    }

    pub(super) fn plan(&self, cpus: &[usize], workers: usize, pin: Switch) -> Plan {
        self.plan_with(cpus, workers, pin, &Resources::default())
    }

    pub(super) fn plan_with(
        &self,
        cpus: &[usize],
        workers: usize,
        pin: Switch,
        resources: &Resources,
    ) -> Plan {
        let cpus: Vec<_> = cpus.iter().map(|&id| CoreId { id }).collect();
        cores::plan_in(&self.0, &cpus, NonZeroUsize::new(workers), pin, resources)
    }

    pub(super) fn quota(&self) -> Option<u64> {
        Quota::smallest(&self.0).map(Quota::milli)
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The core of each worker.
pub(super) fn ids(plan: &Plan) -> Vec<Option<usize>> {
    plan.cores.iter().map(|core| core.map(|core| core.id)).collect()
}
