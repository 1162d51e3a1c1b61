//! One session: what goes in on one side comes out on the other, ends and resets included.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::sync::mpsc::{self, Receiver, Sender};

use crate::support::backend::{Backend, reset_on_close};
use crate::support::client::{
    ask, connect, expect_echo, read_end, read_expected, read_line, read_to_end, reset,
};
use crate::support::metrics::{POOL_CONNECTIONS, SESSIONS_ACTIVE, SESSIONS_CLOSED};
use crate::support::proxy::{Builder, Proxy};
use crate::support::{Io, PATIENCE, on_both_drivers, pattern};

on_both_drivers![
    bytes_flow_both_ways,
    a_reply_follows_the_half_close_of_the_client,
    a_request_follows_the_half_close_of_the_backend,
    a_reset_by_the_backend_reaches_the_client_as_a_reset,
    a_reset_by_the_client_reaches_the_backend_as_a_reset,
    a_large_transfer_flows_both_ways_at_once,
    a_server_that_speaks_first_is_heard,
    a_banner_that_waited_in_a_warm_connection_is_heard_once,
    many_small_messages_go_back_and_forth,
    a_backend_that_closes_after_its_reply_loses_no_byte,
    a_client_that_closes_after_sending_loses_no_byte,
    a_client_that_closes_before_the_backend_is_connected_loses_no_byte,
];

fn proxy_to(io: Io, backend: &Backend) -> Proxy {
    Builder::on(io).backends(&[backend.address()]).start()
}

/// A backend whose connections report something to the test.
fn reporting<T: Send + 'static>(
    handler: impl Fn(&std::net::TcpStream, &Sender<T>) + Send + Sync + 'static,
) -> (Backend, Receiver<T>) {
    let (report, reports) = mpsc::channel();
    (Backend::scripted(move |stream| handler(stream, &report)), reports)
}

fn bytes_flow_both_ways(io: Io) {
    let backend = Backend::echo();
    let proxy = proxy_to(io, &backend);
    let client = connect(proxy.address());
    assert_eq!(ask(&client, "to and fro"), "to and fro");
    assert_eq!(ask(&client, "again"), "again");
    assert_eq!(proxy.log_field("io driver", "driver"), driver_name(io));
    drop(client);
    proxy.wait_for(SESSIONS_ACTIVE, &[], |sessions| sessions == 0);
    proxy.wait_for(SESSIONS_CLOSED, &[("reason", "finished")], |sessions| sessions == 1);
}

fn driver_name(io: Io) -> &'static str {
    match io {
        Io::Uring => "io_uring",
        Io::Epoll | Io::Auto => "epoll",
    }
}

fn a_reply_follows_the_half_close_of_the_client(io: Io) {
    let backend = Backend::scripted(|mut stream| {
        let count = read_to_end(stream).map_or(0, |bytes| bytes.len());
        let _ = stream.write_all(format!("got {count}").as_bytes());
    });
    let proxy = proxy_to(io, &backend);
    let mut client = connect(proxy.address());
    client.write_all(pattern(1, 100_000)).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_to_end(&client).unwrap(), b"got 100000");
}

fn a_request_follows_the_half_close_of_the_backend(io: Io) {
    let (backend, received) = reporting(|mut stream, received| {
        if stream.write_all(b"bye").is_ok() && stream.shutdown(Shutdown::Write).is_ok() {
            let _ = received.send(read_to_end(stream));
        }
    });
    // Without a pool: a connection that ends while idle would rightly be thrown away.
    let proxy = Builder::on(io).backends(&[backend.address()]).without_pool().start();
    let mut client = connect(proxy.address());
    assert_eq!(read_to_end(&client).unwrap(), b"bye");
    client.write_all(pattern(2, 100_000)).unwrap();
    drop(client);
    let received = received.recv_timeout(PATIENCE).unwrap().unwrap();
    assert!(received == pattern(2, 100_000));
}

fn a_reset_by_the_backend_reaches_the_client_as_a_reset(io: Io) {
    let backend = Backend::scripted(|stream| {
        let _ = read_line(stream);
        reset_on_close(stream);
    });
    let proxy = proxy_to(io, &backend);
    let mut client = connect(proxy.address());
    client.write_all(b"now\n").unwrap();
    let error = client.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
    proxy.wait_for(SESSIONS_CLOSED, &[("reason", "backend_reset")], |sessions| sessions == 1);
}

fn a_reset_by_the_client_reaches_the_backend_as_a_reset(io: Io) {
    let (backend, ends) = reporting(|mut stream, ends| {
        if read_line(stream).is_ok() && stream.write_all(b"heard\n").is_ok() {
            let _ = ends.send(stream.read(&mut [0]));
        }
    });
    let proxy = proxy_to(io, &backend);
    let client = connect(proxy.address());
    assert_eq!(ask(&client, "hello"), "heard");
    reset(client);
    let error = ends.recv_timeout(PATIENCE).unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
    proxy.wait_for(SESSIONS_CLOSED, &[("reason", "client_reset")], |sessions| sessions == 1);
}

fn a_large_transfer_flows_both_ways_at_once(io: Io) {
    let backend = Backend::echo();
    let proxy = proxy_to(io, &backend);
    expect_echo(&connect(proxy.address()), 3, 16 << 20).unwrap();
}

fn a_server_that_speaks_first_is_heard(io: Io) {
    let backend = greeter();
    let proxy = Builder::on(io).backends(&[backend.address()]).without_pool().start();
    expect_one_greeting_each(&proxy);
}

fn a_banner_that_waited_in_a_warm_connection_is_heard_once(io: Io) {
    let backend = greeter();
    let proxy = Builder::on(io).backends(&[backend.address()]).pool(1, 4).start();
    proxy.wait_for(POOL_CONNECTIONS, &[("state", "idle")], |idle| idle == 2);
    // More clients than warm connections: greetings that waited and greetings that did not.
    expect_one_greeting_each(&proxy);
}

fn greeter() -> Backend {
    Backend::scripted(|mut stream| {
        if stream.write_all(b"welcome\n").is_err() {
            return;
        }
        while let Ok(line) = read_line(stream) {
            if stream.write_all(format!("{line}!\n").as_bytes()).is_err() {
                return;
            }
        }
    })
}

fn expect_one_greeting_each(proxy: &Proxy) {
    for _ in 0..20 {
        let client = connect(proxy.address());
        assert_eq!(read_line(&client).unwrap(), "welcome");
        assert_eq!(ask(&client, "well"), "well!");
        client.shutdown(Shutdown::Write).unwrap();
        read_end(&client).unwrap();
    }
}

fn many_small_messages_go_back_and_forth(io: Io) {
    let backend = Backend::echo();
    let proxy = proxy_to(io, &backend);
    let mut client = connect(proxy.address());
    for number in 0..2000 {
        let message = pattern(number % 1000, 1 + number % 97);
        client.write_all(message).unwrap();
        read_expected(&client, message, 128).unwrap_or_else(|why| panic!("{number}: {why}"));
    }
}

fn a_backend_that_closes_after_its_reply_loses_no_byte(io: Io) {
    let backend = Backend::scripted(|mut stream| {
        if read_line(stream).is_ok() {
            let _ = stream.write_all(pattern(4, 1 << 20));
        }
    });
    let proxy = proxy_to(io, &backend);
    for _ in 0..30 {
        let mut client = connect(proxy.address());
        client.write_all(b"all of it\n").unwrap();
        read_expected(&client, pattern(4, 1 << 20), 10_000).unwrap();
        read_end(&client).unwrap();
    }
}

fn a_client_that_closes_after_sending_loses_no_byte(io: Io) {
    expect_all_bytes_of_clients_that_close(|backend| proxy_to(io, backend));
}

fn a_client_that_closes_before_the_backend_is_connected_loses_no_byte(io: Io) {
    expect_all_bytes_of_clients_that_close(|backend| {
        Builder::on(io).backends(&[backend.address()]).without_pool().start()
    });
}

fn expect_all_bytes_of_clients_that_close(start: impl Fn(&Backend) -> Proxy) {
    let (backend, received) = reporting(|stream, received| {
        // A warm connection that is thrown away ends with nothing read.
        match read_to_end(stream) {
            Ok(bytes) if bytes.is_empty() => {}
            outcome => drop(received.send(outcome)),
        }
    });
    let proxy = start(&backend);
    for number in 0..30 {
        let message = pattern(number, 1 + number * 10_000);
        connect(proxy.address()).write_all(message).unwrap();
        let received = received.recv_timeout(PATIENCE).unwrap().unwrap();
        assert!(received == message, "{} of {} bytes", received.len(), message.len());
    }
}
