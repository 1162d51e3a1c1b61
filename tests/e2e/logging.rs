//! Nothing that becomes of the log, or of what else is printed, stops the proxy: its reader leaves or
//! stands still, the disk is full, the descriptor was closed.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, PipeReader, PipeWriter, Read, Write, pipe};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU16, Ordering::Relaxed};
use std::time::{Duration, Instant};

use rustix::pipe::fcntl_setpipe_size;
use rustix::process::{Pid, Signal, geteuid, kill_process};
use serde_json::Value;

use crate::support::backend::Backend;
use crate::support::client::{ask_once, try_connect};
use crate::support::metrics::Metrics;
use crate::support::{Io, PATIENCE, eventually, on_both_drivers};

on_both_drivers![
    sessions_go_on_when_the_logs_reader_has_left,
    sessions_go_on_when_the_disk_is_full,
    sessions_go_on_when_nobody_reads_the_log,
    what_is_read_late_is_in_order_and_says_what_is_missing,
    a_closed_standard_error_is_no_socket,
];

const DROPPED: &str = "aegis_log_lines_dropped_total";

/// The program, without a capability, whose output goes where the test says.
fn program(arguments: &[&str]) -> Command {
    let binary = std::env::var("AEGIS_E2E_BINARY")
        .unwrap_or_else(|_| env!("CARGO_BIN_EXE_aegis-proxy").to_owned());
    let mut command = Command::new(binary);
    command.args(arguments).env_clear().stdin(Stdio::null());
    if geteuid().is_root() {
        command.uid(65532).gid(65532);
    }
    command
}

/// A proxy whose log the test does not follow: its addresses are known beforehand.
struct Unwatched {
    child: Child,
    address: SocketAddr,
    admin: SocketAddr,
}

impl Unwatched {
    fn start(io: Io, backend: &Backend, log: &str, stderr: impl Into<Stdio>) -> Self {
        Self::start_as(program(&[]), io, backend, log, stderr.into())
    }

    fn start_as(mut command: Command, io: Io, backend: &Backend, log: &str, stderr: Stdio) -> Self {
        // Of loopback addresses there are enough for each proxy to have one of its own.
        static NEXT: AtomicU16 = AtomicU16::new(1);
        let [_, _, high, low] = std::process::id().to_be_bytes();
        let own = [127, 64 | (high & 63), low, NEXT.fetch_add(1, Relaxed) as u8];
        let [address, admin] = [8081, 8082].map(|port| SocketAddr::from((own, port)));
        command
            .env("AEGIS_IO", io.name())
            .env("AEGIS_LISTEN", address.to_string())
            .env("AEGIS_ADMIN", admin.to_string())
            .env("AEGIS_BACKENDS", backend.address().to_string())
            .env("AEGIS_WORKERS", "2")
            .env("AEGIS_PIN", "off")
            .env("AEGIS_LOG", log)
            .env("AEGIS_LOG_FORMAT", "json")
            .env("AEGIS_DRAIN_DELAY", "0s")
            .stdout(Stdio::null())
            .stderr(stderr);
        let mut proxy = Self { child: command.spawn().unwrap(), address, admin };
        // What it holds of the pipe is the child's alone from here on.
        drop(command);
        eventually("/readyz says 200", PATIENCE, || {
            assert_eq!(proxy.child.try_wait().unwrap(), None, "the proxy ended");
            proxy.get("/readyz")?.starts_with("HTTP/1.0 200").then_some(())
        });
        proxy
    }

    fn get(&self, path: &str) -> Option<String> {
        let mut stream = try_connect(self.admin).ok()?;
        write!(stream, "GET {path} HTTP/1.0\r\n\r\n").ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        Some(text)
    }

    fn metric(&self, name: &str) -> u64 {
        let answer = self.get("/metrics").expect("/metrics answers");
        let (_, body) = answer.split_once("\r\n\r\n").unwrap();
        Metrics::parse(body).sum(name, &[]).unwrap_or_else(|| panic!("there is no {name}"))
    }

    /// Has sessions, each of which logs something at `aegis=trace`, until so many lines were dropped.
    fn serve_until_dropped(&self, lines: u64) {
        eventually("lines are dropped", PATIENCE, || {
            for _ in 0..100 {
                assert_eq!(ask_once(self.address, "who").unwrap(), "a");
            }
            (self.metric(DROPPED) >= lines).then_some(())
        });
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    fn assert_serves(&self) {
        for _ in 0..10 {
            assert_eq!(ask_once(self.address, "who").unwrap(), "a");
        }
        assert!(self.get("/livez").unwrap().starts_with("HTTP/1.0 200"));
    }

    /// Drains it; it ends by itself and cleanly.
    fn assert_drains(&mut self) {
        self.signal(Signal::TERM);
        let asked = Instant::now();
        let status = eventually("the proxy ends", PATIENCE, || self.child.try_wait().unwrap());
        assert!(status.success(), "{status}");
        // The drain takes some of it, a second is for a log that nobody reads.
        assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
    }
}

impl Drop for Unwatched {
    fn drop(&mut self) {
        // Both fail where it has ended and been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A pipe that is full after a page.
fn narrow_pipe() -> (PipeReader, PipeWriter) {
    let (reader, writer) = pipe().unwrap();
    fcntl_setpipe_size(&writer, 4096).unwrap();
    (reader, writer)
}

fn dev_full() -> File {
    OpenOptions::new().write(true).open("/dev/full").unwrap()
}

fn sessions_go_on_when_the_logs_reader_has_left(io: Io) {
    let backend = Backend::named("a");
    let (reader, writer) = pipe().unwrap();
    let mut proxy = Unwatched::start(io, &backend, "aegis=trace", writer);
    drop(reader);
    proxy.signal(Signal::HUP);
    proxy.serve_until_dropped(100);
    proxy.assert_serves();
    proxy.assert_drains();
}

fn sessions_go_on_when_the_disk_is_full(io: Io) {
    let backend = Backend::named("a");
    let mut proxy = Unwatched::start(io, &backend, "info", dev_full());
    proxy.signal(Signal::HUP);
    proxy.assert_serves();
    assert!(proxy.metric(DROPPED) > 0);
    proxy.assert_drains();
}

fn sessions_go_on_when_nobody_reads_the_log(io: Io) {
    let backend = Backend::named("a");
    let (_reader, writer) = narrow_pipe();
    let mut proxy = Unwatched::start(io, &backend, "aegis=trace", writer);
    proxy.serve_until_dropped(1);
    let memory = resident_kb(proxy.child.id());
    proxy.serve_until_dropped(10_000);
    let more = resident_kb(proxy.child.id()).saturating_sub(memory);
    assert!(more < 2048, "{more} kB more for lines that were dropped");
    proxy.assert_serves();
    proxy.assert_drains();
}

fn what_is_read_late_is_in_order_and_says_what_is_missing(io: Io) {
    let backend = Backend::named("a");
    let (reader, writer) = narrow_pipe();
    let mut proxy = Unwatched::start(io, &backend, "aegis=trace", writer);
    proxy.serve_until_dropped(100);
    let dropped = proxy.metric(DROPPED);
    let mut lines = BufReader::new(reader).lines().map(|line| {
        let line = line.unwrap();
        serde_json::from_str::<Value>(&line).unwrap_or_else(|error| panic!("{error}: {line}"))
    });
    let mut kept = Vec::new();
    let report = loop {
        let line = lines.next().expect("the log goes on");
        if line["message"].as_str().unwrap().starts_with("log lines dropped") {
            break line;
        }
        kept.push(line);
    };
    assert_eq!(report["level"], "WARN");
    // Some more were while that was asked for.
    assert!((dropped..dropped + 100).contains(&report["lines"].as_u64().unwrap()), "{report}");
    // A line has less than half a kilobyte, so that about 2,000 have room in a mebibyte.
    assert!(kept.len() >= 2000, "only {} lines were kept", kept.len());
    for target in ["aegis::worker", "aegis::control"] {
        // Each thread's own lines are in its order; all workers' have one target.
        let times: Vec<_> = kept
            .iter()
            .filter(|line| line["target"].as_str().unwrap().starts_with(target))
            .map(|line| line["timestamp"].as_str().unwrap().to_owned())
            .collect();
        let back = times.windows(2).filter(|pair| pair[0] > pair[1]).count();
        assert!(back * 20 <= times.len(), "{back} of {} {target} are out of order", times.len());
    }
    // What comes from now on is there, down to the last.
    proxy.signal(Signal::TERM);
    let ended = lines.last().unwrap();
    assert_eq!(ended["message"], "drained: every session has finished");
    assert!(proxy.child.wait().unwrap().success());
}

fn a_closed_standard_error_is_no_socket(io: Io) {
    let backend = Backend::named("a");
    let program = program(&[]);
    let mut shell = Command::new("sh");
    shell.args(["-c", "exec \"$0\" 2>&- >&-"]).arg(program.get_program());
    shell.env_clear().stdin(Stdio::null());
    let mut proxy = Unwatched::start_as(shell, io, &backend, "trace", Stdio::null());
    for fd in 0..=2 {
        let target = fs::read_link(format!("/proc/{}/fd/{fd}", proxy.child.id())).unwrap();
        assert_eq!(target.to_str(), Some("/dev/null"), "descriptor {fd}");
    }
    proxy.assert_serves();
    proxy.assert_drains();
}

fn resident_kb(id: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// The last lines before the end are read only after it began.
#[test]
fn the_last_lines_are_written_though_they_are_read_late() {
    let backend = Backend::named("a");
    let (reader, writer) = narrow_pipe();
    let mut proxy = Unwatched::start(Io::Epoll, &backend, "aegis=trace", writer);
    for _ in 0..100 {
        ask_once(proxy.address, "who").unwrap();
    }
    proxy.signal(Signal::TERM);
    eventually("it no longer listens", PATIENCE, || try_connect(proxy.address).err());
    let last = BufReader::new(reader).lines().last().unwrap().unwrap();
    assert!(last.contains("drained: every session has finished"), "{last}");
    assert!(proxy.child.wait().unwrap().success());
}

/// Runs the program until it ends by itself.
fn end_of(mut command: Command) -> ExitStatus {
    let mut child = command.spawn().unwrap();
    drop(command);
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("it does not end");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_reader_of_what_was_asked_for_may_leave() {
    for argument in ["check", "--help", "--version"] {
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        let mut command = program(&[argument]);
        command.stdout(writer).stderr(Stdio::null());
        assert_eq!(end_of(command).code(), Some(0), "{argument}");
    }
}

#[test]
fn what_cannot_be_printed_is_an_error() {
    for argument in ["check", "--help", "--version"] {
        let (mut reader, writer) = pipe().unwrap();
        let mut command = program(&[argument]);
        command.stdout(dev_full()).stderr(writer);
        assert_eq!(end_of(command).code(), Some(1), "{argument}");
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert!(text.starts_with("aegis-proxy: cannot write to standard output: "), "{text}");
    }
}

/// The code tells what is wrong, wherever the message goes.
#[test]
fn an_error_has_its_exit_code_though_its_message_cannot_be_written() {
    let stuck = || {
        let (reader, mut writer) = narrow_pipe();
        writer.write_all(&[b'x'; 4096]).unwrap();
        (Some(reader), Stdio::from(writer))
    };
    let left = || {
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        (None, Stdio::from(writer))
    };
    let full = || (None, Stdio::from(dev_full()));
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    for (name, value, argument, code) in [
        ("AEGIS_WORKERS", "many", None, 78),
        ("AEGIS_WORKERS", "many", Some("check"), 78),
        ("AEGIS_WORKERS", "1", Some("chekc"), 2),
        ("AEGIS_LISTEN", taken.as_str(), None, 1),
    ] {
        let destinations: [&dyn Fn() -> (Option<PipeReader>, Stdio); 3] = [&stuck, &left, &full];
        for destination in destinations {
            let (_reader, stderr) = destination();
            let mut command = program(argument.as_slice());
            command.env("AEGIS_ADMIN", "127.0.0.1:0").env(name, value);
            command.stdout(Stdio::null()).stderr(stderr);
            assert_eq!(end_of(command).code(), Some(code), "{name}={value} {argument:?}");
        }
    }
}
