//! What must not pass for an outage, and what must not last longer for others in one.

use std::io::{Read, Write};

use crate::support::backend::Backend;
use crate::support::client::{ask_once, connect, read_line};
use crate::support::metrics::ENDPOINT_USABLE;
use crate::support::proxy::Builder;
use crate::support::{Io, on_both_drivers};

on_both_drivers![a_client_whom_the_server_ends_without_a_word_makes_nobody_wait];

/// As `PostgreSQL` does with what is no beginning of a session.
fn a_client_whom_the_server_ends_without_a_word_makes_nobody_wait(io: Io) {
    let backend = Backend::scripted(|mut stream| {
        while read_line(stream).is_ok_and(|line| line == "good") {
            if stream.write_all(b"well\n").is_err() {
                return;
            }
        }
    });
    for warm in [0, 2] {
        let proxy = Builder::on(io)
            .set("AEGIS_WORKERS", "1")
            .backends(&[backend.address()])
            .pool(warm, warm)
            .start();
        for _ in 0..10 {
            assert_eq!(ask_once(proxy.address(), "good").unwrap(), "well");
            // One more in a row than ejects an endpoint.
            for _ in 0..4 {
                let mut client = connect(proxy.address());
                client.write_all(b"bad\n").unwrap();
                assert_eq!(client.read(&mut [0]).unwrap(), 0);
            }
        }
        let metrics = proxy.metrics();
        assert_eq!(metrics.sum(ENDPOINT_USABLE, &[]), Some(1));
        assert_eq!(metrics.sum("aegis_outage_seconds_total", &[]), Some(0), "nobody has waited");
        assert_eq!(proxy.log_warnings(), [""; 0]);
    }
}
