//! Where no thread can be had: the pod has as many as it may have, of whatever container.

use rustix::process::geteuid;

use crate::support::proxy::{Builder, Ended};
use crate::support::sandbox::can_drop_privileges;
use crate::support::{ports, skip};

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
    assert!(errors.contains("aegis-proxy: Resource temporarily unavailable"), "{errors}");
    // More than a pipe takes in one piece.
    let (code, errors) = told(builder().set("AEGIS_IO", "x".repeat(6000)).run());
    assert_eq!(code, Some(78), "{errors}");
    assert!(errors.contains("AEGIS_IO=") && errors.contains("Accepted: auto"), "{errors}");
    let (code, errors) = told(builder().argument("healthcheck").run());
    let wanted = format!("aegis-proxy: readyz: nothing listens at {closed}\n");
    assert_eq!((code, errors), (Some(1), wanted));
}
