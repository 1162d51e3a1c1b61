//! The errors that clients get where nothing but an endpoint is missing.

use crate::support::client::{ask, connect};
use crate::support::kube_api::{KubeApi, Slice};
use crate::support::proxy::Builder;
use crate::support::{Io, on_both_drivers};

on_both_drivers!(a_request_that_may_not_wait_gets_the_error_that_no_endpoint_is_known);

/// That the queue is full is true, and not why.
fn a_request_that_may_not_wait_gets_the_error_that_no_endpoint_is_known(io: Io) {
    let api = KubeApi::start();
    // A Service without slices would hold the start.
    api.slice("a", &Slice::of(1));
    let proxy = Builder::on(io)
        .kubernetes(&api)
        .protocol("chronos", "request")
        .set("AEGIS_QUEUE_MAX", "0")
        .launch();
    proxy.wait_for("aegis_worker_applied_generation", &[], |generation| generation >= 2);
    let client = connect(proxy.address());
    assert_eq!(ask(&client, "GET a"), "ERR no endpoint is known");
    proxy.wait_for("aegis_requests_total", &[("outcome", "no_endpoint")], |count| count == 1);
    assert_eq!(proxy.metric("aegis_requests_total", &[("outcome", "queue_full")]), 0);
}
