//! What is decided before anything is bound: how many workers and where, and where they listen.

pub mod cores;
pub mod listeners;
