//! Backends that are the proxy itself.
