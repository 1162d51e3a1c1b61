//! How many sessions and pool connections there is room for, by the descriptors that the process may
//! have.

use std::fmt;
use std::fs;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, setrlimit};

use super::quota::read_number;
use crate::config::{Config, Discovery, RouteConfig};
use crate::io::Limit;
use crate::limits::{
    ADMIN_CONNECTIONS, CHECKS_MAX, CONTROL_CONNECTIONS, CONTROL_WAITING, DESCRIPTORS_RESERVED,
    PIPES_MAX, POOL_CONNS_MAX, SESSIONS_AUTO_MAX,
};

/// What the process has room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Sessions at a time in the whole process.
    pub sessions_max: NonZeroUsize,
    /// Connections of all pools of the process, idle or being made: so many are reserved.
    pub pool_conns: usize,
    /// Those of one worker.
    pub pool_conns_max: usize,
}

/// What there is room for with so many workers and `nofile` descriptors.
///
/// # Errors
/// The number of sessions that is configured does not fit, or not even one does.
pub(super) fn of(config: &Config, workers: usize, nofile: u64) -> Result<Capacity, CapacityError> {
    capacity(config.max_sessions, nofile, &DescriptorUsers::of(config, workers))
}

/// Raises the limit on open descriptors (`RLIMIT_NOFILE`) as far as this process may, and returns
/// it. The soft limit is usually 1024, for the sake of programs that use `select`.
///
/// A filter of system calls may deny to read it, or to change it. Then there is room for fewer sessions,
/// which is better than for none.
pub(super) fn raise_nofile() -> u64 {
    let Some([soft, hard]) = Limit::Descriptors.of_this_process().ok().or_else(nofile_in_proc)
    else {
        tracing::warn!(assumed = NOFILE_USUAL, "RLIMIT_NOFILE cannot be read");
        return NOFILE_USUAL;
    };
    let set =
        |limit| setrlimit(Resource::Nofile, Rlimit { current: Some(limit), maximum: Some(limit) });
    let granted = || read_number(Path::new("/proc/sys/fs/nr_open"));
    raise(soft, hard, granted, set).unwrap_or_else(|error| {
        tracing::warn!(soft, hard, %error, "RLIMIT_NOFILE cannot be raised to its hard limit");
        soft
    })
}

/// Raises a limit as far as `set` allows, and returns it. `granted` is what the kernel grants anybody.
fn raise(
    soft: u64,
    hard: u64,
    granted: impl FnOnce() -> Option<u64>,
    set: impl Fn(u64) -> Result<(), Errno>,
) -> Result<u64, Errno> {
    if soft == hard {
        return Ok(soft);
    }
    let Err(error) = set(hard) else { return Ok(hard) };
    // More was granted before somebody lowered that: what goes beyond it may not even be kept.
    match granted().filter(|granted| (soft..hard).contains(granted)) {
        Some(granted) => set(granted).map(|()| granted),
        None => Err(error),
    }
}

/// The same limits as the kernel tells them in a file.
fn nofile_in_proc() -> Option<[u64; 2]> {
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    let mut numbers = line.split_whitespace().map(|number| match number {
        "unlimited" => Some(u64::MAX),
        number => number.parse().ok(),
    });
    Some([numbers.next()??, numbers.next()??])
}

/// The soft limit that most processes have.
const NOFILE_USUAL: u64 = 1024;

/// A session is a connection from the client and one to the backend.
const DESCRIPTORS_PER_SESSION: u64 = 2;

/// As many pool connections for each worker are reserved for even where descriptors are short: without
/// any, no pool could make a connection.
const POOL_CONNS_MIN: u64 = 16;

/// The ring, or the epoll instance and its timer; the eventfd that wakes the worker, which it has
/// twice; what the scheduler says about it; both ends of pipes; and those in reserve.
const DESCRIPTORS_PER_WORKER: u64 = 5 + 2 * PIPES_MAX as u64 + DESCRIPTORS_RESERVED as u64;

/// The admin listener and what is held back for it, the log, the runtime's own epoll, eventfd and signal
/// pipe, and connections to name servers for answers that are cut.
const CONTROL_DESCRIPTORS: u64 = 32;

/// The control socket and its file, its connections, and the one that is being refused.
const CONTROL_SOCKET_DESCRIPTORS: u64 = 3 + (CONTROL_CONNECTIONS + CONTROL_WAITING) as u64;

/// Sockets of one name's lookup: one for each family, while it is asked for.
const DESCRIPTORS_PER_NAME: u64 = 2;

/// Connections to the Kubernetes API for one route, for the endpoints and for what declares the
/// stores, if no other route shares them: the watch, the one that a new client makes while that of the
/// last one is still closing, and for each a lookup in DNS and the files with its credentials.
const KUBERNETES_DESCRIPTORS: u64 = 2 * 8;

/// Standard input, output and error.
const STANDARD_DESCRIPTORS: u64 = 3;

/// Connections whose close is still under way in the kernel, files that libraries open for a
/// moment, and what the parent process left open.
const SLACK_DESCRIPTORS: u64 = 64;

/// What descriptors are needed for, apart from sessions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct DescriptorUsers {
    /// Worker threads.
    workers: usize,
    /// Addresses to listen on of all routes, each with a socket in every worker.
    listeners: usize,
    /// Connections that all pools of the process together may come to hold: their limits are the
    /// process's, however many workers share them.
    pool_conns: usize,
    /// Routes whose endpoints the Kubernetes API names.
    kubernetes: usize,
    /// Configured names, each of which may be looked up at any time.
    names: usize,
    /// Whether endpoints are checked.
    checks: bool,
    /// Whether there is a control socket.
    control: bool,
}

impl DescriptorUsers {
    fn of(config: &Config, workers: usize) -> Self {
        let by_kubernetes = |route: &&Arc<RouteConfig>| route.discovery == Discovery::Kubernetes;
        let routes = || config.routes.iter();
        let pool_conns: usize = routes().map(|route| route.pool_conns()).sum();
        Self {
            workers,
            listeners: routes().map(|route| route.listen.len()).sum(),
            pool_conns: pool_conns.min(workers * POOL_CONNS_MAX),
            kubernetes: routes().filter(by_kubernetes).count(),
            names: routes().filter(|route| !by_kubernetes(route)).map(|route| route.names()).sum(),
            checks: routes().any(|route| route.check_interval.is_some()),
            control: config.control.is_some(),
        }
    }
}

/// How many sessions there can be at a time: as many as `requested`, or else what fits into
/// `nofile_hard` descriptors, at most [`SESSIONS_AUTO_MAX`]. Pools have what they may come to hold,
/// or what is left if that is less; where the sessions' number is open, half of it.
fn capacity(
    requested: Option<NonZeroUsize>,
    nofile_hard: u64,
    users: &DescriptorUsers,
) -> Result<Capacity, CapacityError> {
    let least = PoolConns::within(0, users).reserved;
    let left = nofile_hard.saturating_sub(descriptors_needed(0, 0, users).total());
    let left_for_sessions = left.saturating_sub(least);
    let fitting =
        usize::try_from(left_for_sessions / DESCRIPTORS_PER_SESSION).unwrap_or(usize::MAX);
    if fitting == 0 {
        let needed = descriptors_needed(1, least, users);
        return Err(CapacityError::NothingFits { needed, nofile_hard });
    }
    let (sessions, pools) = match requested {
        Some(requested) if requested.get() <= fitting => {
            let left = left - requested.get() as u64 * DESCRIPTORS_PER_SESSION;
            (requested, PoolConns::within(left, users))
        }
        Some(requested) => {
            let needed = descriptors_needed(requested.get(), least, users);
            return Err(CapacityError::Requested { requested, needed, nofile_hard, fitting });
        }
        None => {
            let pools = PoolConns::within(left / 2, users);
            let fits = (left - pools.reserved) / DESCRIPTORS_PER_SESSION;
            let fits = usize::try_from(fits).unwrap_or(usize::MAX).clamp(1, SESSIONS_AUTO_MAX);
            (NonZeroUsize::new(fits).unwrap_or(NonZeroUsize::MIN), pools)
        }
    };
    let [pool_conns, pool_conns_max] = [pools.reserved, pools.of_worker].map(|n| n as usize);
    Ok(Capacity { sessions_max: sessions, pool_conns, pool_conns_max })
}

/// Connections of pools.
struct PoolConns {
    /// Of the process: so many descriptors are reserved for them.
    reserved: u64,
    /// Of one worker at most. Any may have all that there are; only where descriptors are short each
    /// has a part of its own, so that all together have no more than is reserved.
    of_worker: u64,
}

impl PoolConns {
    /// What pools may come to hold, within `left` descriptors, or the least that they need.
    fn within(left: u64, users: &DescriptorUsers) -> Self {
        let (workers, wanted) = (users.workers as u64, users.pool_conns as u64);
        if wanted <= left.max(workers * POOL_CONNS_MIN) {
            return Self { reserved: wanted, of_worker: wanted.min(POOL_CONNS_MAX as u64) };
        }
        let of_worker = (left / workers).max(POOL_CONNS_MIN);
        Self { reserved: workers * of_worker, of_worker }
    }
}

/// How many descriptors the process needs, part by part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DescriptorsNeeded {
    /// The sessions' connections.
    pub sessions: u64,
    /// Warm connections.
    pub pools: u64,
    /// Listening sockets, and the workers' own.
    pub workers: u64,
    /// Connections to the admin port.
    pub admin: u64,
    /// The rest of the control thread's.
    pub control: u64,
    /// Standard input, output and error.
    pub standard: u64,
    /// Room to spare.
    pub slack: u64,
}

/// How many descriptors `max_sessions` sessions, `pool_conns` pool connections and the other `users`
/// need.
fn descriptors_needed(
    max_sessions: usize,
    pool_conns: u64,
    users: &DescriptorUsers,
) -> DescriptorsNeeded {
    let [workers, listeners] = [users.workers, users.listeners].map(|n| n as u64);
    let kubernetes = users.kubernetes as u64 * KUBERNETES_DESCRIPTORS;
    let checks = if users.checks { CHECKS_MAX as u64 } else { 0 };
    let names = users.names as u64 * DESCRIPTORS_PER_NAME;
    let control = if users.control { CONTROL_SOCKET_DESCRIPTORS } else { 0 };
    DescriptorsNeeded {
        sessions: max_sessions as u64 * DESCRIPTORS_PER_SESSION,
        pools: pool_conns,
        workers: workers * (listeners + DESCRIPTORS_PER_WORKER),
        admin: ADMIN_CONNECTIONS as u64,
        control: CONTROL_DESCRIPTORS + kubernetes + names + checks + control,
        standard: STANDARD_DESCRIPTORS,
        slack: SLACK_DESCRIPTORS,
    }
}

impl DescriptorsNeeded {
    /// The sum of all parts.
    pub fn total(&self) -> u64 {
        let Self { sessions, pools, workers, admin, control, standard, slack } = self;
        sessions + pools + workers + admin + control + standard + slack
    }
}

impl fmt::Display for DescriptorsNeeded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { sessions, pools, workers, admin, control, standard, slack } = self;
        write!(
            f,
            "{} = {sessions} for sessions + {pools} for pools + {workers} for workers + {admin} \
             for admin connections + {control} for control + {standard} standard + {slack} slack",
            self.total()
        )
    }
}

/// Why there cannot be that many sessions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CapacityError {
    /// The number asked for does not fit.
    #[error(
        "AEGIS_MAX_SESSIONS={requested} needs {needed} descriptors; RLIMIT_NOFILE allows \
         {nofile_hard}, which is enough for {fitting} sessions"
    )]
    Requested {
        /// Sessions asked for.
        requested: NonZeroUsize,
        /// Descriptors needed for them.
        needed: DescriptorsNeeded,
        /// Descriptors there can be.
        nofile_hard: u64,
        /// Sessions that would fit.
        fitting: usize,
    },
    /// Not a single session fits.
    #[error(
        "one session needs {needed} descriptors; RLIMIT_NOFILE allows {nofile_hard}: raise it, or \
         lower AEGIS_POOL_MAX_IDLE or AEGIS_WORKERS"
    )]
    NothingFits {
        /// Descriptors needed for one session.
        needed: DescriptorsNeeded,
        /// Descriptors there can be.
        nofile_hard: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::ENDPOINTS_MAX;

    const USERS: DescriptorUsers = DescriptorUsers {
        workers: 4,
        listeners: 2,
        pool_conns: 64 * 6,
        kubernetes: 0,
        names: 0,
        checks: false,
        control: false,
    };
    /// 4 × (5 + 2 + 2 × 16 + 16) + 32 + 32 + 3 + 64. All pools together may come to hold 64 × 6.
    const FIXED: u64 = 220 + 131;

    fn sessions(n: usize) -> Option<NonZeroUsize> {
        NonZeroUsize::new(n)
    }

    /// Sessions, and connections of pools: of the process, and of one worker.
    fn capacity_of(requested: Option<NonZeroUsize>, nofile: u64) -> Option<[usize; 3]> {
        let found = capacity(requested, nofile, &USERS).ok();
        found.map(|c| [c.sessions_max.get(), c.pool_conns, c.pool_conns_max])
    }

    fn users(vars: &[(&str, &str)]) -> DescriptorUsers {
        let vars = vars.iter().map(|&(name, value)| (name.to_owned(), value.to_owned()));
        DescriptorUsers::of(&Config::from_vars(vars).unwrap(), 4)
    }

    #[test]
    fn pools_come_to_hold_what_their_limits_allow_the_process() {
        let pools = |max_idle, backends: usize| {
            let backends: Vec<_> = (0..backends).map(|n| format!("10.0.0.1:{}", n + 1)).collect();
            let vars = [
                ("AEGIS_POOL_MAX_IDLE", max_idle),
                ("AEGIS_POOL_MIN_IDLE", "0"),
                ("AEGIS_BACKENDS", &backends.join(",")),
            ];
            users(&vars).pool_conns
        };
        assert_eq!(pools("64", 3), 64 * 6);
        assert_eq!(pools("64", ENDPOINTS_MAX), 4 * 4096, "as much as all workers may hold");
        assert_eq!(pools("4096", 1), 2 * 4096);
        assert_eq!(pools("2", ENDPOINTS_MAX), 2 * 1024);
        let unknown = |max_idle| {
            let kube = ("AEGIS_KUBE_SERVICE", "db");
            users(&[kube, ("AEGIS_POOL_MIN_IDLE", "0"), ("AEGIS_POOL_MAX_IDLE", max_idle)])
        };
        assert_eq!(unknown("64").pool_conns, 4 * 4096, "as many endpoints as there can be");
        assert_eq!(unknown("3").pool_conns, 3 * 1024);
        assert_eq!(unknown("0").pool_conns, 0);
    }

    #[test]
    fn what_is_reserved_counts_over_all_routes() {
        let three = users(&[
            ("AEGIS_ROUTES", "orders,cache,stock"),
            ("AEGIS_ORDERS__LISTEN", "127.0.0.1:1,[::1]:1"),
            ("AEGIS_CACHE__LISTEN", "127.0.0.1:2"),
            ("AEGIS_STOCK__LISTEN", "127.0.0.1:3"),
            ("AEGIS_POOL_MAX_IDLE", "8"),
            ("AEGIS_CACHE__POOL_MAX_IDLE", "4"),
            ("AEGIS_BACKENDS", "10.0.0.1:1,db:1"),
            ("AEGIS_STOCK__BACKENDS", "a:1,b:1,c:1"),
            ("AEGIS_ORDERS__DISCOVERY", "kubernetes"),
            ("AEGIS_ORDERS__KUBE_SERVICE", "orders"),
            ("AEGIS_ORDERS__POOL_MIN_IDLE", "0"),
            ("AEGIS_ORDERS__POOL_MAX_IDLE", "1"),
        ]);
        assert_eq!((three.listeners, three.kubernetes, three.names), (4, 1, 4));
        assert_eq!(three.pool_conns, 1024 + 4 * 2 * 9 + 8 * 2 * 24);
        let many = users(&[
            ("AEGIS_ROUTES", "a,b"),
            ("AEGIS_LISTEN", "127.0.0.1:0"),
            ("AEGIS_POOL_MAX_IDLE", "4096"),
        ]);
        assert_eq!(many.pool_conns, 4 * POOL_CONNS_MAX, "of four workers");
    }

    #[test]
    fn endpoints_from_kubernetes_need_connections_to_its_api() {
        let users = DescriptorUsers { kubernetes: 1, ..USERS };
        let needed = |users| descriptors_needed(0, 0, users).control;
        assert_eq!(needed(&users), needed(&USERS) + 16);
        assert_eq!(needed(&DescriptorUsers { names: 100, ..USERS }), needed(&USERS) + 200);
        assert_eq!(needed(&DescriptorUsers { checks: true, ..USERS }), needed(&USERS) + 64);
        assert_eq!(needed(&DescriptorUsers { control: true, ..USERS }), needed(&USERS) + 35);
    }

    #[test]
    fn auto_takes_what_fits_up_to_the_cap_and_leaves_pools_half_of_what_is_short() {
        let plenty = FIXED + 384;
        assert_eq!(capacity_of(None, u64::MAX), Some([SESSIONS_AUTO_MAX, 384, 384]));
        assert_eq!(capacity_of(None, plenty + 20_000), Some([SESSIONS_AUTO_MAX, 384, 384]));
        assert_eq!(capacity_of(None, plenty + 384), Some([192, 384, 384]));
        assert_eq!(capacity_of(None, plenty), Some([96, 192, 48]), "half and half");
        assert_eq!(capacity_of(None, FIXED + 64 + 2), Some([1, 64, 16]), "the least");
    }

    #[test]
    fn pools_cost_the_same_however_many_workers_share_them() {
        let nofile = 20_000;
        for workers in [1, 2, 32] {
            let users = DescriptorUsers { workers, ..USERS };
            let left = nofile - descriptors_needed(0, 0, &users).total() - 384;
            let found = capacity(None, nofile, &users).unwrap();
            assert_eq!((found.pool_conns, found.pool_conns_max), (384, 384), "{workers} workers");
            assert_eq!(found.sessions_max.get() as u64, left / 2, "{workers} workers");
        }
    }

    #[test]
    fn all_workers_together_hold_no_more_than_is_reserved() {
        for nofile in (FIXED + 66..FIXED + 2000).step_by(7) {
            for wanted in [0, 10, 63, 64, 65, 384, 20_000] {
                let users = DescriptorUsers { pool_conns: wanted, ..USERS };
                let found = capacity(None, nofile, &users).unwrap();
                let held = wanted.min(users.workers * found.pool_conns_max);
                let needed = descriptors_needed(found.sessions_max.get(), held as u64, &users);
                assert!(needed.total() <= nofile, "{wanted}: {needed} of {nofile}");
                assert_eq!(held, found.pool_conns, "{wanted} of {nofile}");
            }
        }
    }

    #[test]
    fn a_request_is_granted_in_full_or_refused_with_the_sum() {
        let request = sessions(20_000);
        assert_eq!(capacity_of(request, FIXED + 40_000 + 384), Some([20_000, 384, 384]));
        assert_eq!(capacity_of(request, FIXED + 40_000 + 383), Some([20_000, 380, 95]));
        assert_eq!(capacity_of(request, FIXED + 40_000 + 64), Some([20_000, 64, 16]));
        let error = capacity(request, FIXED + 40_000 + 63, &USERS).unwrap_err();
        assert_eq!(
            error.to_string(),
            "AEGIS_MAX_SESSIONS=20000 needs 40415 = 40000 for sessions + 64 for pools + 220 for \
             workers + 32 for admin connections + 32 for control + 3 standard + 64 slack \
             descriptors; RLIMIT_NOFILE allows 40414, which is enough for 19999 sessions"
        );
    }

    #[test]
    fn a_limit_below_the_needs_of_one_session_is_refused() {
        for nofile in [0, FIXED, FIXED + 64 + 1] {
            for requested in [None, sessions(1)] {
                let error = capacity(requested, nofile, &USERS).unwrap_err();
                assert!(matches!(error, CapacityError::NothingFits { .. }), "{error}");
                let needs = format!("needs {} =", FIXED + 64 + 2);
                assert!(error.to_string().contains(&needs), "{error}");
            }
        }
    }

    #[test]
    fn the_soft_limit_reaches_the_hard_one() {
        let raised = raise_nofile();
        assert_eq!(Limit::Descriptors.of_this_process().unwrap(), [raised; 2]);
        assert_eq!(nofile_in_proc(), Some([raised; 2]));
    }

    #[test]
    fn a_limit_is_raised_as_far_as_the_kernel_goes_along() {
        let raised = |soft, hard, granted, allowed| {
            let set = |to: u64| if to <= allowed { Ok(()) } else { Err(Errno::PERM) };
            raise(soft, hard, || granted, set)
        };
        assert_eq!(raised(1024, 5000, Some(9000), 9000), Ok(5000));
        assert_eq!(raised(5000, 5000, Some(9000), 0), Ok(5000), "there is nothing to raise");
        assert_eq!(raised(1024, 5000, Some(3000), 3000), Ok(3000), "`fs.nr_open` was lowered");
        for granted in [None, Some(512), Some(3000), Some(9000)] {
            assert_eq!(raised(1024, 5000, granted, 0), Err(Errno::PERM), "a filter denies it");
        }
    }
}
