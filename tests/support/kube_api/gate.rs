//! The network between the proxy and the API: passes bytes on until the test says otherwise.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Open,
    /// New connections are closed at once.
    Closed,
    /// Bytes are taken and go nowhere, in both directions; nothing is ever closed.
    Silent,
}

struct State {
    mode: Mutex<Mode>,
    changed: Condvar,
    streams: Mutex<Vec<TcpStream>>,
    passed: AtomicUsize,
}

pub struct Gate {
    address: SocketAddr,
    state: Arc<State>,
}

impl Gate {
    pub fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            mode: Mutex::new(Mode::Open),
            changed: Condvar::new(),
            streams: Mutex::default(),
            passed: AtomicUsize::new(0),
        });
        let shared = state.clone();
        // It lives as long as the test program.
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                if *shared.mode.lock().unwrap() == Mode::Closed {
                    continue;
                }
                let Ok(server) = TcpStream::connect(target) else { continue };
                shared.passed.fetch_add(1, Relaxed);
                for stream in [&client, &server] {
                    let _ = stream.set_nodelay(true);
                    shared.streams.lock().unwrap().push(stream.try_clone().unwrap());
                }
                let ends =
                    [(client.try_clone().unwrap(), server.try_clone().unwrap()), (server, client)];
                for (from, to) in ends {
                    let shared = shared.clone();
                    thread::spawn(move || pass(from, to, &shared));
                }
            }
        });
        Self { address, state }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How many connections it has let through.
    pub fn passed(&self) -> usize {
        self.state.passed.load(Relaxed)
    }

    /// Cuts all connections; new ones are let through.
    pub fn cut(&self) {
        for stream in self.state.streams.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// As if the server had died.
    pub fn close(&self) {
        self.set(Mode::Closed);
        self.cut();
    }

    /// As if a firewall had forgotten the connections that there are. New ones get no answer.
    pub fn silence(&self) {
        self.set(Mode::Silent);
    }

    /// Lets new connections through; those that fell silent stay so, for they are forgotten.
    pub fn open(&self) {
        self.set(Mode::Open);
    }

    fn set(&self, mode: Mode) {
        *self.state.mode.lock().unwrap() = mode;
        self.state.changed.notify_all();
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, state: &State) {
    let mut buffer = [0; 16 << 10];
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        if *state.mode.lock().unwrap() == Mode::Silent {
            // For ever, as far as these two ends are concerned.
            while let Ok(1..) = from.read(&mut buffer) {}
            return;
        }
        if to.write_all(&buffer[..n]).is_err() {
            break;
        }
    }
    if *state.mode.lock().unwrap() != Mode::Silent {
        let _ = to.shutdown(Shutdown::Write);
    }
}
