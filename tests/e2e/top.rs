//! `aegis-proxy top`, in terminals and shells as people use them.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, ExitStatus};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

use crate::support::backend::Backend;
use crate::support::client::ask_once;
use crate::support::proxy::{Builder, Proxy, binary};
use crate::support::{Io, PATIENCE, eventually, ports};

/// How a screen of its own begins and ends, and what each one is begun with.
const ENTER: &str = "\x1b[?1049h";
const LEAVE: &str = "\x1b[?1049l";
const HOME: &str = "\x1b[H";

fn proxy_at(admin: &str, backend: &Backend) -> Proxy {
    Builder::on(Io::Epoll)
        .set("AEGIS_ADMIN", admin)
        .set("AEGIS_ROUTES", "orders,cache")
        .set("AEGIS_ORDERS__BACKENDS", backend.address().to_string())
        .set("AEGIS_CACHE__BACKENDS", "127.0.0.2:9")
        .start()
}

fn a_proxy() -> (Backend, Proxy) {
    let backend = Backend::named("a");
    let proxy = proxy_at("127.0.0.1:0", &backend);
    (backend, proxy)
}

/// A command in a terminal of its own, of 80 columns and 24 lines.
struct InTerminal {
    child: Child,
    keys: File,
    terminal: File,
    shown: Arc<Mutex<String>>,
}

impl InTerminal {
    fn run(admin: SocketAddr, command: &[&str]) -> Self {
        let keys = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&keys).unwrap();
        unlockpt(&keys).unwrap();
        let name = ptsname(&keys, Vec::new()).unwrap().into_string().unwrap();
        let terminal = File::options().read(true).write(true).open(name).unwrap();
        set_size(&terminal, 80, 24);
        let own = || terminal.try_clone().unwrap();
        // It leads a session, as what `kubectl exec` runs does.
        let child = Command::new("setsid")
            .arg("--ctty")
            .args(command)
            .env("AEGIS_ADMIN", admin.to_string())
            .stdin(own())
            .stdout(own())
            .stderr(own())
            .spawn()
            .unwrap();
        let (keys, shown) = (File::from(keys), Arc::<Mutex<String>>::default());
        let (mut output, text) = (keys.try_clone().unwrap(), Arc::clone(&shown));
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = output.read(&mut buffer) {
                text.lock().unwrap().push_str(&String::from_utf8_lossy(&buffer[..count]));
            }
        });
        Self { child, keys, terminal, shown }
    }

    fn top(admin: SocketAddr) -> Self {
        Self::top_by(admin, &[&binary(), "top"])
    }

    /// `top`, as this command begins it.
    fn top_by(admin: SocketAddr, command: &[&str]) -> Self {
        let top = Self::run(admin, command);
        top.wait_for("q quits");
        top
    }

    fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits until this is shown, and returns all that was shown since the last time.
    fn wait_for(&self, part: &str) -> String {
        eventually(&format!("the terminal shows {part:?}"), PATIENCE, || {
            let mut shown = self.shown.lock().unwrap();
            shown.contains(part).then(|| std::mem::take(&mut *shown))
        })
    }

    fn is_raw(&self) -> bool {
        !tcgetattr(&self.terminal).unwrap().local_modes.contains(LocalModes::ICANON)
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    fn end(&mut self) -> ExitStatus {
        eventually("it ends", PATIENCE, || self.child.try_wait().unwrap())
    }
}

impl Drop for InTerminal {
    fn drop(&mut self) {
        if thread::panicking() {
            let shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
            eprintln!("ended: {:?}; the terminal shows {shown:?}", self.child.try_wait());
        }
        // Both fail where it has ended and been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn set_size(terminal: &File, columns: u16, rows: u16) {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(terminal, size).unwrap();
}

#[test]
fn top_shows_the_proxy_in_a_terminal_until_it_is_left() {
    let backend = Backend::named("a");
    let admin = ports::unused([127, 0, 0, 1].into());
    let proxy = proxy_at(&admin.to_string(), &backend);
    let mut top = InTerminal::run(admin, &[&binary(), "top"]);
    let shown = top.wait_for("q quits");
    for part in ["aegis ", "orders: fine", "first byte", "cache: ", "more lines below"] {
        assert!(shown.contains(part), "{part}: {shown:?}");
    }
    assert!(top.is_raw());
    let screen = shown.split(HOME).find(|screen| screen.contains("q quits")).unwrap();
    assert_eq!(screen.matches("\r\n").count(), 23, "{screen:?}");
    // It is kept up to date, can be scrolled, and says when the proxy is lost and is back.
    ask_once(proxy.address_of("orders"), "who").unwrap();
    eventually("the new session shows in the rate of ten seconds", PATIENCE, || {
        let shown = top.shown.lock().unwrap();
        (1..=10)
            .any(|tenths| shown.contains(&format!("new {}.{}/s", tenths / 10, tenths % 10)))
            .then_some(())
    });
    top.press("jjjjjjjjjjjjjjjjjjjjjj");
    top.wait_for("I/O by epoll");
    drop(proxy);
    top.wait_for("lost, what is shown is old: nothing listens at ");
    let _proxy = proxy_at(&admin.to_string(), &backend);
    top.wait_for("q quits");
    top.press("q");
    assert!(top.end().success());
    assert!(!top.is_raw(), "the terminal is as it was");
    top.wait_for(LEAVE);
}

#[test]
fn a_signal_that_ends_top_leaves_the_terminal_as_it_was() {
    let (_backend, proxy) = a_proxy();
    for signal in [Signal::TERM, Signal::HUP, Signal::INT, Signal::QUIT] {
        let mut top = InTerminal::top(proxy.admin());
        assert!(top.is_raw());
        top.signal(signal);
        assert_eq!(top.end().code(), Some(128 + signal.as_raw()), "{signal:?}");
        assert!(!top.is_raw(), "{signal:?}");
        top.wait_for(LEAVE);
    }
}

#[test]
fn top_is_stopped_and_continued_by_a_shell() {
    let (_backend, proxy) = a_proxy();
    let mut shell = InTerminal::run(proxy.admin(), &["bash", "--norc", "--noprofile", "-i"]);
    shell.press(&format!("{} top\n", binary()));
    shell.wait_for("q quits");
    for stop in ["\x1a", ""] {
        match stop {
            "" => kill(&shell, Signal::TSTP),
            keys => shell.press(keys),
        }
        let shown = shell.wait_for("Stopped");
        let (_, after) = shown.rsplit_once(LEAVE).expect("the screen was left");
        assert!(!after.contains(HOME), "{shown:?}");
        shell.press("fg\n");
        let shown = shell.wait_for("q quits");
        assert!(shown.contains(ENTER), "{shown:?}");
    }
    // To whoever stops it for good, it looks the same.
    kill(&shell, Signal::STOP);
    shell.wait_for("Stopped");
    shell.press("fg\n");
    let shown = shell.wait_for("q quits");
    assert!(shown.contains(ENTER), "{shown:?}");
    shell.press("q");
    shell.wait_for(LEAVE);
    shell.press("echo left by $?\n");
    shell.wait_for("left by 0");
    shell.press("exit\n");
    assert!(shell.end().success());
}

/// Signals what a shell runs.
fn kill(shell: &InTerminal, signal: Signal) {
    let shell = shell.child.id();
    let children = std::fs::read_to_string(format!("/proc/{shell}/task/{shell}/children")).unwrap();
    let child: i32 = children.split_whitespace().next().unwrap().parse().unwrap();
    kill_process(Pid::from_raw(child).unwrap(), signal).unwrap();
}

#[test]
fn top_follows_the_size_of_the_terminal_and_is_not_stopped_where_no_shell_would_continue_it() {
    let (_backend, proxy) = a_proxy();
    let mut top = InTerminal::top(proxy.admin());
    top.press("\x1a");
    top.signal(Signal::TSTP);
    for (columns, rows) in [(10, 5), (1, 1), (200, 12)] {
        set_size(&top.terminal, columns, rows);
        eventually("a screen of this size", PATIENCE, || {
            let shown = top.shown.lock().unwrap();
            shown
                .split(HOME)
                .any(|screen| {
                    screen.ends_with("\x1b[J")
                        && screen.matches("\r\n").count() + 1 == usize::from(rows)
                        && is_as_wide(screen, columns.into())
                })
                .then_some(())
        });
    }
    top.press("q");
    assert!(top.end().success());
}

/// As with `nsenter`, or beside containers that share their processes: who leads the session, and perhaps
/// who started it, is no process that could be named in there.
#[test]
fn top_is_not_stopped_where_its_session_is_led_from_outside_its_pid_namespace() {
    let (_backend, proxy) = a_proxy();
    let outside = ["unshare", "--pid", "--fork", "--mount-proc"];
    let shell = format!("{} top; exit $?", binary());
    let commands: [&[&str]; 2] = [&[&binary(), "top"], &["sh", "-c", &shell]];
    for command in commands {
        let mut top = InTerminal::top_by(proxy.admin(), &[&outside, command].concat());
        top.press("\x1a");
        top.press("q");
        assert!(top.end().success(), "{command:?}: {:?}", top.shown.lock().unwrap());
    }
}

/// Whether each line of a screen takes so many columns at most.
fn is_as_wide(screen: &str, columns: usize) -> bool {
    let text = ["\x1b[K", "\x1b[J", "\x1b[0m", "\x1b[2m", "\x1b[31m", "\x1b[32m", "\x1b[33m"];
    let plain = text.iter().fold(screen.to_owned(), |screen, code| screen.replace(code, ""));
    plain.split("\r\n").all(|line| line.chars().count() <= columns)
}

/// Says once what a proxy says, and nothing any more to the next who asks.
fn says_nothing_after(first: String) -> (SocketAddr, thread::JoinHandle<TcpStream>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let server = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        assert!(stream.read(&mut [0; 1024]).unwrap() > 0);
        stream.write_all(format!("HTTP/1.0 200 OK\r\n\r\n{first}").as_bytes()).unwrap();
        drop(stream);
        listener.accept().unwrap().0
    });
    (address, server)
}

#[test]
fn top_is_left_at_once_while_the_proxy_does_not_answer() {
    let (_backend, proxy) = a_proxy();
    let (silent, asked) = says_nothing_after(proxy.get("/status").body);
    let mut top = InTerminal::top(silent);
    let _silent = asked.join().unwrap();
    let begun = Instant::now();
    top.press("q");
    assert!(top.end().success());
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(2), "an answer is waited for 3 s, and this took {took:?}");
}

#[test]
fn top_prints_once_where_there_is_no_terminal() {
    let (_backend, proxy) = a_proxy();
    let run = |admin: SocketAddr| {
        Builder::bare().set("AEGIS_ADMIN", admin.to_string()).argument("top").run()
    };
    let admin = proxy.admin();
    let ended = run(admin);
    assert_eq!((ended.code, &*ended.errors), (Some(0), ""));
    assert!(ended.output.contains("\norders: fine\n"), "{ended:?}");
    assert!(!ended.output.contains('\x1b'), "{ended:?}");
    drop(proxy);
    let ended = run(admin);
    assert_eq!(ended.errors, format!("aegis-proxy: nothing listens at {admin}\n"));
    assert_eq!(ended.code, Some(1));
}
