//! Nothing that becomes of the log, or of what else is printed, stops the proxy: its reader leaves or
//! stands still, the disk is full, the descriptor was closed.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, PipeReader, PipeWriter, Read, Seek, Write, pipe};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::pipe::fcntl_setpipe_size;
use rustix::process::{Signal, geteuid};
use serde_json::Value;

use crate::support::backend::Backend;
use crate::support::client::{ask_once, try_connect};
use crate::support::kube_api::{KubeApi, Slice, host_ip};
use crate::support::ports;
use crate::support::proxy::{Builder, Proxy};
use crate::support::{Io, PATIENCE, eventually, on_both_drivers};

on_both_drivers![
    sessions_go_on_when_the_logs_reader_has_left,
    sessions_go_on_when_the_disk_is_full,
    sessions_go_on_when_the_log_may_grow_no_more,
    sessions_go_on_when_nobody_reads_the_log,
    a_log_read_late_is_in_order_and_says_what_is_missing,
    a_closed_standard_error_is_no_socket,
    a_name_from_outside_begins_no_line,
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

fn on(io: Io, backend: &Backend, log: &str) -> Builder {
    Builder::on(io).backends(&[backend.address()]).set("AEGIS_LOG", log)
}

/// Has sessions, each of which logs something at `aegis=trace`, until so many lines were dropped.
fn serve_until_dropped(proxy: &Proxy, lines: u64) {
    // Some thousand sessions take a while on a busy machine.
    eventually("lines are dropped", 4 * PATIENCE, || {
        for _ in 0..100 {
            assert_eq!(ask_once(proxy.address(), "who").unwrap(), "a");
        }
        (proxy.metric(DROPPED, &[]) >= lines).then_some(())
    });
}

fn assert_serves(proxy: &Proxy) {
    for _ in 0..10 {
        assert_eq!(ask_once(proxy.address(), "who").unwrap(), "a");
    }
    assert_eq!(proxy.get("/livez").status, 200);
}

/// Drains it; it ends by itself and cleanly.
fn assert_drains(mut proxy: Proxy) {
    proxy.terminate();
    let asked = Instant::now();
    proxy.wait_clean(PATIENCE);
    // The drain takes some of it, a second is for a log that nobody reads.
    assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
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
    let proxy = on(io, &backend, "aegis=trace").log_to(writer).start();
    drop(reader);
    proxy.signal(Signal::HUP);
    serve_until_dropped(&proxy, 100);
    assert_serves(&proxy);
    assert_drains(proxy);
}

fn sessions_go_on_when_the_disk_is_full(io: Io) {
    let backend = Backend::named("a");
    let proxy = on(io, &backend, "info").log_to(dev_full()).start();
    proxy.signal(Signal::HUP);
    assert_serves(&proxy);
    assert!(proxy.metric(DROPPED, &[]) > 0);
    assert_drains(proxy);
}

/// The kernel sends `SIGXFSZ` along with the error, which ends whoever does not know it.
fn sessions_go_on_when_the_log_may_grow_no_more(io: Io) {
    let backend = Backend::named("a");
    let mut log = tempfile::tempfile().unwrap();
    let proxy = on(io, &backend, "aegis=trace").log_to(log.try_clone().unwrap()).start();
    assert_serves(&proxy);
    proxy.limit_file_size();
    serve_until_dropped(&proxy, 100);
    assert_drains(proxy);
    let mut text = String::new();
    log.rewind().unwrap();
    log.read_to_string(&mut text).unwrap();
    assert!(text.ends_with('\n') && text.contains("io driver"), "{text}");
}

fn sessions_go_on_when_nobody_reads_the_log(io: Io) {
    let backend = Backend::named("a");
    let (_reader, writer) = narrow_pipe();
    let proxy = on(io, &backend, "aegis=trace").log_to(writer).start();
    serve_until_dropped(&proxy, 1);
    let memory = proxy.memory_kb("status", "VmRSS");
    serve_until_dropped(&proxy, 10_000);
    let more = proxy.memory_kb("status", "VmRSS").saturating_sub(memory);
    assert!(more < 2048, "{more} kB more for lines that were dropped");
    assert_serves(&proxy);
    assert_drains(proxy);
}

fn a_log_read_late_is_in_order_and_says_what_is_missing(io: Io) {
    let backend = Backend::named("a");
    let (reader, writer) = narrow_pipe();
    let mut proxy = on(io, &backend, "aegis=trace").log_to(writer).start();
    serve_until_dropped(&proxy, 100);
    let dropped = proxy.metric(DROPPED, &[]);
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
    proxy.terminate();
    let ended = lines.last().unwrap();
    assert_eq!(ended["message"], "drained: every session has finished");
    proxy.wait_clean(PATIENCE);
}

fn a_closed_standard_error_is_no_socket(io: Io) {
    let backend = Backend::named("a");
    let null = File::options().read(true).write(true).open("/dev/null").unwrap();
    let proxy = on(io, &backend, "trace").log_to(null).outputs_closed().start();
    for fd in 0..=2 {
        let target = fs::read_link(format!("/proc/{}/fd/{fd}", proxy.id())).unwrap();
        assert_eq!(target.to_str(), Some("/dev/null"), "descriptor {fd}");
    }
    assert_serves(&proxy);
    assert_drains(proxy);
}

/// The last lines before the end are read only after it began.
#[test]
fn the_last_lines_are_written_though_they_are_read_late() {
    let backend = Backend::named("a");
    let (reader, writer) = narrow_pipe();
    let mut proxy = on(Io::Epoll, &backend, "aegis=trace").log_to(writer).start();
    for _ in 0..100 {
        ask_once(proxy.address(), "who").unwrap();
    }
    proxy.terminate();
    eventually("it no longer listens", PATIENCE, || try_connect(proxy.address()).err());
    let last = BufReader::new(reader).lines().last().unwrap().unwrap();
    assert!(last.contains("drained: every session has finished"), "{last}");
    proxy.wait_clean(PATIENCE);
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

fn a_name_from_outside_begins_no_line(io: Io) {
    let api = KubeApi::start();
    let closed = ports::unused(host_ip()).port();
    let pod = "db\nforged: all is well\r\n\u{1b}[2J";
    api.slice("a", &Slice::of(closed).with(pod, host_ip()));
    let proxy = Builder::on(io)
        .kubernetes(&api)
        .set("AEGIS_LOG_FORMAT", "text")
        .set("AEGIS_ENDPOINT_WAIT", "0s")
        .begin();
    let address = eventually("it listens", PATIENCE, || {
        let lines = proxy.log_lines();
        let line = lines.iter().find_map(|line| line.split_once(" listening address="))?;
        line.1.split(' ').next()?.parse().ok()
    });
    let told = |line: &String| line.contains("problem: ");
    let lines = eventually("what the endpoint does is logged", PATIENCE, || {
        let _ = ask_once(address, "who");
        let lines = proxy.log_lines();
        lines.iter().any(told).then_some(lines)
    });
    let is_own = |line: &String| line.starts_with("20") && !line.contains(['\r', '\u{1b}']);
    assert!(lines.iter().all(is_own), "{lines:#?}");
}
