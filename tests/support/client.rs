//! Clients: blocking sockets that never wait for longer than [`PATIENCE`].

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use socket2::SockRef;

use super::{PATIENCE, pattern};

/// Connects, with time limits on everything that follows.
pub fn try_connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    prepare(&stream)?;
    Ok(stream)
}

/// Connects, or fails the test.
pub fn connect(address: SocketAddr) -> TcpStream {
    try_connect(address).unwrap_or_else(|error| panic!("connecting to {address}: {error}"))
}

/// Limits how long reads and writes may take, and turns off Nagle's algorithm.
pub fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)
}

/// Sends a line and reads the line that answers it.
pub fn try_ask(mut stream: &TcpStream, request: &str) -> io::Result<String> {
    stream.write_all(format!("{request}\n").as_bytes())?;
    read_line(stream)
}

/// Sends a line and reads the answer, or fails the test.
pub fn ask(stream: &TcpStream, request: &str) -> String {
    try_ask(stream, request).unwrap_or_else(|error| panic!("asking {request:?}: {error}"))
}

/// A whole short session: connect, ask, close.
pub fn ask_once(address: SocketAddr, request: &str) -> io::Result<String> {
    try_ask(&try_connect(address)?, request)
}

/// Reads a line, a byte at a time: what follows it stays in the socket.
pub fn read_line(mut stream: &TcpStream) -> io::Result<String> {
    let mut line = Vec::new();
    let mut byte = [0];
    loop {
        stream.read_exact(&mut byte)?;
        if byte == *b"\n" {
            return String::from_utf8(line).map_err(io::Error::other);
        }
        line.push(byte[0]);
    }
}

/// Everything until the end of the stream.
pub fn read_to_end(mut stream: &TcpStream) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Reads `expected` in pieces of at most `piece` bytes; the error says where the stream differs.
pub fn read_expected(mut stream: &TcpStream, expected: &[u8], piece: usize) -> Result<(), String> {
    let mut buffer = vec![0; piece];
    let mut at = 0;
    while at < expected.len() {
        let want = piece.min(expected.len() - at);
        match stream.read(&mut buffer[..want]) {
            Ok(0) => return Err(format!("ended at {at} of {} bytes", expected.len())),
            Ok(n) if buffer[..n] == expected[at..at + n] => at += n,
            Ok(n) => return Err(format!("wrong bytes between {at} and {}", at + n)),
            Err(error) => return Err(format!("at {at} of {} bytes: {error}", expected.len())),
        }
    }
    Ok(())
}

/// Checks that the stream ends here.
pub fn read_end(mut stream: &TcpStream) -> Result<(), String> {
    match stream.read(&mut [0]) {
        Ok(0) => Ok(()),
        Ok(_) => Err("more bytes than were sent".to_owned()),
        Err(error) => Err(format!("instead of the end: {error}")),
    }
}

/// Sends random bytes of a seed, ends the direction, and meanwhile expects the same bytes back.
pub fn expect_echo(stream: &TcpStream, seed: usize, len: usize) -> Result<(), String> {
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let mut writer = stream;
            writer.write_all(pattern(seed, len))?;
            stream.shutdown(Shutdown::Write)
        });
        read_expected(stream, pattern(seed, len), 64 << 10)?;
        read_end(stream)?;
        sender.join().unwrap().map_err(|error| format!("sending: {error}"))
    })
}

/// Waits for the end of the connection, however it comes: end of stream or reset.
pub fn wait_closed(mut stream: &TcpStream) -> Result<(), String> {
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if is_timeout(&error) => return Err(format!("still open: {error}")),
            Err(_) => return Ok(()),
        }
    }
}

/// Whether nothing at all arrives for `quiet`.
pub fn is_silent(mut stream: &TcpStream, quiet: Duration) -> bool {
    stream.set_read_timeout(Some(quiet)).unwrap();
    let silent = loop {
        match stream.read(&mut [0]) {
            // The end of another test's child may interrupt a read.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            outcome => break outcome.is_err_and(|error| is_timeout(&error)),
        }
    };
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    silent
}

/// Closes with a reset instead of an end of stream.
pub fn reset(stream: TcpStream) {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    drop(stream);
}

pub fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}
