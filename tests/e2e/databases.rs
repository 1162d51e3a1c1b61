//! Real databases behind the proxy: their own clients and load tools, what their servers make of warm
//! connections, and what `docs/DATABASES.md` says about them.

mod cancel;
mod facts;
mod loads;
mod logins;
mod switchover;

use crate::support::proxy::{Builder, Proxy};
use crate::support::servers::Missing;
use crate::support::{Io, skip, uring_unavailable};

/// What a test needs, where it is installed.
fn installed<T>(server: Result<T, Missing>) -> Option<T> {
    server.inspect_err(|Missing(what)| skip(what)).ok()
}

/// A server is started once for both, which takes longer than what is asked of it.
fn drivers() -> Vec<Io> {
    let uring = uring_unavailable().is_none().then_some(Io::Uring);
    uring.into_iter().chain([Io::Epoll]).collect()
}

/// A proxy in front of one server, as by default.
fn in_front_of(io: Io, server: std::net::SocketAddr) -> Builder {
    Builder::on(io).backends(&[server])
}

/// Checks that every session so far has ended in order.
fn assert_all_finished(proxy: &Proxy) {
    use crate::support::metrics::{SESSIONS_ACTIVE, SESSIONS_CLOSED, SESSIONS_OPENED};
    proxy.wait_for(SESSIONS_ACTIVE, &[], |active| active == 0);
    let metrics = proxy.metrics();
    let opened = metrics.sum(SESSIONS_OPENED, &[]);
    let finished = metrics.sum(SESSIONS_CLOSED, &[("reason", "finished")]);
    assert_eq!(finished, opened, "{}", metrics.describe(SESSIONS_CLOSED));
}
