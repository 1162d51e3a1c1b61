//! The proxy as a child process: configured by its environment, watched through its log, its
//! admin port and `/proc`.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU16, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};
use serde_json::Value;

use super::kube_api::KubeApi;
use super::metrics::{DISCOVERY_ENDPOINTS, Labels, Metrics};
use super::sandbox::{
    Denied, Hosts, UNPRIVILEGED, as_unprivileged, can_drop_privileges, denying,
    raise_descriptor_limit,
};
use super::{Io, PATIENCE, client, eventually, timed};

/// How a proxy is to be started.
#[derive(Clone, Default)]
pub struct Builder {
    environment: BTreeMap<String, String>,
    arguments: Vec<&'static str>,
    descriptors_max: Option<u64>,
    memory_locked: Option<u32>,
    log: Option<Arc<OwnedFd>>,
    outputs_closed: bool,
    denied: Option<Denied>,
    mounts: Vec<(PathBuf, &'static str)>,
    network: Option<&'static str>,
}

/// What it logs when a drain begins, after the delay.
pub const LEAVING: &str = "draining: sessions finish, still accepting until they have";

/// What its lines on [`Proxy::log_problems`] are known by.
const DIAGNOSIS: &str = "\"target\":\"aegis::control::diagnosis\"";

/// Another build, such as the one in the image, can be put to the same tests.
pub fn binary() -> String {
    std::env::var("AEGIS_E2E_BINARY")
        .unwrap_or_else(|_| env!("CARGO_BIN_EXE_aegis-proxy").to_owned())
}

impl Builder {
    /// Nothing set at all.
    pub fn bare() -> Self {
        timed();
        Self::default()
    }

    /// What the tests share: two workers, free ports on the loopback interface, a log to parse,
    /// and no delay before draining.
    pub fn on(io: Io) -> Self {
        Self::bare()
            .set("AEGIS_IO", io.name())
            .set("AEGIS_LISTEN", "127.0.0.1:0")
            .set("AEGIS_ADMIN", "127.0.0.1:0")
            .set("AEGIS_WORKERS", "2")
            .set("AEGIS_PIN", "off")
            .set("AEGIS_LOG_FORMAT", "json")
            .set("AEGIS_DRAIN_DELAY", "0s")
    }

    pub fn backends(self, addresses: &[SocketAddr]) -> Self {
        let list: Vec<_> = addresses.iter().map(SocketAddr::to_string).collect();
        self.set("AEGIS_BACKENDS", list.join(","))
    }

    pub fn set(mut self, variable: &str, value: impl Into<String>) -> Self {
        self.environment.insert(variable.to_owned(), value.into());
        self
    }

    /// What is spoken, and how long a client has a connection.
    pub fn protocol(self, protocol: &str, pool_mode: &str) -> Self {
        self.set("AEGIS_PROTOCOL", protocol).set("AEGIS_POOL_MODE", pool_mode)
    }

    /// The size of the pools, for each worker and endpoint. The number of workers is to be set
    /// before.
    pub fn pool(self, min_idle: u64, max_idle: u64) -> Self {
        let workers = self.environment.get("AEGIS_WORKERS").map_or(1, |n| n.parse().unwrap());
        self.set("AEGIS_POOL_MIN_IDLE", (workers * min_idle).to_string())
            .set("AEGIS_POOL_MAX_IDLE", (workers * max_idle).to_string())
    }

    pub fn without_pool(self) -> Self {
        self.pool(0, 0)
    }

    /// Finds its endpoints by the Service `chronos` of this API.
    pub fn kubernetes(self, api: &KubeApi) -> Self {
        self.set("KUBECONFIG", api.kubeconfig()).set("AEGIS_KUBE_SERVICE", "chronos")
    }

    /// Has its log go there, unseen by the test. As no log says where it listens then, it has
    /// addresses of its own: of those of the loopback interface there are enough.
    pub fn log_to(mut self, log: impl Into<OwnedFd>) -> Self {
        static NEXT: AtomicU16 = AtomicU16::new(1);
        let [_, _, high, low] = std::process::id().to_be_bytes();
        let own = [127, 64 | (high & 63), low, NEXT.fetch_add(1, Relaxed) as u8];
        let [address, admin] = [8081, 8082].map(|port| SocketAddr::from((own, port)));
        self.log = Some(Arc::new(log.into()));
        self.set("AEGIS_LISTEN", address.to_string()).set("AEGIS_ADMIN", admin.to_string())
    }

    /// Starts it without a standard output and error at all, where [`Builder::log_to`] is called too.
    pub fn outputs_closed(mut self) -> Self {
        self.outputs_closed = true;
        self
    }

    pub fn argument(mut self, argument: &'static str) -> Self {
        self.arguments.push(argument);
        self
    }

    /// Limits how many descriptors the process may have, hard and soft.
    pub fn descriptors_max(mut self, max: u64) -> Self {
        self.descriptors_max = Some(max);
        self
    }

    /// Limits how many KiB the kernel may lock for the process, and runs it as a user of its own, for
    /// that is for all of a user's. Only where tests can drop privileges.
    pub fn memory_locked_max(mut self, kib: u32) -> Self {
        self.memory_locked = Some(kib);
        self
    }

    /// Makes a system call fail, as the seccomp profiles of container runtimes do.
    pub fn deny(mut self, syscall: i64, errno: i32) -> Self {
        self.denied = Some(Denied { syscall, errno, argument: None });
        self
    }

    /// The same, but only where the argument at this position has this value.
    pub fn deny_where(mut self, syscall: i64, errno: i32, argument: (u8, u64)) -> Self {
        self.denied = Some(Denied { syscall, errno, argument: Some(argument) });
        self
    }

    /// Resolves names by this file in place of the system's hosts file.
    pub fn hosts(self, hosts: &Hosts) -> Self {
        self.mount(hosts.0.path(), "/etc/hosts")
    }

    /// Has one of the system's files be this one. See [`Hosts::new`] for where that can be had.
    pub fn mount(mut self, file: &Path, at: &'static str) -> Self {
        self.mounts.push((file.to_owned(), at));
        self
    }

    /// Runs it in a network of its own, which this script sets up and no test can reach. See
    /// [`can_have_network`].
    pub fn in_network(mut self, script: &'static str) -> Self {
        self.network = Some(script);
        self
    }

    /// Starts the proxy and waits until it is ready.
    pub fn start(self) -> Proxy {
        let proxy = self.launch();
        eventually("/readyz says 200", PATIENCE, || {
            (proxy.get("/readyz").status == 200).then_some(())
        });
        proxy
    }

    /// Starts the proxy and waits until it listens.
    pub fn launch(self) -> Proxy {
        let known = self.log.is_some().then(|| {
            ["AEGIS_LISTEN", "AEGIS_ADMIN"].map(|name| self.environment[name].parse().unwrap())
        });
        let mut proxy = self.begin();
        (proxy.address, proxy.admin) = eventually("the proxy listens", PATIENCE, || {
            let ended = proxy.child.try_wait().unwrap();
            assert!(ended.is_none(), "the proxy ended: {ended:?}");
            if let Some([address, admin]) = known {
                return client::try_connect(admin).is_ok().then_some((address, admin));
            }
            let address = |message| proxy.log.field(message, "address")?.parse().ok();
            Some((address("listening")?, address("admin listening")?))
        });
        proxy
    }

    /// Starts the proxy and waits for nothing: where it listens is not known.
    pub fn begin(self) -> Proxy {
        let mut child = self.spawn();
        let log = Log::default();
        if let Some(errors) = child.stderr.take() {
            let lines = log.clone();
            thread::spawn(move || {
                for line in BufReader::new(errors).lines().map_while(Result::ok) {
                    lines.0.lock().unwrap().push(line);
                }
            });
        }
        let unknown = SocketAddr::from(([0, 0, 0, 0], 0));
        Proxy { child, log, address: unknown, admin: unknown }
    }

    /// Runs the program until it ends by itself.
    pub fn run(self) -> Ended {
        let mut child = Guard(self.spawn());
        let mut output = child.0.stdout.take().unwrap();
        let mut errors = child.0.stderr.take().unwrap();
        // Each has room in its pipe for all that such a run prints.
        let status = eventually("the program ends", PATIENCE, || child.0.try_wait().unwrap());
        let mut ended = Ended { code: status.code(), output: String::new(), errors: String::new() };
        output.read_to_string(&mut ended.output).unwrap();
        errors.read_to_string(&mut ended.errors).unwrap();
        ended
    }

    fn spawn(self) -> Child {
        raise_descriptor_limit();
        let mut words: Vec<OsString> = Vec::new();
        // Each of these runs the words behind it, in its own place.
        for (file, at) in &self.mounts {
            let script = "mount --bind \"$0\" \"$1\" && shift && exec \"$@\"";
            words.extend(["unshare", "--mount", "sh", "-c", script].map(Into::into));
            words.extend([file.into(), (*at).into()]);
        }
        if let Some(script) = self.network {
            let script = format!("{script} && exec \"$0\" \"$@\"");
            words.extend(["unshare", "--net", "sh", "-c", &script].map(Into::into));
        }
        if can_drop_privileges() {
            let alone = self.memory_locked.is_some();
            words.extend(as_unprivileged(UNPRIVILEGED - u32::from(alone)));
        }
        if let Some(max) = self.descriptors_max {
            words.extend(["sh", "-c", "ulimit -n \"$0\" && exec \"$@\""].map(Into::into));
            words.push(max.to_string().into());
        }
        if let Some(kib) = self.memory_locked {
            words.extend(["sh", "-c", "ulimit -l \"$0\" && exec \"$@\""].map(Into::into));
            words.push(kib.to_string().into());
        }
        if self.outputs_closed {
            words.extend(["sh", "-c", "exec \"$0\" \"$@\" 2>&- >&-"].map(Into::into));
        }
        words.push(binary().into());
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]);
        command.args(&self.arguments).env_clear().envs(&self.environment);
        let log = self.log.map(|log| Stdio::from(log.try_clone().unwrap()));
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        command.stderr(log.unwrap_or_else(Stdio::piped));
        if let Some(path) = std::env::var_os("PATH") {
            command.env("PATH", path);
        }
        let Some(denied) = self.denied else { return command.spawn().unwrap() };
        // A filter is for one thread and the processes it starts, so a thread of its own spares
        // both the test and the unsafe code between fork and exec.
        thread::spawn(move || {
            seccompiler::apply_filter(&denying(denied)).unwrap();
            command.spawn().unwrap()
        })
        .join()
        .unwrap()
    }
}

/// A program that has ended.
#[derive(Debug)]
pub struct Ended {
    pub code: Option<i32>,
    pub output: String,
    pub errors: String,
}

/// The answer of the admin port.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: HashMap<String, String>,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body)
            .unwrap_or_else(|error| panic!("{error} in {:?}", self.body))
    }
}

/// A running proxy; killed when dropped.
pub struct Proxy {
    child: Child,
    log: Log,
    address: SocketAddr,
    admin: SocketAddr,
}

impl Proxy {
    /// Where clients connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where clients of a route connect, of several.
    pub fn address_of(&self, route: &str) -> SocketAddr {
        eventually(&format!("the proxy listens for {route}"), PATIENCE, || {
            let lines = self.log.events("listening");
            let line = lines.iter().find(|line| line["route"] == route)?;
            line["address"].as_str()?.parse().ok()
        })
    }

    /// Where it is asked for metrics and probes.
    pub fn admin(&self) -> SocketAddr {
        self.admin
    }

    /// Waits until it knows so many endpoints, and every worker has applied them.
    pub fn wait_for_endpoints(&self, count: u64) {
        self.wait_for(DISCOVERY_ENDPOINTS, &[], |found| found == count);
        eventually("every worker has applied it", PATIENCE, || {
            let backends = self.get("/backends").json();
            let applied = backends["applied_generations"].as_array()?;
            applied.iter().all(|g| *g == backends["generation"]).then_some(())
        });
    }

    /// Waits until nothing holds its start.
    pub fn wait_for_start(&self) {
        eventually("it starts", PATIENCE, || {
            (self.get("/startupz?wait=0").status == 200).then_some(())
        });
    }

    /// A field of the first line of the log with this message.
    pub fn log_field(&self, message: &str, field: &str) -> String {
        eventually(&format!("the log has {message:?} with {field:?}"), PATIENCE, || {
            self.log.field(message, field)
        })
    }

    /// All lines of the log with this message so far.
    pub fn log_events(&self, message: &str) -> Vec<Value> {
        self.log.events(message)
    }

    /// All warnings and errors that it has logged so far, without [`Proxy::log_problems`].
    pub fn log_warnings(&self) -> Vec<String> {
        let lines = self.log.0.lock().unwrap();
        let levels = ["\"level\":\"WARN\"", "\"level\":\"ERROR\""];
        let bad = lines.iter().filter(|line| levels.iter().any(|level| line.contains(level)));
        bad.filter(|line| !line.contains(DIAGNOSIS)).cloned().collect()
    }

    /// What it has found to be wrong so far. A busy machine may be among it in any test.
    pub fn log_problems(&self) -> Vec<Value> {
        let lines = self.log_lines();
        let found = lines.iter().filter(|line| line.contains(DIAGNOSIS));
        found.filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// All lines of the log so far.
    pub fn log_lines(&self) -> Vec<String> {
        self.log.0.lock().unwrap().clone()
    }

    /// The lines of the log at this level so far, without [`Proxy::log_problems`].
    pub fn log_at(&self, level: &str) -> Vec<Value> {
        let lines = self.log_lines();
        let lines = lines.iter().filter(|line| !line.contains(DIAGNOSIS));
        let events = lines.filter_map(|line| serde_json::from_str::<Value>(line).ok());
        events.filter(|event| event["level"] == level).collect()
    }

    /// Asks the admin port.
    pub fn get(&self, path: &str) -> Answer {
        self.try_get(path).unwrap_or_else(|error| panic!("GET {path}: {error}"))
    }

    fn try_get(&self, path: &str) -> std::io::Result<Answer> {
        let mut stream = client::try_connect(self.admin)?;
        // To HTTP/1.0 the answer comes in one piece, and its end is the connection's.
        write!(stream, "GET {path} HTTP/1.0\r\nHost: aegis\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        parse_answer(&text).ok_or_else(|| std::io::Error::other(format!("not HTTP: {text:?}")))
    }

    /// Scrapes the metrics.
    pub fn metrics(&self) -> Metrics {
        let answer = self.get("/metrics");
        assert_eq!(answer.status, 200);
        Metrics::parse(&answer.body)
    }

    /// The sum of the metric's samples with these labels.
    pub fn metric(&self, name: &str, labels: Labels) -> u64 {
        let metrics = self.metrics();
        metrics
            .sum(name, labels)
            .unwrap_or_else(|| panic!("{labels:?} not found: {}", metrics.describe(name)))
    }

    /// Waits until the metric's sum satisfies a condition.
    pub fn wait_for(&self, name: &str, labels: Labels, condition: impl Fn(u64) -> bool) {
        let mut last = None;
        let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            eventually(&format!("{name}{labels:?}"), PATIENCE, || {
                let metrics = last.insert(self.metrics());
                metrics.sum(name, labels).filter(|sum| condition(*sum))
            })
        }));
        if let Err(panic) = found {
            // The last scrape says what was there instead.
            eprintln!("{}", last.map(|metrics| metrics.describe(name)).unwrap_or_default());
            std::panic::resume_unwind(panic);
        }
    }

    /// Waits until the metric has no samples with these labels.
    pub fn wait_for_absence(&self, name: &str, labels: Labels) {
        eventually(&format!("no {name}{labels:?}"), PATIENCE, || {
            self.metrics().sum(name, labels).is_none().then_some(())
        });
    }

    /// The CPU time of the thread of this name.
    pub fn thread_cpu(&self, name: &str) -> Duration {
        let text = fs::read_to_string(self.thread(name).join("schedstat")).unwrap();
        Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
    }

    /// What the kernel tells of the thread of this name: a folder that is called by its number.
    pub fn thread(&self, name: &str) -> PathBuf {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        let named = tasks.map(|task| task.unwrap().path()).find(|task| {
            fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.trim() == name)
        });
        named.unwrap_or_else(|| panic!("no thread is called {name}"))
    }

    /// The names of its threads, those that the kernel runs for it among them.
    pub fn threads(&self) -> Vec<String> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        let names = tasks.map(|task| fs::read_to_string(task.unwrap().path().join("comm")));
        names.flatten().map(|name| name.trim().to_owned()).collect()
    }

    /// Lets it have so many descriptors more than it has open, and no others.
    pub fn limit_descriptors(&self, more: u64) {
        let open = fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap();
        let numbers = open.map(|fd| fd.unwrap().file_name().into_string().unwrap().parse::<u64>());
        let numbers: std::collections::BTreeSet<_> = numbers.map(Result::unwrap).collect();
        // The lowest number that leaves so many free below it.
        let current = (0..1 << 20)
            .find(|&limit| limit - numbers.range(..limit).count() as u64 == more)
            .unwrap();
        self.limit("nofile", Resource::Nofile, current);
    }

    /// Lets it write no byte more to any file.
    pub fn limit_file_size(&self) {
        self.limit("fsize", Resource::Fsize, 0);
    }

    fn limit(&self, name: &str, resource: Resource, max: u64) {
        if can_drop_privileges() {
            // Even root may limit only what runs as itself.
            let mut words = as_unprivileged(UNPRIVILEGED);
            words.extend(["prlimit", "--pid", &self.id().to_string()].map(Into::into));
            words.push(format!("--{name}={max}").into());
            assert!(Command::new(&words[0]).args(&words[1..]).status().unwrap().success());
        } else {
            let limit = Rlimit { current: Some(max), maximum: Some(max) };
            prlimit(Some(Pid::from_child(&self.child)), resource, limit).unwrap();
        }
    }

    /// The number of the process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    pub fn terminate(&self) {
        self.signal(Signal::TERM);
    }

    /// How the process has ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Waits until the process has ended.
    pub fn wait(&mut self, within: Duration) -> ExitStatus {
        eventually("the proxy ends", within, || self.ended())
    }

    /// Waits until the process has ended, and checks that it did so cleanly.
    pub fn wait_clean(&mut self, within: Duration) {
        let status = self.wait(within);
        assert_eq!((status.code(), status.signal()), (Some(0), None));
    }

    /// A value of `/proc/<pid>/<file>` in kB, such as `VmRSS` of `status`.
    pub fn memory_kb(&self, file: &str, field: &str) -> u64 {
        let path = format!("/proc/{}/{file}", self.child.id());
        let text = fs::read_to_string(&path).unwrap();
        let mut lines = text.lines().filter_map(|line| line.split_once(':'));
        let (_, value) = lines
            .find(|(name, _)| *name == field)
            .unwrap_or_else(|| panic!("no {field} in {path}"));
        value.trim().trim_end_matches(" kB").parse().unwrap()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        end(&mut self.child);
        if thread::panicking() {
            eprintln!("the proxy's log:\n{}", self.log.0.lock().unwrap().join("\n"));
        }
    }
}

/// A child that is killed when dropped.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        end(&mut self.0);
    }
}

fn end(child: &mut Child) {
    // Both fail where it has ended and been waited for.
    let _ = child.kill();
    let _ = child.wait();
}

/// The lines that the proxy has logged so far.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    fn field(&self, message: &str, field: &str) -> Option<String> {
        self.events(message).first()?[field].as_str().map(str::to_owned)
    }

    fn events(&self, message: &str) -> Vec<Value> {
        let lines = self.0.lock().unwrap();
        let events = lines.iter().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        events.filter(|event| event["message"] == message).collect()
    }
}

fn parse_answer(text: &str) -> Option<Answer> {
    let (head, body) = text.split_once("\r\n\r\n")?;
    let mut lines = head.lines();
    let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
    let header = |line: &str| {
        let (name, value) = line.split_once(':')?;
        Some((name.to_ascii_lowercase(), value.trim().to_owned()))
    };
    Some(Answer { status, headers: lines.filter_map(header).collect(), body: body.to_owned() })
}
