//! The tap: what is captured of a client, and what it costs nobody else.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::mem::take;
use std::net::{Shutdown, SocketAddr};
use std::os::unix::fs::{MetadataExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use crate::support::backend::{Backend, reset_on_close};
use crate::support::client::{
    ask, ask_once, connect, expect_echo, read_expected, read_to_end, reset, wait_closed,
};
use crate::support::metrics::SESSIONS_ACTIVE;
use crate::support::pcap::{FIN, RST, Stream};
use crate::support::proxy::{Builder, Ended, Proxy, binary};
use crate::support::sandbox::hand_over;
use crate::support::{Io, PATIENCE, eventually, on_both_drivers, pattern};

on_both_drivers![
    a_client_is_captured_from_its_begin_to_its_end,
    requests_and_what_the_proxy_answers_itself_are_captured,
    a_client_of_http_is_captured_through_its_upgrade,
    bulk_is_captured_whole_and_moved_by_pipe_no_more,
    a_file_is_never_larger_than_asked_for,
    a_reset_is_captured_as_one,
    a_client_of_a_unix_socket_has_an_address_of_no_network,
    the_client_is_chosen_by_route_endpoint_and_number,
    a_drain_ends_a_tap_with_what_there_is,
];

/// A proxy with a control socket, and where files may be.
pub(super) struct Place {
    directory: tempfile::TempDir,
    socket: PathBuf,
}

impl Place {
    pub(super) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        hand_over(directory.path());
        let socket = directory.path().join("control.sock");
        Self { directory, socket }
    }

    pub(super) fn control(&self) -> String {
        format!("unix:{}", self.socket.display())
    }

    pub(super) fn on(&self, io: Io, backends: &[SocketAddr]) -> Builder {
        Builder::on(io).backends(backends).set("AEGIS_CONTROL", self.control())
    }

    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Begins a tap, and returns once clients are waited for.
    fn tap(&self, proxy: &Proxy, arguments: &[&str]) -> Tap {
        let begun = proxy.log_events("tap begins").len();
        let file = self.file(&format!("{begun}.pcap"));
        let mut child = self.command(&file, arguments);
        let mut child = child.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut said = BufReader::new(child.stderr.take().unwrap());
        let mut begins = String::new();
        said.read_line(&mut begins).unwrap();
        assert!(begins.contains("waiting for"), "{begins}");
        Tap { child: Some(child), begins, said, file }
    }

    pub(super) fn command(&self, file: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new(binary());
        command.arg("tap").arg(file).args(arguments).env("AEGIS_CONTROL", self.control());
        command
    }

    /// Runs a tap that comes to nothing; says why.
    fn refused(&self, file: &Path, arguments: &[&str]) -> String {
        let output = self.command(file, arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    }
}

/// A tap that runs.
struct Tap {
    child: Option<Child>,
    begins: String,
    said: BufReader<ChildStderr>,
    file: PathBuf,
}

impl Tap {
    fn ended(&mut self) -> Ended {
        let mut child = self.child.take().unwrap();
        let status = eventually("the tap ends", PATIENCE, || child.try_wait().unwrap());
        let mut ended =
            Ended { code: status.code(), output: String::new(), errors: take(&mut self.begins) };
        child.stdout.unwrap().read_to_string(&mut ended.output).unwrap();
        self.said.read_to_string(&mut ended.errors).unwrap();
        ended
    }

    /// Waits for what it has captured, and for what it says of that.
    fn captured(mut self) -> (Stream, String) {
        let ended = self.ended();
        assert_eq!((ended.code, &*ended.output), (Some(0), ""), "{ended:?}");
        (Stream::read(&fs::read(&self.file).unwrap()), ended.errors)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}

fn tap_ended(proxy: &Proxy) -> Value {
    eventually("the end is logged", PATIENCE, || proxy.log_events("tap ended").pop())
}

/// Reads to the end, then answers in its own words.
fn server_with_last_words() -> Backend {
    Backend::scripted(|mut stream| {
        let asked = read_to_end(stream).unwrap_or_default();
        let _ = stream.write_all(format!("{} bytes\n", asked.len()).as_bytes());
    })
}

fn a_client_is_captured_from_its_begin_to_its_end(io: Io) {
    let (place, backend) = (Place::new(), server_with_last_words());
    let proxy = place.on(io, &[backend.address()]).start();
    let before = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let tap = place.tap(&proxy, &[]);
    let mut client = connect(proxy.address());
    let address = client.local_addr().unwrap();
    client.write_all(b"hello\n").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_to_end(&client).unwrap(), b"6 bytes\n");
    let (stream, said) = tap.captured();
    let (whom, at) = (format!("127.0.0.1:{}", address.port()), backend.address());
    let summary = format!(
        "waiting for the next client\n14 bytes of a client of route default from {whom}, \
         served by {at}; its connection was closed\n"
    );
    assert_eq!(said, summary);
    assert_eq!((stream.client, stream.server), (address, proxy.address()));
    assert_eq!(stream.sent_by(address), b"hello\n");
    assert_eq!(stream.sent_by(proxy.address()), b"6 bytes\n");
    assert_eq!(stream.ends_of(address), [FIN]);
    assert_eq!(stream.ends_of(proxy.address()), [FIN]);
    let after = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let slack = Duration::from_millis(50);
    for packet in &stream.packets {
        assert!(packet.at + slack >= before && packet.at <= after + slack, "{packet:?}");
    }
    let begun = proxy.log_events("tap begins").pop().unwrap();
    assert_eq!((&begun["bytes"], &begun["for_ms"]), (&(1 << 20).into(), &60_000.into()));
    let ended = tap_ended(&proxy);
    assert_eq!((&ended["uid"], &ended["pid"]), (&begun["uid"], &begun["pid"]));
    assert_eq!([&begun["level"], &ended["level"]], ["WARN"; 2], "a terse log has them as well");
    assert!(ended["pid"].as_u64().unwrap() > 0 && ended["worker"].as_u64().unwrap() < 2);
    for (field, value) in [
        ("route", "default".into()),
        ("endpoint", at.to_string().into()),
        ("client", whom.into()),
        ("bytes", Value::from(14)),
        ("why", "its connection was closed".into()),
    ] {
        assert_eq!(ended[field], value, "{field}");
    }
}

fn requests_and_what_the_proxy_answers_itself_are_captured(io: Io) {
    let (place, mut backend) = (Place::new(), Backend::chronos());
    let proxy = place
        .on(io, &[backend.address()])
        .protocol("chronos", "request")
        .set("AEGIS_ENDPOINT_WAIT", "0s")
        .start();
    let tap = place.tap(&proxy, &[]);
    let client = connect(proxy.address());
    let (mut asked, mut told) = (String::new(), String::new());
    let mut talk = |request: &str| {
        let reply = ask(&client, request);
        asked.extend([request, "\n"]);
        told.extend([&reply, "\n"]);
        reply
    };
    talk("PING");
    // Before it was let in, another worker might have let one of these in first.
    let others: Vec<_> = (0..4).map(|_| connect(proxy.address())).collect();
    for at in 0..20 {
        assert_eq!(talk(&format!("SET key-{at} value-{at}")), "OK");
        for (number, other) in others.iter().enumerate() {
            ask(other, &format!("SET secret-{number} {at}"));
        }
        assert_eq!(talk(&format!("GET key-{at}")), format!("value-{at}"));
    }
    backend.kill();
    let error = eventually("the proxy itself answers", PATIENCE, || {
        Some(talk("GET key-1")).filter(|reply| reply.starts_with("ERR"))
    });
    let address = client.local_addr().unwrap();
    drop(client);
    let (stream, said) = tap.captured();
    assert_eq!(String::from_utf8(stream.sent_by(address)).unwrap(), asked);
    let captured = String::from_utf8(stream.sent_by(proxy.address())).unwrap();
    assert!(captured == told && told.contains(&error), "{captured}");
    assert_eq!(stream.ends_of(address), [FIN]);
    assert!(said.contains(&format!("served by {}", backend.address())), "{said}");
}

fn a_client_of_http_is_captured_through_its_upgrade(io: Io) {
    const UPGRADE: &[u8] =
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n";
    const SWITCHED: &[u8] =
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n";
    let backend = Backend::scripted(|mut stream| {
        let mut request = vec![0; UPGRADE.len()];
        if stream.read_exact(&mut request).is_ok() {
            let _ = stream.write_all(SWITCHED);
        }
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = stream.read(&mut bytes) {
            if stream.write_all(&bytes[..count]).is_err() {
                return;
            }
        }
    });
    let place = Place::new();
    let proxy = place.on(io, &[backend.address()]).protocol("http1", "request").start();
    let tap = place.tap(&proxy, &["--bytes", "16m"]);
    let mut client = connect(proxy.address());
    client.write_all(UPGRADE).unwrap();
    read_expected(&client, SWITCHED, 4096).unwrap();
    expect_echo(&client, 3, 2 << 20).unwrap();
    let (stream, _) = tap.captured();
    let bulk = pattern(3, 2 << 20);
    let address = client.local_addr().unwrap();
    assert!(stream.sent_by(address) == [UPGRADE, bulk].concat());
    assert!(stream.sent_by(proxy.address()) == [SWITCHED, bulk].concat());
}

fn bulk_is_captured_whole_and_moved_by_pipe_no_more(io: Io) {
    const LEN: usize = 6 << 20;
    let (place, backend) = (Place::new(), Backend::echo());
    let proxy = place.on(io, &[backend.address()]).start();
    let tap = place.tap(&proxy, &["--bytes", "16m"]);
    let client = connect(proxy.address());
    proxy.wait_for(SESSIONS_ACTIVE, &[], |active| active == 1);
    // Another one at the same time, which is none of it.
    thread::scope(|scope| {
        let other = scope.spawn(|| expect_echo(&connect(proxy.address()), 5, LEN));
        expect_echo(&client, 4, LEN).unwrap();
        other.join().unwrap().unwrap();
    });
    let (stream, said) = tap.captured();
    let address = client.local_addr().unwrap();
    assert!(stream.sent_by(address) == pattern(4, LEN), "{said}");
    assert!(stream.sent_by(proxy.address()) == pattern(4, LEN), "{said}");
}

fn a_file_is_never_larger_than_asked_for(io: Io) {
    let (place, backend) = (Place::new(), Backend::echo());
    let proxy = place.on(io, &[backend.address()]).start();
    for (number, size) in [(0, "4k"), (1, "100000"), (2, "1m")] {
        let tap = place.tap(&proxy, &["--bytes", size]);
        let file = tap.file.clone();
        let client = connect(proxy.address());
        expect_echo(&client, number, 4 << 20).unwrap();
        let (stream, said) = tap.captured();
        assert!(said.contains("there was no room for more"), "{said}");
        let asked = [4 << 10, 100_000, 1 << 20][number];
        let len = fs::metadata(file).unwrap().len();
        // Packets are counted with the longer header of IPv6, and a few more that might have come.
        assert!(len <= asked && len + 600 + asked / 200 > asked, "{len} of {asked}");
        for side in [client.local_addr().unwrap(), proxy.address()] {
            assert!(pattern(number, 4 << 20).starts_with(&stream.sent_by(side)));
            assert_eq!(stream.ends_of(side), [0; 0]);
        }
    }
}

fn a_reset_is_captured_as_one(io: Io) {
    let place = Place::new();
    let backend = Backend::scripted(|stream| {
        let mut line = [0; 6];
        let mut reader = stream;
        if reader.read_exact(&mut line).is_ok() && &line == b"reset\n" {
            reset_on_close(stream);
        } else {
            let _ = reader.read(&mut line);
        }
    });
    let proxy = place.on(io, &[backend.address()]).start();
    let tap = place.tap(&proxy, &[]);
    let mut client = connect(proxy.address());
    client.write_all(b"reset\n").unwrap();
    wait_closed(&client).unwrap();
    let (stream, _) = tap.captured();
    assert_eq!(stream.sent_by(client.local_addr().unwrap()), b"reset\n");
    assert_eq!(stream.ends_of(proxy.address()), [RST]);
    let tap = place.tap(&proxy, &[]);
    let mut client = connect(proxy.address());
    let address = client.local_addr().unwrap();
    client.write_all(b"other\n").unwrap();
    proxy.wait_for("aegis_bytes_total", &[("direction", "to_backend")], |bytes| bytes == 12);
    reset(client);
    let (stream, _) = tap.captured();
    assert_eq!(stream.sent_by(address), b"other\n");
    assert_eq!(stream.ends_of(address), [RST]);
}

fn a_client_of_a_unix_socket_has_an_address_of_no_network(io: Io) {
    let (place, backend) = (Place::new(), Backend::named("a"));
    let path = place.file("db.sock");
    let listen = format!("127.0.0.1:0,unix:{}", path.display());
    let proxy = place.on(io, &[backend.address()]).set("AEGIS_LISTEN", listen).start();
    let tap = place.tap(&proxy, &[]);
    let mut client = UnixStream::connect(path).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.write_all(b"who\n").unwrap();
    client.read_exact(&mut [0; 2]).unwrap();
    drop(client);
    let (stream, said) = tap.captured();
    assert!(said.contains("6 bytes of a client of route default, served by"), "{said}");
    let addresses = ["192.0.2.1:1", "192.0.2.2:2"].map(|address| address.parse().unwrap());
    assert_eq!([stream.client, stream.server], addresses);
    assert_eq!(stream.sent_by(stream.client), b"who\n");
    assert_eq!(stream.sent_by(stream.server), b"a\n");
}

fn the_client_is_chosen_by_route_endpoint_and_number(io: Io) {
    let place = Place::new();
    let [a, b, c] = ["a", "b", "c"].map(Backend::named);
    let proxy = Builder::on(io)
        .set("AEGIS_CONTROL", place.control())
        .set("AEGIS_ROUTES", "orders,cache")
        .set("AEGIS_ORDERS__BACKENDS", a.address().to_string())
        .set("AEGIS_CACHE__BACKENDS", format!("{},{}", b.address(), c.address()))
        .set("AEGIS_CACHE__BALANCE", "round_robin")
        .start();
    let once = |route: &str, what: &str| ask_once(proxy.address_of(route), what).unwrap();
    // By its route, and the third of it.
    let tap = place.tap(&proxy, &["--route", "cache", "--nth", "3"]);
    for what in ["1", "2", "3", "4"] {
        once("orders", "orders");
        once("cache", what);
    }
    let (stream, said) = tap.captured();
    assert!(said.starts_with("waiting for client 3 from now on of route cache\n"), "{said}");
    assert_eq!(stream.server, proxy.address_of("cache"));
    assert_eq!(stream.sent_by(stream.client), b"3\n");
    // By its endpoint, which is not the first one's.
    for backend in [&b, &c, &a] {
        let endpoint = backend.address().to_string();
        let tap = place.tap(&proxy, &["--endpoint", &endpoint]);
        let names: Vec<_> = (0..8).map(|_| once("cache", "who")).collect();
        assert!(names.contains(&"b".to_owned()) && names.contains(&"c".to_owned()));
        once("orders", "who");
        let (stream, said) = tap.captured();
        let name = ask(&connect(backend.address()), "who");
        assert_eq!(stream.sent_by(stream.server), format!("{name}\n").as_bytes(), "{said}");
        assert!(said.contains(&format!("served by {endpoint};")), "{said}");
    }
}

fn a_drain_ends_a_tap_with_what_there_is(io: Io) {
    let (place, backend) = (Place::new(), Backend::named("a"));
    let proxy = place.on(io, &[backend.address()]).start();
    let tap = place.tap(&proxy, &[]);
    let client = connect(proxy.address());
    assert_eq!(ask(&client, "before"), "a");
    proxy.terminate();
    let (stream, said) = tap.captured();
    assert!(said.ends_with("; the proxy drains\n"), "{said}");
    assert_eq!(stream.sent_by(client.local_addr().unwrap()), b"before\n");
    assert_eq!(ask(&client, "after"), "a");
    let why = place.refused(&place.file("late"), &[]);
    assert!(why.contains("tap: the proxy drains: ask one that does not"), "{why}");
    drop(client);
}

#[test]
fn a_drain_ends_the_wait_for_a_client() {
    let (place, backend) = (Place::new(), Backend::named("a"));
    let proxy = place.on(Io::Epoll, &[backend.address()]).start();
    let client = connect(proxy.address());
    assert_eq!(ask(&client, "who"), "a");
    let mut tap = place.tap(&proxy, &[]);
    proxy.terminate();
    let ended = tap.ended();
    assert_eq!(ended.code, Some(1));
    assert!(ended.errors.contains("the next client has not come: the proxy drains"), "{ended:?}");
    assert!(!tap.file.exists());
}

#[test]
fn what_cannot_be_captured_is_refused_with_what_to_do() {
    let (place, backend) = (Place::new(), Backend::named("a"));
    let file = place.file("file");
    let none = Command::new(binary()).arg("tap").arg(&file).env_remove("AEGIS_CONTROL").output();
    let none = String::from_utf8(none.unwrap().stderr).unwrap();
    let what = "tap: no control socket is configured: start the proxy with AEGIS_CONTROL=unix:";
    assert!(none.contains(what), "{none}");
    let proxy = place.on(Io::Epoll, &[backend.address()]).start();
    for (arguments, why) in [
        (&["--route", "orders"][..], "there is no route \"orders\", only: default"),
        (
            &["--endpoint", "x"],
            "there is no endpoint \"x\" now: `aegis-proxy endpoints` lists them",
        ),
        (&["--bytes", "1k"], "--bytes is to be from 4096 to 16777216"),
        (&["--bytes", "17m"], "--bytes is to be from 4096 to 16777216"),
        (&["--for", "2h"], "--for is to be from 1ms to 1h"),
        (&["--for", "0s"], "--for is to be from 1ms to 1h"),
    ] {
        let said = place.refused(&file, arguments);
        assert!(said.contains(why), "{said}");
    }
    // Where something is already, nothing is written, nor through a link, and nobody is waited for.
    fs::write(&file, "precious").unwrap();
    let link = place.file("link");
    symlink(place.file("elsewhere"), &link).unwrap();
    for path in [&file, &link] {
        assert!(place.refused(path, &[]).contains("File exists"));
    }
    assert_eq!(fs::read(&file).unwrap(), b"precious");
    assert!(place.refused(Path::new("/no/such/place"), &[]).contains("No such file"));
    assert_eq!(proxy.log_events("tap begins").len(), 0, "none of them began");
    // Nobody comes; who is there already does not count.
    let client = connect(proxy.address());
    ask(&client, "who");
    let never = place.file("never");
    let said = place.refused(&never, &["--for", "50ms", "--route", "default"]);
    let why = "the next client of route default has not come: the time is over; \
               clients that are connected already are not captured";
    assert!(said.contains(why), "{said}");
    assert!(!never.exists());
    let ended = tap_ended(&proxy);
    assert_eq!((&ended["bytes"], &ended["why"]), (&0.into(), &"the time is over".into()));
}

#[test]
fn a_tap_whose_time_is_over_shows_what_there_is() {
    let (place, backend) = (Place::new(), Backend::named("a"));
    let proxy = place.on(Io::Epoll, &[backend.address()]).start();
    let tap = place.tap(&proxy, &["--for", "500ms"]);
    let client = connect(proxy.address());
    assert_eq!(ask(&client, "who"), "a");
    let file = tap.file.clone();
    let (stream, said) = tap.captured();
    assert!(said.ends_with("; the time is over\n"), "{said}");
    assert_eq!(stream.sent_by(proxy.address()), b"a\n");
    assert_eq!(fs::metadata(file).unwrap().mode() & 0o777, 0o600);
    // The session goes on.
    assert_eq!(ask(&client, "who"), "a");
}

#[test]
fn one_tap_runs_at_a_time_and_ends_with_who_asked_for_it() {
    let (place, backend) = (Place::new(), Backend::named("a"));
    let proxy = place.on(Io::Epoll, &[backend.address()]).start();
    for has_client in [false, true] {
        let tap = place.tap(&proxy, &[]);
        let client = has_client.then(|| connect(proxy.address()));
        if let Some(client) = &client {
            ask(client, "who");
        }
        let said = place.refused(&place.file("second"), &[]);
        let why = "tap: another tap runs, and there is one at a time: try again";
        assert!(said.contains(why), "{said}");
        let (file, ends) = (tap.file.clone(), proxy.log_events("tap ended").len());
        drop(tap);
        let ended = eventually("it has ended", PATIENCE, || {
            let mut events = proxy.log_events("tap ended");
            (events.len() > ends).then(|| events.pop()).flatten()
        });
        assert_eq!(ended["why"], "who asked for it left");
        assert_eq!(ended["bytes"], if has_client { 6 } else { 0 });
        assert!(!file.exists(), "nothing is left behind");
        if let Some(client) = &client {
            ask(client, "who");
        }
    }
    let tap = place.tap(&proxy, &[]);
    ask_once(proxy.address(), "again").unwrap();
    let (stream, _) = tap.captured();
    assert_eq!(stream.sent_by(stream.client), b"again\n");
}

#[test]
fn who_gets_no_endpoint_is_not_the_client_of_one() {
    let place = Place::new();
    let backend = Backend::scripted(|mut stream| {
        let lines = BufReader::new(stream).lines().map_while(Result::ok);
        lines.take_while(|_| stream.write_all(b"OK\n").is_ok()).for_each(drop);
    });
    let proxy = place
        .on(Io::Epoll, &[backend.address()])
        .protocol("chronos", "request")
        .set("AEGIS_LINE_MAX", "16384")
        .start();
    let endpoint = backend.address().to_string();
    // One that asks for nothing, and one whose request is larger than all of the file.
    let tap = place.tap(&proxy, &["--endpoint", &endpoint, "--bytes", "4k"]);
    drop(connect(proxy.address()));
    proxy.wait_for("aegis_sessions_closed_total", &[], |closed| closed == 1);
    let client = connect(proxy.address());
    let value = "v".repeat(6000);
    assert_eq!(ask(&client, &format!("SET key {value}")), "OK");
    let (stream, said) = tap.captured();
    assert!(said.contains("; there was no room for more"), "{said}");
    assert_eq!(stream.client, client.local_addr().unwrap());
    assert!(stream.sent_by(stream.client).starts_with(b"SET key vvv"));
    // While it is not known, nothing is shown.
    let mut tap = place.tap(&proxy, &["--endpoint", &endpoint, "--for", "1s"]);
    let client = connect(proxy.address());
    let ended = tap.ended();
    assert!(ended.errors.contains("has not come: the time is over"), "{ended:?}");
    assert!(ended.code == Some(1) && !tap.file.exists());
    drop(client);
}

/// The proxy finds out by the reply to the command, when the tap has begun already.
#[test]
fn a_tap_ends_with_who_takes_no_reply() {
    const REQUEST: &[u8] = b"{\"command\":\"tap\",\"route\":null,\"endpoint\":null,\"passes\":0,\
        \"bytes\":4096,\"for_ms\":60000}\n";
    let (place, backend) = (Place::new(), Backend::named("a"));
    let proxy = place.on(Io::Epoll, &[backend.address()]).start();
    let mut asker = UnixStream::connect(&place.socket).unwrap();
    asker.shutdown(Shutdown::Read).unwrap();
    asker.write_all(REQUEST).unwrap();
    eventually("the tap has begun", PATIENCE, || proxy.log_events("tap begins").pop());
    drop(asker);
    assert_eq!(tap_ended(&proxy)["why"], "who asked for it left");
    let tap = place.tap(&proxy, &[]);
    ask_once(proxy.address(), "who").unwrap();
    let (stream, _) = tap.captured();
    assert_eq!(stream.sent_by(stream.client), b"who\n");
}

#[test]
fn what_cannot_be_written_whole_is_an_error_and_no_file() {
    const TOO_MUCH: &str = "ulimit -f 8; exec \"$0\" \"$@\"";
    let (place, backend) = (Place::new(), Backend::echo());
    let proxy = place.on(Io::Epoll, &[backend.address()]).start();
    let file = place.file("part");
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut limited = Command::new("sh");
    limited.args(["-c", TOO_MUCH]).arg(binary()).arg("tap").arg(&file);
    let mut standard = Command::new(binary());
    standard.arg("tap").stdout(full);
    for (command, bytes, why) in [(limited, 50_000, "File too large"), (standard, 0, "No space")] {
        let mut command = command;
        let begun = proxy.log_events("tap begins").len();
        let child = command.env("AEGIS_CONTROL", place.control()).stderr(Stdio::piped());
        let child = child.spawn().unwrap();
        eventually("the tap has begun", PATIENCE, || {
            (proxy.log_events("tap begins").len() > begun).then_some(())
        });
        expect_echo(&connect(proxy.address()), 1, bytes).unwrap();
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(1) && said.contains(why), "{said}");
        assert!(!file.exists());
    }
}

#[test]
fn a_capture_goes_to_standard_output_by_default() {
    let (place, backend) = (Place::new(), Backend::named("a"));
    let proxy = place.on(Io::Epoll, &[backend.address()]).start();
    let mut command = Command::new(binary());
    let command = command.arg("tap").env("AEGIS_CONTROL", place.control());
    let child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    eventually("the tap has begun", PATIENCE, || proxy.log_events("tap begins").pop());
    ask_once(proxy.address(), "who").unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let stream = Stream::read(&output.stdout);
    assert_eq!(stream.sent_by(stream.server), b"a\n");
}
