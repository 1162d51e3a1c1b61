//! One core: binds `proxy` to `io`, turn by turn.

pub mod cores;
pub mod mailbox;
