//! Aegis from outside: the real binary, driven through sockets, signals and HTTP only. One module
//! a theme, and each test on both drivers where the driver can matter. Where the tests run as root,
//! proxies run as in a pod: as user 65532, without groups and capabilities.
//!
//! `AEGIS_E2E_BINARY` puts another build to the same tests, such as the one in the image.
//! `KUBEBUILDER_ASSETS` names a folder with etcd and kube-apiserver, to be used instead of a stand-in;
//! `AEGIS_E2E_OUTAGE` says for how many seconds the API is killed (1 unless set).

#[path = "../support/mod.rs"]
mod support;

mod admin;
mod admin_attacks;
mod balance;
mod black_holes;
mod budget;
mod chaos;
mod checks;
mod cli;
mod config;
mod control;
mod crowd;
mod databases;
mod diagnosis;
mod diagnosis_combined;
mod dns;
mod drain;
mod endings;
mod endpoint_wait;
mod ends;
mod ends_counted;
mod failover;
mod http;
mod integrity;
mod io_fallback;
mod kube_api_faults;
mod kube_sharing;
mod kube_snapshot;
mod kube_start;
mod kubernetes;
mod limits;
mod locality;
mod logging;
mod loops;
mod membership;
mod memory;
mod no_endpoint;
mod outage;
mod outage_attacks;
mod pages;
mod places;
mod platform;
mod pooling;
mod pressure;
mod promotion;
mod proxy_protocol;
mod queue;
mod refused_names;
mod relay;
mod replies;
mod requests;
mod restart;
mod routes;
mod routes_attacks;
mod routing;
mod shares;
mod stopped;
mod store_wait;
mod tap;
mod tap_signals;
mod threads;
mod tiers;
mod top;
mod transport;
mod unheard;
mod unix;
mod unix_attacks;
mod unprivileged;
mod uploads;
mod workers;
