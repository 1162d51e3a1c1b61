//! A worker's clients where used connections are lent: their requests, and the queue of those that
//! wait for a connection.
//!
//! Connections are lent at the end of a turn only. By then all that the kernel had to say about
//! them has been heard: one that is lent is open and silent.

mod answers;
mod clients;
#[cfg(test)]
mod http_simulation;
mod loans;
mod placing;
#[cfg(test)]
mod simulation;
