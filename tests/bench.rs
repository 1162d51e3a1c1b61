//! The parts of the bench that decide: frames, ratios, accounting.
#![allow(dead_code, missing_docs)]

#[path = "../benches/compare/frame.rs"]
mod frame;
#[path = "../benches/compare/stats.rs"]
mod stats;
#[path = "../benches/compare/usage.rs"]
mod usage;
