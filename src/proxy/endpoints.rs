//! The desired set of endpoints, as discovery delivers it: a complete snapshot, never an edit.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use crate::telemetry::EndpointStats;

/// One backend address, shared by all workers.
#[derive(Debug)]
pub struct Endpoint {
    /// What users call it: the configured `host:port`, or a pod's name. Label of its metrics.
    pub name: String,
    /// Where to connect.
    pub address: SocketAddr,
    near: AtomicBool,
    /// Its counters, one block a worker, indexed by worker.
    pub stats: Box<[EndpointStats]>,
}

impl Endpoint {
    /// An endpoint with fresh counters for `workers` workers.
    pub fn new(name: impl Into<String>, address: SocketAddr, workers: usize) -> Arc<Self> {
        let stats = (0..workers).map(|_| EndpointStats::default()).collect();
        Arc::new(Self { name: name.into(), address, near: AtomicBool::new(false), stats })
    }

    /// Whether it is preferred because it is near.
    pub fn is_near(&self) -> bool {
        self.near.load(Relaxed)
    }

    /// For discovery alone. It is advice that may change while the endpoint stays the same one,
    /// with its pools and counters, so it is not worth a snapshot of its own.
    pub fn set_near(&self, near: bool) {
        self.near.store(near, Relaxed);
    }
}

/// The complete, ordered set of endpoints at one moment.
///
/// Applying the same snapshot twice changes nothing. An endpoint is the same one across snapshots
/// when its `Arc` is the same: discovery hands out one `Arc` for each name and address for as long
/// as anybody holds it, though the endpoint may leave and come back.
#[derive(Debug, Default)]
pub struct EndpointSnapshot {
    /// Grows by one with every snapshot that discovery publishes.
    pub generation: u64,
    /// The endpoints, at most [`crate::limits::ENDPOINTS_MAX`].
    pub endpoints: Vec<Arc<Endpoint>>,
    /// Where keys say where a request goes: all stores that share the keys, in the order in which
    /// they were declared. Nothing but these names says which of them holds a key.
    pub stores: Vec<Store>,
}

/// One of the stores that share the keys. It holds its keys whether it is there or not: what it
/// holds is nowhere else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Store {
    /// Its declared name: a pod's, or the configured `host:port`. Its address may change.
    pub name: Arc<str>,
    /// Where it is among the endpoints of the snapshot, if it is there.
    pub endpoint: Option<usize>,
    /// Why it is not, where that is more than that it is away.
    pub why: Option<Arc<str>>,
}
