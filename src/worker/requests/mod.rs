//! A worker's clients where used connections are lent: their requests, and the queue of those that
//! wait for a connection.
//!
//! Connections are lent at the end of a turn only, and each is looked at itself as it changes hands:
//! one that is lent is open and silent, whatever a busy kernel has not told yet.

mod answers;
mod backends;
mod clients;
#[cfg(test)]
mod http_simulation;
mod placing;
#[cfg(test)]
mod simulation;
