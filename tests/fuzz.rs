//! Random edits of a corpus, read by the scanners in random pieces and by slow parsers at once.

#[path = "fuzz/chronos.rs"]
mod chronos;
#[path = "fuzz/driver.rs"]
mod driver;
#[path = "fuzz/http1.rs"]
mod http1;
