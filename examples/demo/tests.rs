//! The store, through real sockets.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::time::timeout;

use crate::store::{MAX_HEAD, MAX_LINE, Store};

const PATIENCE: Duration = Duration::from_secs(20);

/// Serves the store in `dir` for as long as `talk` runs with its address.
fn serving<F: Future<Output = ()>>(dir: &Path, talk: impl FnOnce(SocketAddr) -> F) {
    let store = Store::open(dir).unwrap();
    let runtime = Runtime::new().unwrap();
    runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        tokio::spawn(async move { store.serve(listener).await });
        timeout(PATIENCE, talk(addr)).await.unwrap();
    });
}

fn with_store<F: Future<Output = ()>>(talk: impl FnOnce(SocketAddr) -> F) {
    serving(tempfile::tempdir().unwrap().path(), talk);
}

async fn connect(addr: SocketAddr) -> TcpStream {
    let socket = TcpStream::connect(addr).await.unwrap();
    socket.set_nodelay(true).unwrap();
    socket
}

/// Reads exactly what is expected and nothing else.
async fn expect(socket: &mut TcpStream, reply: &[u8]) {
    let mut got = vec![0; reply.len()];
    socket.read_exact(&mut got).await.unwrap();
    assert_eq!(String::from_utf8_lossy(&got), String::from_utf8_lossy(reply));
}

async fn expect_end(socket: &mut TcpStream) {
    assert_eq!(socket.read(&mut [0]).await.unwrap(), 0);
}

async fn ask(socket: &mut TcpStream, request: &[u8], reply: &[u8]) {
    socket.write_all(request).await.unwrap();
    expect(socket, reply).await;
}

/// Sends, and reads to the end.
async fn ask_all(addr: SocketAddr, request: &[u8]) -> String {
    let mut socket = connect(addr).await;
    socket.write_all(request).await.unwrap();
    socket.shutdown().await.unwrap();
    let mut reply = Vec::new();
    socket.read_to_end(&mut reply).await.unwrap();
    String::from_utf8(reply).unwrap()
}

fn response(status: &str, connection: &str, length: usize, body: &str) -> Vec<u8> {
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {length}\r\n\
         {connection}\r\n{body}"
    )
    .into_bytes()
}

#[test]
fn every_command_has_its_reply() {
    with_store(async |addr| {
        let mut socket = connect(addr).await;
        for (request, reply) in [
            ("PING\n", "PONG\n"),
            ("ping\r\n", "PONG\n"),
            ("GET k\n", "NULL\n"),
            ("SET k v\n", "OK\n"),
            ("gEt k\n", "v\n"),
            ("Set k  some \t value with   blanks \r\n", "OK\n"),
            ("GET  k \n", "some value with blanks\n"),
            ("COMPACT\n", "OK_COMPACTED\n"),
            ("GET k\n", "some value with blanks\n"),
            ("GET K\n", "NULL\n"),
            ("DEL k\n", "OK_DELETED\n"),
            ("DEL k\n", "OK_DELETED\n"),
            ("GET k\n", "NULL\n"),
            ("compact\n", "OK_COMPACTED\n"),
            ("SET k\n", "ERR usage: SET key value\n"),
            ("GET\n", "ERR usage: GET key\n"),
            ("GET a b\n", "ERR usage: GET key\n"),
            ("DEL\n", "ERR usage: DEL key\n"),
            ("HELLO\n", "ERR_UNKNOWN_COMMAND\n"),
            ("PING PONG\n", "ERR_UNKNOWN_COMMAND\n"),
            (" \r\n", "ERR_UNKNOWN_COMMAND\n"),
            ("GET x HTTP/1.1\n", "ERR usage: GET key\n"),
        ] {
            ask(&mut socket, request.as_bytes(), reply.as_bytes()).await;
        }
        ask(&mut socket, b"SET b \xff\xfe\nGET b\n", b"OK\n\xff\xfe\n").await;
    });
}

#[test]
fn a_value_may_look_like_http() {
    with_store(async |addr| {
        for (requests, replies) in [
            ("SET proto HTTP/1.1\nGET proto\n", "OK\nHTTP/1.1\n"),
            ("SET /k HTTP/1.1\nGET /k\n", "OK\nHTTP/1.1\n"),
            ("set k GET / HTTP/1.1\nget k\n", "OK\nGET / HTTP/1.1\n"),
            ("GET k HTTP/1.1\nPING\n", "ERR usage: GET key\nPONG\n"),
        ] {
            assert_eq!(ask_all(addr, requests.as_bytes()).await, replies);
        }
    });
}

#[test]
fn pipelined_lines_are_answered_in_order() {
    with_store(async |addr| {
        let lines = |line: fn(u32) -> String| (0..2000).map(line).collect::<Vec<_>>().concat();
        let requests = lines(|i| format!("SET k{i} v {i}\nGET k{i}\n"));
        let replies = lines(|i| format!("OK\nv {i}\n"));
        assert_eq!(ask_all(addr, requests.as_bytes()).await, replies);
        assert_eq!(ask_all(addr, b"PING\nPING").await, "PONG\n", "half a line is no command");
    });
}

#[test]
fn requests_may_be_split_anywhere() {
    with_store(async |addr| {
        let get = response("200 OK", "", 3, "v w");
        for (request, reply) in [
            (&b"SET k v  w\r\nGET k\nPING\n"[..], &b"OK\nv w\nPONG\n"[..]),
            (b"GET /k HTTP/1.1\r\nHost: demo\r\n\r\n", &get),
        ] {
            for at in 1..request.len() {
                let mut socket = connect(addr).await;
                socket.write_all(&request[..at]).await.unwrap();
                tokio::time::sleep(Duration::from_millis(2)).await;
                ask(&mut socket, &request[at..], reply).await;
            }
            let mut socket = connect(addr).await;
            for byte in request.chunks(1) {
                socket.write_all(byte).await.unwrap();
                tokio::task::yield_now().await;
            }
            expect(&mut socket, reply).await;
        }
    });
}

#[test]
fn lines_are_bounded() {
    with_store(async |addr| {
        let mut socket = connect(addr).await;
        let value = "v".repeat(MAX_LINE - "SET k ".len());
        ask(&mut socket, format!("SET k {value}\nGET k\n").as_bytes(), b"OK\n").await;
        expect(&mut socket, format!("{value}\n").as_bytes()).await;
        for end in ["", "\nPING\n"] {
            let mut socket = connect(addr).await;
            let long = format!("SET k {value}v{end}");
            ask(&mut socket, long.as_bytes(), b"ERR line too long\n").await;
            expect_end(&mut socket).await;
        }
    });
}

#[test]
fn http_keeps_alive_as_the_version_says() {
    with_store(async |addr| {
        let hello = "Hello Aegis\n";
        let kept = response("200 OK", "", 12, hello);
        let kept_old = response("200 OK", "Connection: keep-alive\r\n", 12, hello);
        let closed = response("200 OK", "Connection: close\r\n", 12, hello);

        let mut socket = connect(addr).await;
        for _ in 0..3 {
            ask(&mut socket, b"GET / HTTP/1.1\r\nHost: demo\r\n\r\n", &kept).await;
        }
        ask(&mut socket, b"GET / HTTP/1.1\r\nconnection: TE, Close\r\n\r\n", &closed).await;
        expect_end(&mut socket).await;

        let mut socket = connect(addr).await;
        for _ in 0..3 {
            let request = b"GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n";
            ask(&mut socket, request, &kept_old).await;
        }
        ask(&mut socket, b"GET / HTTP/1.0\r\n\r\n", &closed).await;
        expect_end(&mut socket).await;
    });
}

#[test]
fn http_reads_keys() {
    with_store(async |addr| {
        assert_eq!(ask_all(addr, "SET k v w\nSET é/x y\n".as_bytes()).await, "OK\nOK\n");
        let mut socket = connect(addr).await;
        let v = response("200 OK", "", 3, "v w");
        ask(&mut socket, b"GET /k HTTP/1.1\r\n\r\n", &v).await;
        ask(&mut socket, b"GET /k?q HTTP/1.1\n\n", &v).await;
        let y = response("200 OK", "", 1, "y");
        ask(&mut socket, b"GET /%C3%a9/x HTTP/1.1\r\n\r\n", &y).await;
        let missing = response("404 Not Found", "", 10, "not found\n");
        ask(&mut socket, b"GET /none HTTP/1.1\r\n\r\n", &missing).await;
        // Responses to HEAD have no body: what follows is the next response at once.
        let head = [response("200 OK", "", 3, ""), v.clone()].concat();
        ask(&mut socket, b"HEAD /k HTTP/1.1\r\n\r\nGET /k HTTP/1.1\r\n\r\n", &head).await;
        let head = [response("404 Not Found", "", 10, ""), v].concat();
        ask(&mut socket, b"HEAD /none HTTP/1.1\r\n\r\nGET /k HTTP/1.1\r\n\r\n", &head).await;
        let bad = response("400 Bad Request", "", 0, "");
        ask(&mut socket, b"GET /%zz HTTP/1.1\r\n\r\n", &bad).await;
        let status = "405 Method Not Allowed\r\nAllow: GET, HEAD";
        let refused = response(status, "Connection: close\r\n", 0, "");
        ask(&mut socket, b"PUT /k HTTP/1.1\r\nContent-Length: 1\r\n\r\nx", &refused).await;
        expect_end(&mut socket).await;
    });
}

#[test]
fn http_requests_may_be_pipelined() {
    with_store(async |addr| {
        let requests = "GET / HTTP/1.1\r\nHost: demo\r\n\r\n".repeat(3000);
        let replies = response("200 OK", "", 12, "Hello Aegis\n").repeat(3000);
        assert!(ask_all(addr, requests.as_bytes()).await.as_bytes() == replies);
    });
}

#[test]
fn http_heads_are_bounded() {
    with_store(async |addr| {
        let status = "431 Request Header Fields Too Large";
        let refused = response(status, "Connection: close\r\n", 0, "");
        let long = "x".repeat(MAX_HEAD);
        let many = "a: b\r\n".repeat(MAX_HEAD / 4);
        for request in [
            format!("GET / HTTP/1.1\r\nlong: {long}"),
            format!("GET / HTTP/1.1\r\nlong: {long}\r\n\r\n"),
            format!("GET / HTTP/1.1\r\n{many}\r\n"),
            format!("GET /{long} HTTP/1.1\r\n\r\n"),
        ] {
            let mut socket = connect(addr).await;
            ask(&mut socket, request.as_bytes(), &refused).await;
            expect_end(&mut socket).await;
        }
        let mut socket = connect(addr).await;
        let bad = response("400 Bad Request", "Connection: close\r\n", 0, "");
        let hello = response("200 OK", "", 12, "Hello Aegis\n");
        let replies = [hello, bad].concat();
        ask(&mut socket, b"GET / HTTP/1.1\r\n\r\nPING\r\n", &replies).await;
        expect_end(&mut socket).await;
    });
}

#[test]
fn many_connections_are_served_at_once() {
    with_store(async |addr| {
        let mut sockets = Vec::new();
        for _ in 0..200 {
            sockets.push(connect(addr).await);
        }
        for (i, socket) in sockets.iter_mut().enumerate() {
            ask(socket, format!("SET k{i} {i}\n").as_bytes(), b"OK\n").await;
        }
        for (i, socket) in sockets.iter_mut().rev().enumerate() {
            ask(socket, format!("GET k{i}\n").as_bytes(), format!("{i}\n").as_bytes()).await;
        }
    });
}

#[test]
fn data_survives_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    serving(dir.path(), async |addr| {
        let replies = ask_all(addr, b"SET a 1\nSET b 2\nCOMPACT\nDEL b\nSET c 3\n").await;
        assert_eq!(replies, "OK\nOK\nOK_COMPACTED\nOK_DELETED\nOK\n");
    });
    serving(dir.path(), async |addr| {
        assert_eq!(ask_all(addr, b"GET a\nGET b\nGET c\n").await, "1\nNULL\n3\n");
    });
}
