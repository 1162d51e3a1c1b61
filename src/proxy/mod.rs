//! Decides what to do with connections: no I/O, no clock, no unsafe.

pub mod endpoints;
