//! Aegis from outside: the real binary, driven through sockets, signals and HTTP only. One module
//! a theme, and each test on both drivers where the driver can matter.
//!
//! `AEGIS_E2E_BINARY` puts another build to the same tests, such as the one in the image.

#[path = "../support/mod.rs"]
mod support;

mod admin;
mod chaos;
mod config;
mod drain;
mod failover;
mod integrity;
mod io_fallback;
mod kubernetes;
mod limits;
mod memory;
mod pooling;
mod proxy_protocol;
mod relay;
