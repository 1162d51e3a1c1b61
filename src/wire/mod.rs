//! Bytes of protocols: boundaries and headers, nothing more.

pub mod chronos;
pub mod proxy_protocol;
