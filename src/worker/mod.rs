//! One core: binds `proxy` to `io`, turn by turn.

pub mod mailbox;
