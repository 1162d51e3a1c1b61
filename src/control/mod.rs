//! The tokio side: discovery, admin HTTP, lifecycle.
