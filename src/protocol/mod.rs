//! Bytes of protocols: boundaries and headers, nothing more.

pub mod chronos;
pub mod http1;
pub mod proxy_protocol;
