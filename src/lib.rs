//! Aegis: a Layer 4 TCP proxy and connection pooler for the sidecar of a database's clients.
//!
//! ```text
//! application ──▶ 127.0.0.1:8081 ─┬─ worker 0 (core 0): driver, own listener, own pools ─┐
//!                                 ├─ worker 1 (core 1): …                                ├─▶ endpoints
//!                                 └─ worker N                                            ┘
//!                   [::]:8082 ◀── control thread: tokio; discovery, admin HTTP, signals
//! ```
//!
//! Two planes meet in two places only: one [`worker::mailbox::Mailbox`] per worker, and the counters
//! in [`metrics`], each of which one worker writes and the others read. Through the mailbox a worker
//! with many sessions hands a new client over to one with few. Dependencies point inward:
//!
//! | module | what it is |
//! | --- | --- |
//! | [`cli`] | the command line: check, help, what is printed and exit codes |
//! | [`config`] | environment → `RawConfig` → checked `Config` |
//! | [`limits`] | every bound: unit, reason, and what follows from it |
//! | [`listening`] | which addresses lead back to this process |
//! | [`startup`] | decided before anything is bound: cores, driver, capacity; then listeners |
//! | [`metrics`] | one row per metric: a worker's counter, the text, the reference page |
//! | [`capture`] | what a tap has captured of a client: records, bounded by the file they become |
//! | [`slab`], [`fifo`] | fixed-capacity slots with generations; a queue that stays in its memory |
//! | [`proxy`] | decides: sessions, relays, requests, pools, balancing, health; no I/O, no clock, no unsafe |
//! | [`protocol`] | all that is known of a protocol: TCP, Chronos, HTTP/1; the PROXY protocol's header |
//! | [`io`] | does: the `io_uring` and epoll drivers and the seeded simulator; the only unsafe code |
//! | [`worker`] | one core: binds `proxy` to `io`, turn by turn |
//! | [`control`] | the control thread, on tokio: discovery, admin HTTP, control socket, lifecycle |
//!
//! Where to look first:
//!
//! | what | where |
//! | --- | --- |
//! | how many workers there are, and on which cores | `startup/cores.rs` |
//! | a worker's loop, on any driver; how epoll waits | `worker/turn.rs`; [`io::epoll`] |
//! | the endpoints, and which one is chosen | [`proxy::endpoints`] as delivered, [`proxy::balance`] as a worker uses them |
//! | how a connection moves in and out of a pool | `proxy/balance/conns.rs`; what a pool keeps: [`proxy::pool`] |
//! | why a pooled connection is closed | [`metrics::Discard`] |
//! | what a session does when a side ends or resets | [`proxy::session`] |
//! | what an error looks like to the client | [`protocol::ErrorReply`], and `write_error` of each protocol |
//! | what happens on SIGTERM | [`control::lifecycle`] |

// Here alone: in the test and bench crates nothing is reachable from outside.
#![warn(unreachable_pub)]

pub mod capture;
pub mod cli;
pub mod config;
pub mod control;
pub mod fifo;
pub mod io;
pub mod limits;
pub mod listening;
pub mod metrics;
pub mod protocol;
pub mod proxy;
pub mod slab;
pub mod startup;
pub mod worker;
