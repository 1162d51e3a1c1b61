//! The commands that ask a running proxy. What they show does not depend on the driver.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::thread;

use socket2::{Domain, SockAddr, Socket, Type};

use crate::support::backend::Backend;
use crate::support::client::ask_once;
use crate::support::kube_api::{KubeApi, Odd, host_ip};
use crate::support::proxy::{Builder, Ended, Proxy};
use crate::support::sandbox::hand_over;
use crate::support::{Io, ports, skip};

/// Runs a command in the environment of this proxy's container.
fn run(proxy: &Proxy, arguments: &[&'static str]) -> Ended {
    run_at(&proxy.admin().to_string(), arguments)
}

fn run_at(admin: &str, arguments: &[&'static str]) -> Ended {
    let builder = Builder::bare().set("AEGIS_ADMIN", admin);
    arguments.iter().fold(builder, |builder, argument| builder.argument(argument)).run()
}

/// A proxy of two routes, the second without an endpoint that answers.
fn two_routes(backend: &Backend) -> Proxy {
    Builder::on(Io::Epoll)
        .set("AEGIS_ROUTES", "orders,cache")
        .set("AEGIS_ORDERS__BACKENDS", backend.address().to_string())
        .set("AEGIS_CACHE__BACKENDS", "127.0.0.2:9")
        .start()
}

#[test]
fn the_healthcheck_says_whether_a_proxy_is_fine_and_why_not() {
    let backend = Backend::named("a");
    let proxy = Builder::on(Io::Epoll)
        .set("AEGIS_DRAIN_DELAY", "60s")
        .backends(&[backend.address()])
        .start();
    for probe in ["livez", "readyz", "startupz"] {
        let ended = run(&proxy, &["healthcheck", "--probe", probe]);
        assert_eq!((ended.code, &*ended.output, &*ended.errors), (Some(0), "ok\n", ""));
    }
    proxy.terminate();
    proxy.log_field("drain asked: not ready, still accepting", "signal");
    let ended = run(&proxy, &["healthcheck"]);
    assert_eq!((ended.code, &*ended.errors), (Some(1), "aegis-proxy: readyz: draining\n"));
    assert_eq!(run(&proxy, &["healthcheck", "--probe", "livez"]).code, Some(0));
}

#[test]
fn the_healthcheck_of_no_proxy_fails() {
    let closed = ports::unused([127, 0, 0, 1].into());
    let ended = run_at(&closed.to_string(), &["healthcheck"]);
    let errors = format!("aegis-proxy: readyz: nothing listens at {closed}\n");
    assert_eq!((ended.code, ended.errors), (Some(1), errors));
    let ended = run_at("nowhere", &["healthcheck"]);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.errors.contains("AEGIS_ADMIN=nowhere"), "{ended:?}");
    // An option counts more than the environment.
    let ended = run_at("nowhere", &["healthcheck", "--admin", "127.0.0.1:0"]);
    assert!(ended.errors.contains("--admin=127.0.0.1:0"), "{ended:?}");
}

#[test]
fn endpoints_are_listed_by_route() {
    let backend = Backend::named("a");
    let proxy = two_routes(&backend);
    ask_once(proxy.address_of("orders"), "who").unwrap();
    let ended = run(&proxy, &["endpoints"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let lines: Vec<_> = ended.output.lines().collect();
    assert_eq!((lines[0], lines[3], lines[4]), ("route orders", "", "route cache"), "{ended:?}");
    let cells: Vec<_> = lines[2].split_whitespace().collect();
    let address = backend.address().to_string();
    assert_eq!(cells[..4], [&address, &address, "usable", "0"], "{ended:?}");

    let ended = run(&proxy, &["endpoints", "--route", "cache", "--json"]);
    let pages: serde_json::Value = serde_json::from_str(&ended.output).unwrap();
    assert_eq!(pages.as_array().unwrap().len(), 1);
    assert_eq!(pages[0]["endpoints"][0]["address"], "127.0.0.2:9");

    for route in ["x", "no route", "a\r\nHost: b"] {
        let ended = run(&proxy, &["endpoints", "--route", route]);
        assert_eq!(ended.code, Some(1), "{ended:?}");
    }
}

#[test]
fn what_another_program_says_shows_no_proxy() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let asked =
        [("endpoints", "{\"status\": \"UP\"}"), ("top", "null"), ("healthcheck", "<html></html>")];
    let server = thread::spawn(move || {
        for (_, page) in asked {
            let (mut stream, _) = listener.accept().unwrap();
            assert!(stream.read(&mut [0; 1024]).unwrap() > 0);
            stream.write_all(format!("HTTP/1.1 200 OK\r\n\r\n{page}").as_bytes()).unwrap();
        }
    });
    for (command, _) in asked {
        let ended = run_at(&address, &[command]);
        assert_eq!((ended.code, &*ended.output), (Some(1), ""), "{ended:?}");
        assert!(ended.errors.ends_with(" is no proxy's\n"), "{ended:?}");
    }
    server.join().unwrap();
}

fn check_host(builder: Builder) -> Ended {
    builder.argument("check").argument("--host").run()
}

/// The line of the report about something, without the time that it took.
#[track_caller]
fn line_of<'a>(ended: &'a Ended, about: &str) -> &'a str {
    let line = ended.output.lines().find(|line| line.contains(about));
    line.unwrap_or_else(|| panic!("nothing about {about:?} in {}", ended.output))
}

#[test]
fn a_check_of_the_host_reaches_each_backend_and_says_what_to_do() {
    let backend = Backend::named("a");
    let good = backend.address().to_string();
    let closed = ports::unused([127, 0, 0, 1].into());
    let ended = check_host(Builder::on(Io::Epoll).set("AEGIS_BACKENDS", &*good));
    assert_eq!(ended.code, Some(0), "{ended:?}");
    for about in ["cores: ", "descriptors: ", "locked memory: ", "driver: epoll (AEGIS_IO=epoll)"] {
        let reports = ended
            .output
            .lines()
            .filter(|line| line.starts_with("fine  ") || line.starts_with("note  "));
        assert!(reports.clone().any(|line| line[6..].starts_with(about)), "{about}: {ended:?}");
    }
    assert!(line_of(&ended, &format!("{good}: connected in ")).starts_with("fine  "), "{ended:?}");

    // Names, and a socket that is not there.
    let ended = check_host(
        Builder::on(Io::Epoll)
            .set("AEGIS_ROUTES", "one,two")
            .set("AEGIS_ONE__BACKENDS", format!("localhost:{}", backend.address().port()))
            .set("AEGIS_TWO__BACKENDS", format!("{closed},unix:/nowhere/socket")),
    );
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(line_of(&ended, "route one: names: ").starts_with("fine  "), "{ended:?}");
    assert!(line_of(&ended, &format!("route two: {closed}: refused")).starts_with("BAD   "));
    line_of(&ended, "unix:/nowhere/socket: there is no such socket");
}

#[test]
fn a_check_of_the_host_waits_for_room_in_the_queue_of_a_unix_socket() {
    let folder = tempfile::tempdir().unwrap();
    hand_over(folder.path());
    let path = folder.path().join("db.sock");
    let (socket, address) = (unix_socket(), SockAddr::unix(&path).unwrap());
    socket.bind(&address).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
    socket.listen(0).unwrap();
    unix_socket().connect(&address).unwrap();
    let backend = format!("unix:{}", path.display());
    let check = |timeout: &str| {
        let builder = Builder::on(Io::Epoll).set("AEGIS_BACKENDS", &*backend);
        check_host(builder.set("AEGIS_CONNECT_TIMEOUT", timeout))
    };
    let ended = check("100ms");
    assert_eq!(ended.code, Some(1), "{ended:?}");
    let line = line_of(&ended, &format!("{backend}: its queue is full"));
    assert!(line.starts_with("BAD   "), "{ended:?}");
    // It is accepted from while the check is under way, or before.
    let server = thread::spawn(move || while socket.accept().is_ok() {});
    let ended = check("1m");
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(!server.is_finished());
}

fn unix_socket() -> Socket {
    Socket::new(Domain::UNIX, Type::STREAM, None).unwrap()
}

#[test]
fn a_check_of_the_host_fails_where_a_name_does_not_resolve() {
    let ended = check_host(Builder::on(Io::Epoll).set("AEGIS_BACKENDS", "no-such-name.invalid:1"));
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(line_of(&ended, "no-such-name.invalid").starts_with("AEGIS_BACKENDS"), "{ended:?}");
    assert!(line_of(&ended, "names: ").starts_with("BAD   names: "), "{ended:?}");
}

#[test]
fn a_check_without_the_host_asks_nobody() {
    let ended = Builder::on(Io::Epoll)
        .set("AEGIS_BACKENDS", "no-such-name.invalid:1,127.0.0.2:9")
        .argument("check")
        .run();
    assert_eq!(ended.code, Some(0), "{ended:?}");
}

#[test]
fn a_check_of_the_host_tells_of_rights_at_the_kubernetes_api() {
    let api = KubeApi::start();
    let server = Backend::named_at("a", host_ip());
    api.announce("a", server.address());
    let check = || check_host(Builder::on(Io::Epoll).kubernetes(&api));
    let ended = check();
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let known = line_of(&ended, "Kubernetes API: endpoints known: 1");
    assert!(known.starts_with("fine  "), "{ended:?}");
    line_of(&ended, &format!("{}: connected in ", server.address()));
    // A start would be held, which is for somebody to mend.
    api.revoke();
    let ended = check();
    assert_eq!(ended.code, Some(78), "{ended:?}");
    let refused = line_of(&ended, "not allowed to");
    assert!(refused.starts_with("BAD   Kubernetes API: ") && refused.contains("Role"), "{ended:?}");
}

#[test]
fn a_check_of_the_host_takes_a_silent_kubernetes_api_for_no_empty_one() {
    let api = KubeApi::start();
    let Some(faults) = api.faults() else { return skip("a real API server answers") };
    faults.talk(Some(Odd::Silent));
    let ended = check_host(Builder::on(Io::Epoll).kubernetes(&api));
    assert_eq!(ended.code, Some(1), "{ended:?}");
    line_of(&ended, "BAD   Kubernetes API: it has not answered in time");
}

/// What a shell prints that runs this script, or nothing where there is no such shell.
fn in_shell(shell: &str, script: &str, argument: &std::path::Path) -> Option<String> {
    // One that waits for a completion that never comes is ended.
    let mut command = std::process::Command::new("timeout");
    command.args(["20", shell]);
    // fish takes all that follows the script for its arguments, the others the first for its name.
    let name = (shell != "fish").then_some(shell);
    match command.args(["-c", script]).args(name).arg(argument).output() {
        Ok(output) if output.status.code() == Some(127) => {
            skip(&format!("{shell} does not run"));
            None
        }
        output => {
            let output = output.unwrap();
            assert!(output.status.success(), "{shell}: {output:?}");
            Some(String::from_utf8(output.stdout).unwrap())
        }
    }
}

#[test]
fn shells_complete_commands_and_options() {
    let folder = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish"] {
        let ended = Builder::bare().argument("completions").argument(shell).run();
        assert_eq!((ended.code, &*ended.errors), (Some(0), ""), "{shell}");
        let file = folder.path().join(shell);
        std::fs::write(&file, &ended.output).unwrap();
        let script = match shell {
            // As a key asks for them.
            "bash" => {
                r#"source "$1"
                complete=$(complete -p aegis-proxy) && complete=${complete##*-F }
                complete() {
                    COMP_WORDS=(aegis-proxy "$@") COMP_CWORD=$#
                    ${complete% *} aegis-proxy "${@: -1}" "${COMP_WORDS[$# - 1]}"
                    echo "${COMPREPLY[*]}"
                }
                complete he
                complete healthcheck --probe ''
                complete completions b"#
            }
            // It completes for a key alone, typed at a pseudo-terminal.
            "zsh" => {
                r#"zmodload zsh/zpty
                zpty typed "PS1='FIRST>' TERM=dumb zsh -f -i"
                zpty -r -m typed seen '*FIRST>*'
                setup="autoload -U compinit; compinit -u -D; source ${(q)1}; unsetopt automenu"
                zpty -w typed "$setup; PS1=READY'>'"
                zpty -r -m typed seen '*READY>*'
                zpty -n -w typed $'aegis-proxy healthch\t'
                zpty -r -m typed seen '*healthcheck *' && print healthcheck
                zpty -n -w typed $'--probe \t'
                zpty -r -m typed seen '*livez*readyz*startupz*' && print livez readyz startupz
                zpty -n -w typed $'\x15aegis-proxy completions b\t'
                zpty -r -m typed seen '*completions bash *' && print bash
                zpty -d typed"#
            }
            _ => {
                r#"source $argv[1]
                complete -C "aegis-proxy he" | string replace --regex "\t.*" ""
                complete -C "aegis-proxy healthcheck --probe " | string join " "
                complete -C "aegis-proxy completions b""#
            }
        };
        let completed = in_shell(shell, script, &file);
        if let Some(completed) = completed {
            assert_eq!(completed, "healthcheck\nlivez readyz startupz\nbash\n", "{shell}");
        }
    }
    let ended = Builder::bare().argument("completions").argument("csh").run();
    assert_eq!(ended.code, Some(2), "{ended:?}");
}

#[test]
fn the_man_page_tells_of_every_command_and_variable() {
    let ended = Builder::bare().argument("man").run();
    assert_eq!((ended.code, &*ended.errors), (Some(0), ""));
    for part in [".TH aegis-proxy 1", "healthcheck", "AEGIS_BACKENDS"] {
        assert!(ended.output.contains(part), "{part}: {}", ended.output);
    }
}
