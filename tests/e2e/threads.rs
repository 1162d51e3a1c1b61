//! Where no thread can be had: the pod has as many as it may have, of whatever container.

use std::time::{Duration, Instant};

use rustix::process::geteuid;

use crate::support::backend::Backend;
use crate::support::client::ask_once;
use crate::support::kube_api::{KubeApi, host_ip};
use crate::support::metrics::DISCOVERY_ERRORS;
use crate::support::proxy::{Builder, Ended};
use crate::support::sandbox::can_drop_privileges;
use crate::support::{Io, PATIENCE, eventually, ports, skip};

/// Whether limits hold for what is started here.
fn is_limited() -> bool {
    let is_limited = can_drop_privileges() || !geteuid().is_root();
    if !is_limited {
        skip("root may have as many threads as it likes");
    }
    is_limited
}

#[test]
fn what_is_wrong_is_said_without_a_thread() {
    if !is_limited() {
        return;
    }
    let closed = ports::unused([127, 0, 0, 1].into());
    let builder = || Builder::bare().set("AEGIS_ADMIN", closed.to_string()).without_threads();
    let told = |Ended { code, errors, .. }: Ended| (code, errors);
    let (code, errors) = told(builder().set("AEGIS_LISTEN", "127.0.0.1:0").run());
    assert_eq!(code, Some(1), "{errors}");
    assert!(
        errors.contains("aegis-proxy: no thread for the log: Resource temporarily unavailable"),
        "{errors}"
    );
    // More than a pipe takes in one piece.
    let (code, errors) = told(builder().set("AEGIS_IO", "x".repeat(6000)).run());
    assert_eq!(code, Some(78), "{errors}");
    assert!(errors.contains("AEGIS_IO=") && errors.contains("Accepted: auto"), "{errors}");
    let (code, errors) = told(builder().argument("healthcheck").run());
    let wanted = format!("aegis-proxy: readyz: nothing listens at {closed}\n");
    assert_eq!((code, errors), (Some(1), wanted));
}

/// The name of the API server is looked up by the system's resolver, which needs a thread.
#[test]
fn the_api_server_is_looked_up_though_no_thread_can_be_had_any_more() {
    /// An idle thread would end after 10 s.
    const WINDOW: Duration = Duration::from_secs(11);
    if !is_limited() {
        return;
    }
    let api = KubeApi::start();
    let servers = [(); 2].map(|()| Backend::named_at("a", host_ip()));
    api.announce("a", servers[0].address());
    api.set_server_name("localhost");
    let mut proxy = Builder::on(Io::Epoll).kubernetes(&api).start();
    proxy.wait_for_endpoints(1);
    proxy.limit("--nproc=1");
    let begun = Instant::now();
    eventually("it was not looked up for long", WINDOW + PATIENCE, || {
        assert_eq!(ask_once(proxy.address(), "who").unwrap(), "a");
        (begun.elapsed() >= WINDOW).then_some(())
    });
    api.gate.close();
    api.announce("b", servers[1].address());
    proxy.wait_for(DISCOVERY_ERRORS, &[], |errors| errors > 0);
    api.gate.open();
    proxy.wait_for_endpoints(2);
    assert_eq!(ask_once(proxy.address(), "who").unwrap(), "a");
    proxy.terminate();
    proxy.wait_clean(PATIENCE);
}
