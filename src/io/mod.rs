//! Does the I/O.
