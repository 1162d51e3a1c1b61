//! Every bound: its unit, how it is derived, and why.

/// Endpoints in a snapshot; further ones are left out with a warning.
pub const ENDPOINTS_MAX: usize = 1024;

// ---- Buffers -----------------------------------------------------------------------------------

/// Bytes of one buffer. As large as a TLS record, so that bulk is moved in few operations; small
/// messages touch only its first page.
pub const BUFFER_SIZE: usize = 16 * 1024;

/// Buffers that one direction of a session may hold before reading stops, while buffers are
/// plenty: enough to keep a bulk stream moving while a send is under way.
pub const RELAY_BUFFERS_MAX: u32 = 8;

/// Buffers lent to the kernel at a time for whichever socket receives next.
pub const BUFFER_RING_ENTRIES: u16 = 256;

/// Buffers of one worker.
pub const fn buffers_max(sessions_max: usize) -> usize {
    // Two a session: should every reader stall in both directions, each still holds its own, and
    // a slow session never holds a buffer that another one needs.
    2 * sessions_max
        // Lent to the kernel, not yet filled.
        + BUFFER_RING_ENTRIES as usize
        // For bursts: what is above the first two terms is shared by those that run ahead.
        + 1024
}

/// With fewer free buffers than this, sessions get one buffer a direction and no more.
pub const fn buffers_lean_below(sessions_max: usize) -> u32 {
    2 * sessions_max as u32 + BUFFER_RING_ENTRIES as u32
}

// ---- Connections -------------------------------------------------------------------------------

/// Connections of the kernel's accept queue, a listener.
pub const LISTEN_BACKLOG: i32 = 4096;

/// Clients that one worker may accept beyond `AEGIS_MAX_SESSIONS`: what a multishot accept can
/// bring between two turns before it is stopped.
pub const ACCEPT_OVERSHOOT: usize = 512;

/// Connections that all pools of one worker together may hold, warm or being made.
pub const POOL_CONNS_MAX: usize = 4096;

/// Connections of one worker.
pub const fn conns_max(sessions_max: usize) -> usize {
    // A client and a backend each.
    2 * (sessions_max + ACCEPT_OVERSHOOT)
        // Warm ones, and those being made.
        + POOL_CONNS_MAX
}

/// Pool connections being made at a time, per worker and endpoint: a cold pool fills in a few
/// round trips without a burst of handshakes at the backend.
pub const POOL_CONNECTING_MAX: usize = 16;

/// Buffers that an idle pooled connection may hold of what its backend sent unasked: a greeting,
/// which may come in a few pieces.
pub const POOL_GREETING_BUFFERS_MAX: u32 = 4;

/// Endpoints that can be tried for one session; the bound of `AEGIS_CONNECT_ATTEMPTS`.
pub const CONNECT_ATTEMPTS_MAX: usize = 8;
