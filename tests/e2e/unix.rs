//! Unix sockets, at either side of the proxy.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use crate::support::backend::Backend;
use crate::support::client::ask_once;
use crate::support::metrics::{DISCOVERY_ENDPOINTS, SESSIONS_ACTIVE};
use crate::support::proxy::{Builder, Proxy};
use crate::support::sandbox::{UNPRIVILEGED, can_drop_privileges, hand_over};
use crate::support::{Io, PATIENCE, eventually, on_both_drivers};

on_both_drivers![
    clients_and_backends_may_be_of_either_kind,
    a_unix_socket_may_stand_in_for_a_tcp_server,
    the_file_is_there_as_long_as_somebody_listens,
    a_stale_file_is_replaced_and_a_live_one_refused,
    the_file_of_somebody_else_stays,
    what_is_in_the_way_is_named,
    no_worker_has_more_than_twice_its_share_of_the_clients,
    a_backend_that_is_a_socket_of_the_proxy_itself_is_left_alone,
    a_client_without_an_address_is_unknown_to_the_backend,
    who_a_client_is_can_be_logged,
    an_absent_backend_is_tried_again_until_it_is_there,
    what_was_cut_looks_cut_where_the_client_had_sent_more,
];

/// A directory that proxies may write to, and the path of a socket in it.
fn place() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    hand_over(directory.path());
    let path = directory.path().join("db.sock");
    (directory, path)
}

fn unix(path: &Path) -> String {
    format!("unix:{}", path.display())
}

/// Listens on a Unix socket, and on TCP too.
fn listening(io: Io, path: &Path) -> Builder {
    Builder::on(io).set("AEGIS_LISTEN", format!("127.0.0.1:0,{}", unix(path)))
}

fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn read_line(mut stream: &UnixStream) -> String {
    let mut line = Vec::new();
    let mut byte = [0];
    while !line.ends_with(b"\n") && stream.read(&mut byte).unwrap() > 0 {
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}

fn ask(mut stream: &UnixStream, request: &str) -> String {
    writeln!(stream, "{request}").unwrap();
    read_line(stream).trim_end().to_owned()
}

/// Answers each line with its own name, on a Unix socket.
fn named(name: &'static str, path: &Path) {
    let listener = UnixListener::bind(path).unwrap();
    // The proxy may run as another user.
    fs::set_permissions(path, fs::Permissions::from_mode(0o666)).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            thread::spawn(move || {
                while !read_line(&stream).is_empty() && writeln!(&stream, "{name}").is_ok() {}
            });
        }
    });
}

fn a_unix_socket_may_stand_in_for_a_tcp_server(io: Io) {
    let (directory, _) = place();
    let (mut tcp, backup) = (Backend::named("tcp"), directory.path().join("backup"));
    named("unix", &backup);
    let proxy =
        Builder::on(io).backends(&[tcp.address()]).set("AEGIS_BACKUPS", unix(&backup)).start();
    assert_eq!(ask_once(proxy.address(), "who").unwrap(), "tcp");
    tcp.kill();
    assert_eq!(ask_once(proxy.address(), "who").unwrap(), "unix");
}

fn clients_and_backends_may_be_of_either_kind(io: Io) {
    let (directory, path) = place();
    let (tcp, backend) = (Backend::named("tcp"), directory.path().join("backend"));
    named("unix", &backend);
    for (backends, name) in [(tcp.address().to_string(), "tcp"), (unix(&backend), "unix")] {
        let mut proxy = listening(io, &path)
            .set("AEGIS_BACKENDS", &backends)
            // What TCP alone has is no trouble.
            .set("AEGIS_KEEPALIVE", "1s")
            .set("AEGIS_TCP_USER_TIMEOUT", "1s")
            .start();
        let client = connect(&path);
        assert_eq!(ask(&client, "who"), name);
        assert_eq!(ask_once(proxy.address(), "who").unwrap(), name);
        let listed = proxy.get("/backends").json();
        assert_eq!(listed["endpoints"][0]["address"], backends);
        assert_eq!(listed["endpoints"][0]["name"], backends);
        drop(client);
        proxy.terminate();
        proxy.wait_clean(PATIENCE);
        assert_eq!(proxy.log_warnings(), [""; 0]);
    }
}

fn the_file_is_there_as_long_as_somebody_listens(io: Io) {
    let (_directory, path) = place();
    let backend = Backend::named("up");
    for (mode, bits) in [(None, 0o660), (Some("0666"), 0o666)] {
        let mut builder = listening(io, &path).backends(&[backend.address()]);
        if let Some(mode) = mode {
            builder = builder.set("AEGIS_SOCKET_MODE", mode);
        }
        let mut proxy = builder.start();
        let found = fs::symlink_metadata(&path).unwrap();
        assert!(found.file_type().is_socket());
        assert_eq!(found.permissions().mode() & 0o777, bits);
        if can_drop_privileges() {
            assert_eq!((found.uid(), found.gid()), (UNPRIVILEGED, UNPRIVILEGED));
        }
        assert_eq!(ask(&connect(&path), "up?"), "up");
        proxy.terminate();
        proxy.wait_clean(PATIENCE);
        assert!(!path.exists(), "it is removed at the end");
    }
    // A start that fails leaves none behind.
    let admin = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = admin.local_addr().unwrap().to_string();
    let ended = listening(io, &path).set("AEGIS_ADMIN", taken).run();
    assert_eq!(ended.code, Some(1), "{}", ended.errors);
    assert!(!path.exists());
}

fn a_stale_file_is_replaced_and_a_live_one_refused(io: Io) {
    let (_directory, path) = place();
    let backend = Backend::named("first");
    let builder = listening(io, &path).backends(&[backend.address()]);
    let mut killed = builder.clone().start();
    killed.signal(rustix::process::Signal::KILL);
    killed.wait(PATIENCE);
    assert!(path.exists(), "who is killed leaves it");
    let _proxy = builder.clone().start();
    let ended = builder.run();
    assert_eq!(ended.code, Some(1));
    let why = format!("AEGIS_LISTEN: {} is in use by another program; stop it or", unix(&path));
    assert!(ended.errors.contains(&why), "{}", ended.errors);
    assert_eq!(ask(&connect(&path), "who"), "first");
}

fn the_file_of_somebody_else_stays(io: Io) {
    let (_directory, path) = place();
    let backend = Backend::named("a");
    let mut proxy = listening(io, &path).backends(&[backend.address()]).start();
    assert_eq!(ask(&connect(&path), "who"), "a");
    fs::remove_file(&path).unwrap();
    let _other = UnixListener::bind(&path).unwrap();
    proxy.terminate();
    proxy.wait_clean(PATIENCE);
    connect(&path);
}

fn what_is_in_the_way_is_named(io: Io) {
    let (directory, path) = place();
    fs::create_dir(&path).unwrap();
    let file = directory.path().join("file");
    fs::write(&file, "precious").unwrap();
    let missing = directory.path().join("missing/db.sock");
    let long = PathBuf::from(format!("/{}", "x".repeat(107)));
    let replace = "is in its place; remove it or choose another path";
    for (listen, code, what) in [
        (unix(&path), 78, format!("{}: a directory {replace}", unix(&path))),
        (unix(&file), 78, format!("{}: a file that is no socket {replace}", unix(&file))),
        (
            unix(&missing),
            1,
            format!("there is no directory {}/missing", directory.path().display()),
        ),
        (unix(&long), 78, "the path is longer than 107 bytes".to_owned()),
        ("unix:db.sock".to_owned(), 78, "the path does not begin with /".to_owned()),
    ] {
        let ended = Builder::on(io).set("AEGIS_LISTEN", &listen).run();
        assert_eq!(ended.code, Some(code), "{listen}: {}", ended.errors);
        assert!(ended.errors.contains(&what), "{listen}: {}", ended.errors);
    }
    assert_eq!(fs::read(&file).unwrap(), b"precious");
}

fn no_worker_has_more_than_twice_its_share_of_the_clients(io: Io) {
    const CLIENTS: usize = 400;
    let (_directory, path) = place();
    let backend = Backend::named("a");
    for workers in [2, 8] {
        let proxy = listening(io, &path)
            .set("AEGIS_WORKERS", workers.to_string())
            .backends(&[backend.address()])
            .without_pool()
            .start();
        let clients: Vec<_> = (0..CLIENTS).map(|_| connect(&path)).collect();
        for client in &clients {
            assert_eq!(ask(client, "who"), "a");
        }
        let sessions: Vec<_> = (0..workers)
            .map(|worker| proxy.metric(SESSIONS_ACTIVE, &[("worker", &worker.to_string())]))
            .collect();
        crate::support::measured(&format!("{workers} workers: {sessions:?}"));
        assert_eq!(sessions.iter().sum::<u64>(), CLIENTS as u64);
        let share = (CLIENTS / workers) as u64;
        assert!(sessions.iter().all(|&own| own <= 2 * share), "{sessions:?}");
    }
}

fn a_backend_that_is_a_socket_of_the_proxy_itself_is_left_alone(io: Io) {
    let (directory, path) = place();
    let ended = listening(io, &path).set("AEGIS_BACKENDS", unix(&path)).run();
    assert_eq!(ended.code, Some(78));
    assert!(ended.errors.contains("would connect to itself"), "{}", ended.errors);
    // By another name it is known at the first connect.
    let link = directory.path().join("link");
    symlink(&path, &link).unwrap();
    let proxy = listening(io, &path).set("AEGIS_BACKENDS", unix(&link)).launch();
    proxy.wait_for(DISCOVERY_ENDPOINTS, &[], |endpoints| endpoints == 1);
    let why = eventually("it is ejected", PATIENCE, || {
        let _ = UnixStream::connect(&path);
        proxy.log_events("ejected").first().map(|event| {
            assert!(event["route"].is_null(), "there is one only: {event}");
            event["error"].to_string()
        })
    });
    assert!(why.contains("leads back to this proxy itself"), "{why}");
}

fn first_bytes(backend: &Path, count: usize) -> Receiver<Vec<u8>> {
    let listener = UnixListener::bind(backend).unwrap();
    fs::set_permissions(backend, fs::Permissions::from_mode(0o666)).unwrap();
    let (report, received) = mpsc::channel();
    thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let mut bytes = vec![0; count];
            if stream.read_exact(&mut bytes).is_ok() {
                let _ = report.send(bytes);
            }
        }
    });
    received
}

fn a_client_without_an_address_is_unknown_to_the_backend(io: Io) {
    for (version, header) in
        [("v1", &b"PROXY UNKNOWN\r\n"[..]), ("v2", &b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"[..])]
    {
        let (directory, path) = place();
        let backend = directory.path().join("backend");
        let wanted = [header, b"hello"].concat();
        let received = first_bytes(&backend, wanted.len());
        let _proxy = listening(io, &path)
            .set("AEGIS_BACKENDS", unix(&backend))
            .set("AEGIS_PROXY_PROTOCOL", version)
            .without_pool()
            .start();
        connect(&path).write_all(b"hello").unwrap();
        assert_eq!(received.recv_timeout(PATIENCE).unwrap(), wanted);
    }
}

fn who_a_client_is_can_be_logged(io: Io) {
    let (_directory, path) = place();
    let backend = Backend::named("a");
    let proxy = listening(io, &path)
        .backends(&[backend.address()])
        .set("AEGIS_LOG", "info,aegis::worker=trace")
        .start();
    assert_eq!(ask(&connect(&path), "who"), "a");
    let event = eventually("its credentials are logged", PATIENCE, || {
        proxy.log_events("a client came by a Unix socket").first().cloned()
    });
    let uid = rustix::process::getuid().as_raw();
    assert_eq!((&event["pid"], &event["uid"]), (&std::process::id().into(), &uid.into()));
}

fn an_absent_backend_is_tried_again_until_it_is_there(io: Io) {
    let (directory, path) = place();
    let backend = directory.path().join("backend");
    let proxy: Proxy = listening(io, &path).set("AEGIS_BACKENDS", unix(&backend)).launch();
    eventually("it is ejected", PATIENCE, || {
        drop(connect(&path));
        (!proxy.log_events("ejected").is_empty()).then_some(())
    });
    named("back", &backend);
    eventually("it is used", PATIENCE, || {
        let mut client = UnixStream::connect(&path).ok()?;
        client.set_read_timeout(Some(Duration::from_secs(1))).ok()?;
        writeln!(client, "who").ok()?;
        let mut reply = [0; 5];
        client.read_exact(&mut reply).ok().filter(|()| &reply == b"back\n")
    });
}

fn what_was_cut_looks_cut_where_the_client_had_sent_more(io: Io) {
    let (_directory, path) = place();
    // It reads no further, and ends nothing.
    let backend = Backend::scripted(|mut stream| {
        let _ = stream.read_exact(&mut [0; 4]).and_then(|()| stream.write_all(b"part"));
        thread::sleep(PATIENCE);
    });
    let _proxy = listening(io, &path)
        .backends(&[backend.address()])
        .set("AEGIS_IDLE_TIMEOUT", "1s")
        .without_pool()
        .start();
    for sends_more in [false, true] {
        let mut client = connect(&path);
        client.write_all(b"ping").unwrap();
        let mut part = [0; 4];
        client.read_exact(&mut part).unwrap();
        assert_eq!(&part, b"part");
        // Until nobody on the way takes any more.
        client.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
        while sends_more && client.write(&[0; 4096]).is_ok() {}
        let outcome = client.read(&mut [0]).map_err(|error| error.kind());
        // The kernel shows a reset only to whom bytes were left unread.
        let wanted = if sends_more { Err(ErrorKind::ConnectionReset) } else { Ok(0) };
        assert_eq!(outcome, wanted);
    }
}
