//! How many workers there are, and which cores they run on: by the affinity mask, with SMT siblings
//! counted once, by the CPU quota of the cgroups, and by what the container was given.

use std::fmt::Display;
use std::fs;
use std::num::NonZeroUsize;
use std::ops::RangeInclusive;
use std::path::Path;

use core_affinity::CoreId;

use super::quota::{Quota, read_number};
use crate::config::{Resources, Switch};
use crate::limits::{WORKERS_AUTO_MAX, WORKERS_MAX};

/// How many workers there are, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// One for each worker; `None` where it is not pinned.
    pub cores: Vec<Option<CoreId>>,
    /// How this came about, in a sentence for the log.
    pub reason: String,
    /// CPUs that the process may run on; 0 where that is not known.
    pub cpus: usize,
    /// What the control groups allow it of their time, where they limit that.
    pub quota: Option<Quota>,
}

/// Plans for this process: `workers` of them, or else one for each core that is for it. That is what
/// its CPU request or its quota says. A mask says nothing: where the kubelet gives some containers
/// CPUs of their own, all others share a mask of the rest.
///
/// What the system does not tell is left out of account, so there is always a plan.
pub(super) fn plan(workers: Option<NonZeroUsize>, pin: Switch, resources: &Resources) -> Plan {
    let cpus = core_affinity::get_core_ids().unwrap_or_default();
    plan_in(Path::new("/"), &cpus, workers, pin, resources)
}

/// The same with the file system below `root`, for tests.
pub(super) fn plan_in(
    root: &Path,
    cpus: &[CoreId],
    workers: Option<NonZeroUsize>,
    pin: Switch,
    resources: &Resources,
) -> Plan {
    let (first, siblings): (Vec<CoreId>, Vec<CoreId>) =
        cpus.iter().partition(|&&cpu| is_first_sibling(root, cpu, cpus));
    // A quota that all the process's CPUs together cannot exceed never throttles. It is what the
    // kubelet's static CPU manager sets, along with the mask.
    let given = Quota::smallest(root);
    let quota = given.filter(|quota| quota.milli() < cpus.len() as u64 * 1000);

    let request = resources.cpu_request_milli.map(|milli| Quota::of_milli(milli.get()));
    let usable = quota.map_or(first.len(), |quota| first.len().min(quota.cores()));
    let (count, count_reason) = match (workers, request) {
        (Some(workers), _) => (workers.get(), "as configured".to_owned()),
        (None, Some(request)) if request.cores() <= usable => {
            (request.cores(), format!("auto, by the CPU request of {request}"))
        }
        (None, None) if quota.is_none() && usable > WORKERS_AUTO_MAX => {
            let why = "as neither a CPU request nor a quota says how many CPUs are for it";
            (WORKERS_AUTO_MAX, format!("auto, at most {WORKERS_AUTO_MAX} {why}"))
        }
        (None, _) => (usable, "auto".to_owned()),
    };
    let count = count.clamp(1, WORKERS_MAX);
    let (pinned, pin_reason) = match pin {
        Switch::On => (!cpus.is_empty(), "as configured".to_owned()),
        Switch::Off => (false, "as configured".to_owned()),
        Switch::Auto => match why_not_exclusive(root, cpus.len(), resources) {
            Some(why) => (false, why),
            // As where the quota is of the whole pod.
            None if quota.is_some() => {
                (false, "a pinned worker would wait for a busy core".to_owned())
            }
            None if count > cpus.len() => (false, "there are more workers than CPUs".to_owned()),
            None => (true, "the CPUs are the container's own".to_owned()),
        },
    };

    // The second siblings serve only when there are more workers than cores.
    let order: Vec<CoreId> = first.iter().chain(&siblings).copied().collect();
    let core = |worker: usize| order.get(worker % order.len().max(1)).copied();
    let cores = (0..count).map(|worker| core(worker).filter(|_| pinned)).collect();

    let quota = quota.map(|quota| format!(" and a CPU quota of {quota}"));
    let reason = format!(
        "{} ({count_reason}) for {} with {}{}, {} ({pin_reason})",
        counted(count, "worker"),
        counted(first.len(), "core"),
        counted(cpus.len(), "usable CPU"),
        quota.unwrap_or_default(),
        if pinned { "pinned" } else { "not pinned" },
    );
    Plan { cores, reason, cpus: cpus.len(), quota: given }
}

/// Why it is not certain that nobody else runs on these CPUs. The kubelet's static CPU manager gives
/// CPUs to a container of its own if the pod is Guaranteed and the container's request is whole, and
/// then as many as that. To pin workers to CPUs that others share is worse than never to pin: all
/// sidecars of a node would take the same ones.
fn why_not_exclusive(root: &Path, cpus: usize, resources: &Resources) -> Option<String> {
    let &Resources {
        cpu_request_milli: Some(request),
        cpu_limit_milli: Some(limit),
        memory_request_bytes: Some(memory_request),
        memory_limit_bytes: Some(memory_limit),
    } = resources
    else {
        return Some(
            "AEGIS_CPU_REQUEST, AEGIS_CPU_LIMIT and the same of memory do not prove that its CPUs \
             are its own"
                .to_owned(),
        );
    };
    let [request, limit] = [request, limit].map(|milli| Quota::of_milli(milli.get()));
    if request != limit {
        return Some(format!(
            "not Guaranteed: it requests {request} CPUs, and its limit is {limit}"
        ));
    }
    if memory_request != memory_limit {
        return Some(format!(
            "not Guaranteed: it requests {memory_request} bytes of memory, and its limit is \
             {memory_limit}"
        ));
    }
    if request.milli() % 1000 != 0 {
        return Some(format!("a request of {request} CPUs is not whole, so others share them"));
    }
    if request.cores() != cpus {
        return Some(format!(
            "it requests {request} CPUs and may run on {cpus}, so others share them"
        ));
    }
    // A mask of all CPUs keeps nobody else off them.
    if online(root).is_none_or(|online| cpus >= online) {
        return Some("others may run on all of the machine's CPUs".to_owned());
    }
    // The other containers of the pod count as well, and only the kubelet knows them. It gives what
    // is not Guaranteed a score from 2 to 1000, and what is one of -997; elsewhere it is mostly 0.
    let score = read_number::<i32>(&root.join("proc/self/oom_score_adj"));
    score
        .filter(|score| (2..=1000).contains(score))
        .map(|score| format!("the pod is not Guaranteed, by its oom_score_adj of {score}"))
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

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use super::super::testing::{Root, V2, ids};
    use super::*;

    /// What the downward API tells of a container: CPUs in thousandths, and memory.
    fn given(
        cpu_request: u64,
        cpu_limit: u64,
        memory_request: u64,
        memory_limit: u64,
    ) -> Resources {
        Resources {
            cpu_request_milli: NonZeroU64::new(cpu_request),
            cpu_limit_milli: NonZeroU64::new(cpu_limit),
            memory_request_bytes: NonZeroU64::new(memory_request),
            memory_limit_bytes: NonZeroU64::new(memory_limit),
        }
    }

    fn guaranteed(cpus: u64) -> Resources {
        given(1000 * cpus, 1000 * cpus, 1 << 26, 1 << 26)
    }

    /// A machine of 8 CPUs, each a core.
    fn machine() -> Root {
        let root = Root::with_cgroup("0::/\n", V2, &[("sys/fs/cgroup/cpu.max", "max 100000\n")]);
        root.siblings(&["0", "1", "2", "3", "4", "5", "6", "7"]);
        root
    }

    #[test]
    fn on_cpus_of_its_own_there_is_a_pinned_worker_for_each() {
        let root = machine();
        let plan = root.plan_with(&[2, 5], 0, Switch::Auto, &guaranteed(2));
        assert_eq!(ids(&plan), [Some(2), Some(5)]);
        assert_eq!(
            plan.reason,
            "2 workers (auto, by the CPU request of 2) for 2 cores with 2 usable CPUs, pinned (the \
             CPUs are the container's own)"
        );
        assert_eq!(ids(&root.plan_with(&[2, 5], 0, Switch::Off, &guaranteed(2))), [None; 2]);
        // As many again would wait for each other.
        assert_eq!(ids(&root.plan_with(&[2, 5], 3, Switch::Auto, &guaranteed(2))), [None; 3]);
        assert_eq!(ids(&root.plan_with(&[2, 5], 1, Switch::Auto, &guaranteed(2))), [Some(2)]);
    }

    #[test]
    fn siblings_of_its_own_have_a_worker_for_each_core_or_as_many_as_configured() {
        let root = Root::new(&[]);
        root.siblings(&["0,2", "1,3", "0,2", "1,3"]);
        let plan = |workers| root.plan_with(&[1, 3], workers, Switch::Auto, &guaranteed(2));
        assert_eq!(ids(&plan(0)), [Some(1)]);
        assert_eq!(ids(&plan(2)), [Some(1), Some(3)]);
    }

    #[test]
    fn workers_are_not_pinned_unless_the_cpus_are_certain_to_be_its_own() {
        let root = machine();
        let unproved = "AEGIS_CPU_REQUEST, AEGIS_CPU_LIMIT and the same of memory do not prove";
        for (resources, cpus, why) in [
            // The shared rest of a node on which others have CPUs of their own.
            (Resources::default(), &[0, 1, 2, 3, 6, 7][..], unproved),
            (given(2000, 2000, 0, 0), &[2, 5], unproved),
            (given(0, 8000, 0, 1 << 34), &[2, 5], unproved),
            (given(2000, 0, 1 << 26, 1 << 26), &[2, 5], unproved),
            (
                given(2000, 8000, 1 << 26, 1 << 26),
                &[2, 5],
                "it requests 2 CPUs, and its limit is 8",
            ),
            (
                given(2000, 2000, 64, 65),
                &[2, 5],
                "requests 64 bytes of memory, and its limit is 65",
            ),
            (given(500, 500, 64, 64), &[2], "a request of 0.5 CPUs is not whole"),
            (given(1500, 1500, 64, 64), &[2, 5], "a request of 1.5 CPUs is not whole"),
            (guaranteed(2), &[0, 1, 2, 3, 6, 7], "requests 2 CPUs and may run on 6"),
            (guaranteed(2), &[2], "requests 2 CPUs and may run on 1"),
            (guaranteed(8), &[0, 1, 2, 3, 4, 5, 6, 7], "may run on all of the machine's CPUs"),
        ] {
            let plan = root.plan_with(cpus, 0, Switch::Auto, &resources);
            assert!(plan.cores.iter().all(Option::is_none), "{plan:?}");
            let not_pinned = plan.reason.split_once(", not pinned (");
            assert!(not_pinned.is_some_and(|(_, reason)| reason.contains(why)), "{plan:?}");
            let pinned = root.plan_with(cpus, 1, Switch::On, &resources);
            assert_eq!(ids(&pinned), [Some(cpus[0])], "as configured");
        }
        for (score, pinned) in [("-997", true), ("0", true), ("2", false), ("999", false)] {
            root.write("proc/self/oom_score_adj", score);
            let plan = root.plan_with(&[2, 5], 0, Switch::Auto, &guaranteed(2));
            assert_eq!(plan.cores.iter().all(Option::is_some), pinned, "{score}: {}", plan.reason);
        }
        root.write("proc/self/oom_score_adj", "-997");
        // A quota that is smaller throttles.
        root.write("sys/fs/cgroup/cpu.max", "150000 100000");
        let plan = root.plan_with(&[2, 5], 0, Switch::Auto, &guaranteed(2));
        assert!(plan.reason.ends_with("(a pinned worker would wait for a busy core)"), "{plan:?}");
        // One that is not never does.
        root.write("sys/fs/cgroup/cpu.max", "200000 100000");
        let plan = root.plan_with(&[2, 5], 0, Switch::Auto, &guaranteed(2));
        assert_eq!(ids(&plan), [Some(2), Some(5)]);
        for unknown in ["", "0-", "many"] {
            root.write("sys/devices/system/cpu/online", unknown);
            let plan = root.plan_with(&[2, 5], 0, Switch::Auto, &guaranteed(2));
            assert_eq!(ids(&plan), [None; 2], "{unknown:?}");
        }
        root.write("sys/fs/cgroup/cpu.max", "max 100000");
        // Some are off.
        root.write("sys/devices/system/cpu/online", "0-1,3,6-7\n");
        let plan =
            |cpus: &[usize]| root.plan_with(cpus, 0, Switch::Auto, &guaranteed(cpus.len() as u64));
        assert_eq!(ids(&plan(&[0, 1, 3, 6])), [0, 1, 3, 6].map(Some));
        assert_eq!(ids(&plan(&[0, 1, 3, 6, 7])), [None; 5]);
    }

    #[test]
    fn workers_follow_the_cpu_request_rounded_up() {
        let root = machine();
        let cpus = [0, 1, 2, 3, 4, 5, 6, 7];
        let workers = |milli| {
            let resources = given(milli, 8000, 0, 1 << 34);
            root.plan_with(&cpus, 0, Switch::Auto, &resources).cores.len()
        };
        assert_eq!([1, 100, 1000, 1001, 5000, 8000, 64_000].map(workers), [1, 1, 1, 2, 5, 8, 8]);
        assert_eq!(workers(u64::MAX), 8);
        // Neither more than the quota allows.
        root.write("sys/fs/cgroup/cpu.max", "300000 100000");
        assert_eq!([100, 2000, 5000].map(workers), [1, 2, 3]);
    }

    #[test]
    fn workers_are_few_where_nothing_says_how_many_cpus_are_for_them() {
        let root = Root::new(&[]);
        root.siblings(&["0"; 64]);
        let cpus: Vec<_> = (0..64).collect();
        let plan = root.plan(&cpus, 0, Switch::Auto);
        assert_eq!(ids(&plan), [None; 4]);
        assert_eq!(
            plan.reason,
            "4 workers (auto, at most 4 as neither a CPU request nor a quota says how many CPUs are \
             for it) for 64 cores with 64 usable CPUs, not pinned (AEGIS_CPU_REQUEST, \
             AEGIS_CPU_LIMIT and the same of memory do not prove that its CPUs are its own)"
        );
        assert_eq!(root.plan(&cpus[..60], 0, Switch::Auto).cores.len(), 4, "a shared rest");
        assert_eq!(root.plan(&cpus[..3], 0, Switch::Auto).cores.len(), 3);
        assert_eq!(root.plan(&cpus, 64, Switch::Auto).cores.len(), 64, "as configured");
        // Whoever sets a limit says so.
        root.write("proc/self/cgroup", "0::/\n");
        root.write("proc/self/mountinfo", V2);
        root.write("sys/fs/cgroup/cpu.max", "1600000 100000");
        assert_eq!(root.plan(&cpus, 0, Switch::Auto).cores.len(), 16);
        let node = given(0, 64_000, 0, 1 << 38);
        assert_eq!(root.plan_with(&cpus, 0, Switch::Auto, &node).cores.len(), 16);
        root.write("sys/fs/cgroup/cpu.max", "max 100000");
        let plan = root.plan_with(&cpus, 0, Switch::Auto, &node);
        assert_eq!(plan.cores.len(), 4, "without a limit the node's CPUs pass for one");
        let plan = root.plan_with(&cpus[..16], 0, Switch::Auto, &guaranteed(16));
        assert_eq!(plan.cores.iter().flatten().count(), 16, "its own");
    }

    #[test]
    fn a_quota_bounds_the_workers() {
        let root = Root::with_cgroup("0::/\n", V2, &[("sys/fs/cgroup/cpu.max", "150000 100000\n")]);
        let plan = root.plan(&[0, 1, 2, 3], 0, Switch::Auto);
        assert_eq!(ids(&plan), [None, None]);
        let begin = "2 workers (auto) for 4 cores with 4 usable CPUs and a CPU quota of 1.5, not";
        assert!(plan.reason.starts_with(begin), "{}", plan.reason);
        assert_eq!(ids(&root.plan(&[0, 1, 2, 3], 3, Switch::On)), [Some(0), Some(1), Some(2)]);
    }

    #[test]
    fn more_workers_than_cores_wrap_around() {
        let root = Root::new(&[]);
        root.siblings(&["0-1", "0-1", "2-3", "2-3"]);
        let cpus = [0, 1, 2, 3];
        assert_eq!(root.plan(&cpus, 0, Switch::Auto).cores.len(), 2, "siblings count once");
        let all = [0, 2, 1, 3, 0].map(Some);
        assert_eq!(ids(&root.plan(&cpus, 5, Switch::On)), all);
    }

    #[test]
    fn there_is_a_plan_for_this_machine() {
        let plan = plan(None, Switch::On, &Resources::default());
        assert!((1..=WORKERS_MAX).contains(&plan.cores.len()), "{}", plan.reason);
    }
}
