//! Aegis from outside: the real binary, driven through sockets, signals and HTTP only. One module
//! a theme, and each test on both drivers where the driver can matter.
//!
//! `AEGIS_E2E_BINARY` puts another build to the same tests, such as the one in the image.
//! `KUBEBUILDER_ASSETS` names a folder with etcd and kube-apiserver, to be used instead of a stand-in;
//! `AEGIS_E2E_OUTAGE` says for how many seconds the API is killed (1 unless set).

#[path = "../support/mod.rs"]
mod support;

mod admin;
mod answers;
mod black_holes;
mod budget;
mod chaos;
mod config;
mod crowd;
mod databases;
mod drain;
mod endings;
mod failover;
mod http;
mod integrity;
mod io_fallback;
mod kubernetes;
mod limits;
mod membership;
mod memory;
mod no_endpoint;
mod outage;
mod pooling;
mod pressure;
mod proxy_protocol;
mod relay;
mod requests;
mod routing;
mod transport;
mod workers;
