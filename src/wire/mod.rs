//! Bytes of protocols.
