//! Every bound.

/// Endpoints in a snapshot; further ones are left out with a warning.
pub const ENDPOINTS_MAX: usize = 1024;
