//! The control socket and the commands that go over it.

use std::collections::HashSet;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread;
use std::time::Duration;

use rustix::process::Signal;

use crate::support::backend::Backend;
use crate::support::client::{ask, ask_once, connect};
use crate::support::kube_api::{KubeApi, host_ip};
use crate::support::proxy::{Builder, Ended, Proxy, binary};
use crate::support::sandbox::{UNPRIVILEGED, as_unprivileged, can_drop_privileges, hand_over};
use crate::support::{Io, PATIENCE, eventually, skip};

const CHANGED: &str = "log filter changed";
const REFUSED: &str = "refused on the control socket: neither root nor the own user";
const DRAINING: &str = "drain asked: not ready, still accepting";

/// A directory that proxies may write to, and the path of a socket in it.
fn place() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    hand_over(directory.path());
    let path = directory.path().join("control.sock");
    (directory, path)
}

fn unix(path: &Path) -> String {
    format!("unix:{}", path.display())
}

fn controlled(path: &Path, backend: &Backend) -> Builder {
    Builder::on(Io::Epoll).backends(&[backend.address()]).set("AEGIS_CONTROL", unix(path))
}

/// Runs a command as the proxy's user.
fn run(path: &Path, arguments: &[&'static str]) -> Ended {
    let builder = Builder::bare().set("AEGIS_CONTROL", unix(path));
    arguments.iter().fold(builder, |builder, argument| builder.argument(argument)).run()
}

fn expect_done(path: &Path, arguments: &[&'static str], output: &str) {
    let ended = run(path, arguments);
    assert_eq!((ended.code, &*ended.output), (Some(0), output), "{ended:?}");
}

fn expect_refused(ended: &Ended, why: &str) {
    assert_eq!((ended.code, &*ended.output), (Some(1), ""), "{ended:?}");
    assert!(ended.errors.contains(why), "no {why:?} in {ended:?}");
}

/// What the socket answers to this.
fn say(path: &Path, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    // It may be closed before all is sent.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8(answer).unwrap()
}

fn traces(proxy: &Proxy) -> usize {
    proxy.log_at("TRACE").len()
}

#[test]
fn the_log_filter_is_shown_and_changed() {
    let (_directory, path) = place();
    let backend = Backend::named("a");
    let proxy = controlled(&path, &backend).start();
    expect_done(&path, &["log-level"], "info\n");
    ask_once(proxy.address(), "who").unwrap();
    expect_done(&path, &["log-level", "warn, aegis::worker=trace"], "warn,aegis::worker=trace\n");
    assert_eq!(traces(&proxy), 0);
    ask_once(proxy.address(), "who").unwrap();
    eventually("the session is traced", PATIENCE, || (traces(&proxy) > 0).then_some(()));
    // Whatever is logged, who changes it is.
    let hiding = "off,aegis::control::socket=off,aegis::control::socket::log_level[{uid}]=off";
    expect_done(&path, &["log-level", hiding], &format!("{hiding}\n"));
    expect_done(&path, &["log-level", "error,"], "error\n");
    let changes = eventually("the changes are logged", PATIENCE, || {
        Some(proxy.log_events(CHANGED)).filter(|changes| changes.len() == 3)
    });
    let own = fs::read_to_string(format!("/proc/{}/status", proxy.id())).unwrap();
    let uid = own.lines().find_map(|line| line.strip_prefix("Uid:")?.split_whitespace().next());
    for (change, (before, filter)) in changes.iter().zip([
        ("info", "warn,aegis::worker=trace"),
        ("warn,aegis::worker=trace", hiding),
        (hiding, "error"),
    ]) {
        assert_eq!((&change["before"], &change["filter"]), (&before.into(), &filter.into()));
        assert_eq!(Some(&*change["uid"].to_string()), uid, "{change}");
        assert!(change["pid"].as_u64().unwrap() > 0, "{change}");
    }
}

#[test]
fn a_passing_log_filter_gives_way_to_the_lasting_one() {
    let (_directory, path) = place();
    let backend = Backend::named("a");
    let proxy = controlled(&path, &backend).start();
    let passing = &["log-level", "debug", "--for", "1h"];
    expect_done(&path, passing, "debug (for another 1h, then info)\n");
    // The second one takes the place of the first, and not of what was before that.
    let passing = &["log-level", "warn", "--for", "1s"];
    expect_done(&path, passing, "warn (for another 1s, then info)\n");
    proxy.log_field("log filter as before", "filter");
    expect_done(&path, &["log-level"], "info\n");
    // For good, while one holds for a while.
    assert_eq!(run(&path, &["log-level", "warn", "--for", "1h"]).code, Some(0));
    expect_done(&path, &["log-level", "debug"], "debug\n");
}

#[test]
fn lines_name_their_routes_however_little_was_logged_at_the_start() {
    let (_directory, path) = place();
    let api = KubeApi::start();
    let backends = ["a", "b"].map(|name| Backend::named_at(name, host_ip()));
    api.announce("a", backends[0].address());
    let proxy = Builder::on(Io::Epoll)
        .set("KUBECONFIG", api.kubeconfig())
        .set("AEGIS_KUBE_SERVICE", "chronos")
        .set("AEGIS_ROUTES", "orders,cache")
        .set("AEGIS_CONTROL", unix(&path))
        .set("AEGIS_LOG", "off,aegis_proxy=info,aegis::control::admin=info")
        .start();
    expect_done(&path, &["log-level", "info"], "info\n");
    api.announce("b", backends[1].address());
    let named = eventually("the change is logged", PATIENCE, || {
        let lines = proxy.log_events("endpoints changed");
        let named = lines.iter().map(|line| line["span"]["route"].as_str().map(str::to_owned));
        Some(named.collect::<HashSet<_>>()).filter(|_| lines.len() == 2)
    });
    assert_eq!(named, ["orders", "cache"].map(|route| Some(route.to_owned())).into());
}

#[test]
fn a_wrong_log_filter_is_refused_and_changes_nothing() {
    let (_directory, path) = place();
    let backend = Backend::named("a");
    let _proxy = controlled(&path, &backend).start();
    for (filter, why) in [
        ("wran", "\"wran\" is not a level. Accepted: off, error, warn, info, debug, trace, or"),
        ("info,aegis::oi=debug", "there is no module \"aegis::oi\". Accepted: "),
        ("a=b=c", "Accepted: "),
        // What a script says whose variable is not set.
        ("", "there is no level. Accepted: off, error"),
    ] {
        expect_refused(&run(&path, &["log-level", filter]), why);
    }
    for time in ["0s", "2d"] {
        expect_refused(&run(&path, &["log-level", "debug", "--for", time]), "1s to 1d");
    }
    for arguments in [&["log-level", "--for", "1m"][..], &["log-level", "debug", "--for", "soon"]] {
        assert_eq!(run(&path, arguments).code, Some(2));
    }
    let long = format!("info,{}\n", "aegis::io=debug,".repeat(1 << 17));
    let request = format!("{{\"command\":\"log-level\",\"filter\":\"{long}\"}}\n");
    assert!(say(&path, request.as_bytes()).contains("longer than 4096 bytes"));
    let ended = run(&path, &["log-level", "x".repeat(100_000).leak()]);
    expect_refused(&ended, "longer than 4096 bytes");
    // One that would be large as a regular expression.
    let request = br#"{"command":"log-level","filter":"aegis[route{route=(a{999}){999}}]=debug"}"#;
    let _ = say(&path, &[&request[..], b"\n"].concat());
    let reset = run(&path, &["log-level", "info"]);
    assert_eq!((reset.code, &*reset.output), (Some(0), "info\n"), "{reset:?}");
}

#[test]
fn a_drain_is_begun_once_and_waited_for_to_the_end() {
    let (_directory, path) = place();
    let backend = Backend::named("a");
    let mut proxy = controlled(&path, &backend).start();
    let client = connect(proxy.address());
    ask(&client, "who");
    expect_done(&path, &["drain"], "draining, 1 sessions are open\n");
    proxy.log_field(DRAINING, "signal");
    // Its pod is deleted meanwhile.
    proxy.terminate();
    assert_eq!(
        proxy.log_field("draining already: a second signal would end it at once", "signal"),
        "SIGTERM"
    );
    // Those who wait for the end and leave make room.
    for _ in 0..40 {
        eventually("there is a place to wait", PATIENCE, || {
            let mut stream = UnixStream::connect(&path).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream.write_all(b"{\"command\":\"drain\",\"wait\":true}\n").unwrap();
            let mut answer = [0; 8];
            stream.read_exact(&mut answer).unwrap();
            (&answer == b"{\"done\":").then_some(())
        });
    }
    let asked = || proxy.log_events("drain asked by the control socket").len();
    let before = eventually("they are logged", PATIENCE, || Some(asked()).filter(|&n| n >= 41));
    // Many at a time, and none of them cuts anything.
    let socket = &path;
    let waiting = thread::scope(|scope| {
        let others: Vec<_> = (0..4).map(|_| scope.spawn(|| run(socket, &["drain"]))).collect();
        for other in others {
            let ended = other.join().unwrap();
            assert_eq!(ended.output, "draining already, 1 sessions are open\n", "{ended:?}");
        }
        let waiting = scope.spawn(|| run(socket, &["drain", "--wait"]));
        eventually("it waits", PATIENCE, || (asked() == before + 5).then_some(()));
        assert_eq!(ask(&client, "still?"), "a");
        assert!(!waiting.is_finished());
        drop(client);
        waiting.join().unwrap()
    });
    assert_eq!(waiting.output, "draining already, 1 sessions are open\nended\n", "{waiting:?}");
    assert!(!path.exists(), "the process had not ended");
    proxy.wait_clean(PATIENCE);
}

#[test]
fn a_drain_may_be_asked_for_during_the_start_and_a_second_signal_still_cuts_it() {
    let (_directory, path) = place();
    let mut proxy = Builder::on(Io::Epoll)
        .set("AEGIS_BACKENDS", "nowhere.invalid:1")
        .set("AEGIS_DRAIN_DELAY", "60s")
        .set("AEGIS_CONTROL", unix(&path))
        .launch();
    let ended = run(&path, &["drain"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(proxy.log_field(DRAINING, "signal"), "none, the control socket");
    proxy.terminate();
    proxy.log_field("draining already: a second signal would end it at once", "signal");
    proxy.terminate();
    proxy.wait_clean(PATIENCE);
}

#[test]
fn without_a_socket_it_is_said_what_to_do() {
    let (directory, path) = place();
    let none = Builder::bare().argument("drain").run();
    expect_refused(&none, "drain: no control socket is configured: start the proxy with AEGIS_CON");
    let wrong = Builder::bare().argument("log-level").set("AEGIS_CONTROL", "/run/x").run();
    expect_refused(&wrong, "AEGIS_CONTROL=/run/x: not unix: and an absolute path");
    expect_refused(&run(&path, &["drain"]), &format!("nothing listens at {}", unix(&path)));
    // What a process that was killed has left.
    let backend = Backend::named("a");
    let mut proxy = controlled(&path, &backend).start();
    proxy.signal(Signal::KILL);
    proxy.wait(PATIENCE);
    expect_refused(&run(&path, &["drain"]), "nothing listens at");
    let proxy = controlled(&path, &backend).start();
    expect_done(&path, &["log-level"], "info\n");
    // Another one, while it lives.
    let ended = controlled(&path, &backend).run();
    assert_eq!(ended.code, Some(1), "{ended:?}");
    let why = format!("AEGIS_CONTROL: {} is in use by another program", unix(&path));
    assert!(ended.errors.contains(&why), "{ended:?}");
    drop(proxy);
    let file = directory.path().join("file");
    fs::write(&file, "precious").unwrap();
    let ended = controlled(&file, &backend).run();
    assert_eq!(ended.code, Some(78), "{ended:?}");
    assert!(ended.errors.contains("a file that is no socket is in its place"), "{ended:?}");
    let both = controlled(&path, &backend).set("AEGIS_LISTEN", unix(&path)).run();
    assert!(both.errors.contains("both would listen at the same address"), "{both:?}");
}

#[test]
fn whoever_answers_late_or_otherwise_holds_no_command_up() {
    let (_directory, path) = place();
    let listener = UnixListener::bind(&path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
    let server = thread::spawn(move || {
        let (mut other, _) = listener.accept().unwrap();
        other.write_all(b"SSH-2.0\r\n").unwrap();
        let (mut slow, _) = listener.accept().unwrap();
        while slow.write_all(b"x").is_ok() {
            thread::sleep(Duration::from_millis(50));
        }
    });
    expect_refused(&run(&path, &["drain"]), &unix(&path));
    expect_refused(&run(&path, &["drain"]), "did not answer within 3 s");
    server.join().unwrap();
}

/// Runs a command as this user.
fn run_as(uid: u32, path: &Path, command: &str) -> Output {
    let mut words = as_unprivileged(uid).into_iter();
    let mut program = Command::new(words.next().unwrap());
    program.args(words).arg(binary()).arg(command).env("AEGIS_CONTROL", unix(path));
    program.output().unwrap()
}

#[test]
fn other_users_are_refused_and_logged() {
    if !can_drop_privileges() {
        return skip("tests cannot be other users");
    }
    let (directory, path) = place();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let backend = Backend::named("a");
    let proxy = controlled(&path, &backend).start();
    let stranger = UNPRIVILEGED - 7;
    for command in ["drain", "log-level"] {
        let ended = run_as(stranger, &path, command);
        let errors = String::from_utf8_lossy(&ended.stderr);
        let why = format!("uid {stranger} may give no commands, only root and uid {UNPRIVILEGED}");
        assert!(errors.contains(&why), "{errors}");
        assert_eq!(ended.status.code(), Some(1));
    }
    let refused = eventually("it is logged", PATIENCE, || proxy.log_events(REFUSED).pop());
    assert_eq!(refused["uid"], stranger);
    assert_eq!(proxy.log_events(DRAINING).len(), 0);
    // Root is itself; so is whoever may not even pass, who is told.
    assert_eq!(say(&path, b"{\"command\":\"log-level\"}\n"), "{\"done\":\"info\"}\n");
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o700)).unwrap();
    let ended = run_as(stranger, &path, "drain");
    assert!(String::from_utf8_lossy(&ended.stderr).contains("this user may not pass there"));
}

#[test]
fn whoever_says_nothing_or_half_or_too_much_holds_nothing_up() {
    let (_directory, path) = place();
    let backend = Backend::named("a");
    let proxy = controlled(&path, &backend).start();
    let silent: Vec<_> = (0..1000).map(|_| UnixStream::connect(&path).unwrap()).collect();
    // Who comes while all places are taken is told; they are free once the silent ones' time is over.
    eventually("a command is carried out", PATIENCE, || {
        let ended = run(&path, &["log-level"]);
        assert!(ended.code == Some(0) || ended.errors.contains("try again"), "{ended:?}");
        (ended.code == Some(0)).then_some(())
    });
    for mut stream in &silent {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("it is closed");
        assert!(answer.is_empty() || answer.contains("try again"), "{answer}");
    }
    for text in ["", "\n", "drain", "{\"command\":\"drain\",\"wait\":false}", "GET / HTTP/1.1\r\n"]
    {
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.write_all(text.as_bytes()).unwrap();
    }
    for text in ["drain\n", "\0\n", "{\"command\":\"drain\",\"wait\":0}\n", "[[[[[[[[\n"] {
        assert!(say(&path, text.as_bytes()).contains("no command: "), "{text}");
    }
    assert!(say(&path, &vec![b'x'; 4 << 20]).contains("longer than 4096 bytes"));
    expect_done(&path, &["log-level"], "info\n");
    assert_eq!(proxy.log_events(DRAINING).len(), 0, "half a command is none");
    assert_eq!(proxy.log_warnings(), [""; 0]);
}
