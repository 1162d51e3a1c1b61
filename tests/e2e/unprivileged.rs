//! As in a pod: a user without a name and without any capability.

use std::fs;

use crate::support::backend::Backend;
use crate::support::client::ask_once;
use crate::support::proxy::Builder;
use crate::support::sandbox::{UNPRIVILEGED, can_drop_privileges};
use crate::support::{Io, PATIENCE, on_both_drivers, skip};

on_both_drivers![all_works_without_any_privilege_and_without_a_warning];

fn all_works_without_any_privilege_and_without_a_warning(io: Io) {
    if !can_drop_privileges() {
        return skip("only root may choose another user for the proxy");
    }
    let backend = Backend::named("up");
    let mut proxy = Builder::on(io)
        .backends(&[backend.address()])
        .set("AEGIS_LISTEN", "127.0.0.1:0,[::1]:0")
        .set("AEGIS_LOG", "debug")
        .start();
    let status = fs::read_to_string(format!("/proc/{}/status", proxy.id())).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name));
        line.unwrap_or_else(|| panic!("no {name} in {status}")).split_whitespace().skip(1)
    };
    for ids in ["Uid:", "Gid:"] {
        assert!(field(ids).all(|id| id == UNPRIVILEGED.to_string()), "{status}");
    }
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert!(field(set).eq(["0000000000000000"]), "{status}");
    }
    assert!(field("NoNewPrivs:").eq(["1"]), "{status}");
    assert_eq!(ask_once(proxy.address(), "up?").unwrap(), "up");
    proxy.terminate();
    proxy.wait_clean(PATIENCE);
    assert_eq!(proxy.log_warnings(), [""; 0]);
}
