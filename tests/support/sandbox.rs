//! What a proxy under test may not do, or sees in place of the system's: its user, its limits, failing
//! system calls, its network, its hosts file.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::net::IpAddr;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{LazyLock, Once};

use rustix::process::{Resource, Rlimit, geteuid, getrlimit, setrlimit};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};
use tempfile::NamedTempFile;

use super::say;

/// Whom the proxy runs as in its image, and here where the tests run as root: what works for root
/// alone does not work in a pod.
pub const UNPRIVILEGED: u32 = 65532;

/// Whether the tests can, and so do, start proxies as [`UNPRIVILEGED`].
pub fn can_drop_privileges() -> bool {
    static CAN: LazyLock<bool> = LazyLock::new(|| {
        if !geteuid().is_root() {
            return false;
        }
        let closed = closed_to_unprivileged(Path::new(&super::proxy::binary()));
        if let Some(path) = &closed {
            let path = path.display();
            say(&format!(
                "SKIPPED: without privileges: user {UNPRIVILEGED} may not pass {path}, so the tests \
                 start proxies as root"
            ));
        }
        closed.is_none()
    });
    *CAN
}

/// The first part of the binary's path that its user cannot pass.
fn closed_to_unprivileged(binary: &Path) -> Option<PathBuf> {
    let binary = fs::canonicalize(binary).unwrap();
    let closed = |path: &&Path| fs::metadata(path).unwrap().permissions().mode() & 0o001 == 0;
    binary.ancestors().find(closed).map(Path::to_owned)
}

/// Gives a file or a folder to the user whom proxies run as.
pub fn hand_over(path: &Path) {
    if can_drop_privileges() {
        chown(path, Some(UNPRIVILEGED), Some(UNPRIVILEGED)).unwrap();
    }
}

/// A system call that is to fail.
#[derive(Clone, Copy)]
pub(super) struct Denied {
    pub(super) syscall: i64,
    pub(super) errno: i32,
    pub(super) argument: Option<(u8, u64)>,
}

/// Runs the words behind it as a pod would: no user of the host, no groups, no capabilities.
pub fn as_unprivileged(id: u32) -> Vec<OsString> {
    let id = id.to_string();
    let words = ["setpriv", "--reuid", &id, "--regid", &id, "--clear-groups", "--inh-caps=-all"];
    let more = ["--bounding-set=-all", "--no-new-privs"];
    words.into_iter().chain(more).map(Into::into).collect()
}

/// Whether a test may give a process a network of its own, and set it up so.
pub fn can_have_network(script: &str) -> bool {
    let mut unshare = Command::new("unshare");
    let can = unshare.args(["--net", "sh", "-c", script]).stderr(Stdio::null());
    can.status().is_ok_and(|status| status.success())
}

/// A hosts file of a proxy's own, which the test may change: see [`Builder::hosts`].
pub struct Hosts(pub(super) NamedTempFile);

impl Hosts {
    /// An empty one; `None` where the test may not give a process its own.
    pub fn new() -> Option<Self> {
        let can = Command::new("unshare").args(["--mount", "true"]).stderr(Stdio::null()).status();
        can.is_ok_and(|status| status.success()).then(|| {
            let file = NamedTempFile::new().unwrap();
            hand_over(file.path());
            Self(file)
        })
    }

    /// Makes each name stand for its addresses.
    pub fn set(&self, entries: &[(&str, &[IpAddr])]) {
        let lines = entries.iter().flat_map(|(name, addresses)| {
            addresses.iter().map(move |address| format!("{address} {name}\n"))
        });
        // In place, since the file is mounted, and never shorter: who reads meanwhile sees the old
        // or the new lines.
        let text: String = lines.collect();
        let len = fs::metadata(self.0.path()).unwrap().len().max(4096);
        let text = format!("{text:len$}", len = usize::try_from(len).unwrap());
        fs::OpenOptions::new()
            .write(true)
            .open(self.0.path())
            .unwrap()
            .write_all(text.as_bytes())
            .unwrap();
    }
}

/// A filter under which one system call fails.
pub(super) fn denying(denied: Denied) -> BpfProgram {
    let condition = |(at, value)| {
        SeccompCondition::new(at, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value).unwrap()
    };
    let rule = denied.argument.map(|argument| SeccompRule::new(vec![condition(argument)]).unwrap());
    let rules = BTreeMap::from([(denied.syscall, rule.into_iter().collect())]);
    let denied = SeccompAction::Errno(denied.errno.cast_unsigned());
    let architecture = std::env::consts::ARCH.try_into().unwrap();
    SeccompFilter::new(rules, SeccompAction::Allow, denied, architecture)
        .unwrap()
        .try_into()
        .unwrap()
}

/// Raises the soft limit to the hard one, for this process and its children.
pub(super) fn raise_descriptor_limit() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let maximum = getrlimit(Resource::Nofile).maximum;
        setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    });
}
