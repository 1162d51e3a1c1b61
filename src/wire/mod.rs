//! Bytes of protocols: boundaries and headers, nothing more.

pub mod proxy_protocol;
