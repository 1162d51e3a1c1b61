//! Cancel requests of `PostgreSQL`, which reach the endpoint of the session that they are about, whichever
//! that is.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::support::metrics::{CONNECT_RETRIES, ENDPOINT_USABLE};
use crate::support::proxy::{Builder, Proxy};
use crate::support::servers::{Postgres, Target};
use crate::support::{Io, PATIENCE, eventually, on_both_drivers};

use super::{assert_all_finished, drivers, installed};

/// For process 42.
const CANCEL: [u8; 16] = [0, 0, 0, 16, 4, 210, 22, 46, 0, 0, 0, 42, 1, 2, 3, 4];

on_both_drivers!(
    a_cancel_request_reaches_every_endpoint_before_its_client_hears_the_end,
    an_endpoint_that_does_not_answer_is_passed_over,
    an_endpoint_that_refuses_is_passed_over,
    what_else_a_client_begins_with_goes_to_one_endpoint,
    a_cancel_request_behind_a_refused_encryption_reaches_every_endpoint,
);

/// `SSLRequest` and `GSSENCRequest`, which the servers here refuse.
const NEGOTIATIONS: [[u8; 8]; 2] = [[0, 0, 0, 8, 4, 210, 22, 47], [0, 0, 0, 8, 4, 210, 22, 48]];

/// What a server does with a connection on which something has come.
#[derive(Clone, Copy, PartialEq)]
enum Then {
    /// It ends it, as `PostgreSQL` does.
    End,
    /// It keeps it.
    Keep,
}

/// A server, and what each of its connections begins with.
fn server(then: Then, heard: Sender<Vec<u8>>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, heard) = (stream.unwrap(), heard.clone());
            thread::spawn(move || {
                let mut bytes = [0; 64];
                let mut count = stream.read(&mut bytes).unwrap_or(0);
                while NEGOTIATIONS.iter().any(|asks| bytes[..count] == asks[..]) {
                    let _ = stream.write_all(b"N");
                    count = stream.read(&mut bytes).unwrap_or(0);
                }
                if count > 0 {
                    // The test may be over.
                    let _ = heard.send(bytes[..count].to_vec());
                }
                if count > 0 && then == Then::Keep {
                    let _ = stream.read(&mut bytes);
                }
            });
        }
    });
    address
}

/// Several servers, what they hear, and a proxy in front of them with so many warm connections to each.
fn start(io: Io, servers: &[Then], warm: u64) -> (Vec<Receiver<Vec<u8>>>, Proxy) {
    let begin = |then: &Then| {
        let (sender, hears) = channel();
        (server(*then, sender), hears)
    };
    let (addresses, hear): (Vec<_>, Vec<_>) = servers.iter().map(begin).unzip();
    let builder = Builder::on(io).backends(&addresses).set("AEGIS_PRESET", "postgres");
    (hear, builder.pool(warm, warm).start())
}

fn begin_with(proxy: &Proxy, bytes: &[u8]) -> TcpStream {
    let mut client = TcpStream::connect(proxy.address()).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.write_all(bytes).unwrap();
    client
}

/// Waits until the client hears the end, and nothing else.
fn hears_the_end(mut client: TcpStream) {
    assert_eq!(client.read(&mut [0; 64]).unwrap(), 0);
}

fn a_cancel_request_reaches_every_endpoint_before_its_client_hears_the_end(io: Io) {
    for warm in [0, 2] {
        let (hear, proxy) = start(io, &[Then::End; 5], warm);
        for half_closes in [false, true, false, true] {
            let client = begin_with(&proxy, &CANCEL);
            if half_closes {
                client.shutdown(std::net::Shutdown::Write).unwrap();
            }
            hears_the_end(client);
            for (at, hears) in hear.iter().enumerate() {
                let heard: Vec<_> = hears.try_iter().collect();
                assert_eq!(heard, [CANCEL], "endpoint {at}");
            }
        }
        assert_all_finished(&proxy);
        let metrics = proxy.metrics();
        assert_eq!(metrics.sum(ENDPOINT_USABLE, &[]), Some(5), "it says nothing about them");
        assert_eq!(metrics.sum(CONNECT_RETRIES, &[]), Some(0));
    }
}

fn an_endpoint_that_does_not_answer_is_passed_over(io: Io) {
    let (hear, proxy) = start(io, &[Then::Keep, Then::End, Then::Keep], 0);
    let start = Instant::now();
    hears_the_end(begin_with(&proxy, &CANCEL));
    assert!(start.elapsed() >= Duration::from_secs(2), "each has its time");
    for hears in &hear {
        assert_eq!(hears.try_iter().collect::<Vec<_>>(), [CANCEL]);
    }
    assert_all_finished(&proxy);
}

fn an_endpoint_that_refuses_is_passed_over(io: Io) {
    let (sender, hears) = channel();
    let answer = [(); 2].map(|()| server(Then::End, sender.clone()));
    let refuse = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    let refuse = refuse.map(|listener| listener.local_addr().unwrap());
    let servers = [refuse[0], answer[0], refuse[1], answer[1]];
    let builder = Builder::on(io).backends(&servers).set("AEGIS_PRESET", "postgres");
    let proxy = builder.without_pool().start();
    for _ in 0..5 {
        hears_the_end(begin_with(&proxy, &CANCEL));
        assert_eq!(hears.try_iter().collect::<Vec<_>>(), [CANCEL, CANCEL]);
    }
}

fn what_else_a_client_begins_with_goes_to_one_endpoint(io: Io) {
    let (hear, proxy) = start(io, &[Then::End; 3], 0);
    let (mut start, mut longer) = (CANCEL, [0; 17]);
    start[4..8].copy_from_slice(&196_608_u32.to_be_bytes());
    longer[..16].copy_from_slice(&CANCEL);
    for bytes in [&start[..], &longer, &CANCEL[..15]] {
        hears_the_end(begin_with(&proxy, bytes));
        let heard: Vec<_> = hear.iter().flat_map(Receiver::try_iter).collect();
        assert_eq!(heard, [bytes]);
    }
}

/// As libpq does from version 17 on where it prefers encryption.
fn a_cancel_request_behind_a_refused_encryption_reaches_every_endpoint(io: Io) {
    for warm in [0, 2] {
        let (hear, proxy) = start(io, &[Then::End; 3], warm);
        for asks in [&NEGOTIATIONS[..1], &NEGOTIATIONS] {
            let mut client = TcpStream::connect(proxy.address()).unwrap();
            client.set_read_timeout(Some(PATIENCE)).unwrap();
            for ask in asks {
                client.write_all(ask).unwrap();
                let mut refusal = [0];
                client.read_exact(&mut refusal).unwrap();
                assert_eq!(&refusal, b"N");
            }
            client.write_all(&CANCEL).unwrap();
            hears_the_end(client);
            for hears in &hear {
                assert_eq!(hears.try_iter().collect::<Vec<_>>(), [CANCEL]);
            }
        }
        assert_all_finished(&proxy);
    }
}

/// psql with a statement that takes longer than any test.
fn sleeps(server: &Postgres, target: &Target) -> Child {
    let mut psql: Command = server.psql(target);
    psql.args(["-c", "select pg_sleep(600)"]);
    psql.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

#[test]
fn psql_cancels_its_statement_on_whichever_server_it_is() {
    let Some(first) = installed(Postgres::start(&[])) else { return };
    let Some(second) = installed(Postgres::start(&[])) else { return };
    let servers = [&first, &second];
    let asleep = |server: &Postgres| {
        let count = "select count(*) from pg_stat_activity where wait_event = 'PgSleep'";
        server.ask(&Target::Tcp(server.address()), count).unwrap()
    };
    for io in drivers() {
        let proxy = Builder::on(io)
            .backends(&servers.map(Postgres::address))
            .set("AEGIS_PRESET", "postgres")
            .set("AEGIS_BALANCE", "round_robin")
            .set("AEGIS_WORKERS", "1")
            .start();
        let clients: Vec<_> = (0..6).map(|_| sleeps(&first, &proxy.address().into())).collect();
        for server in servers {
            eventually("half of them are there", PATIENCE, || {
                (asleep(server) == "3").then_some(())
            });
        }
        for client in &clients {
            // It asks the server, at the address that it knows, to cancel what it does.
            kill_process(Pid::from_child(client), Signal::INT).unwrap();
        }
        for client in clients {
            let output = client.wait_with_output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(said.contains("canceling statement due to user request"), "{said}");
        }
        assert_all_finished(&proxy);
    }
}
