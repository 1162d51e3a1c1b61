//! Starts the workers' threads: what each shares with the control plane and the others is handed to
//! it. How many there are, [`super::cores`] has decided.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::mpsc;

use super::listeners::Listeners;
use super::{Capacity, SocketFile, StartError};
use crate::config::Config;
use crate::control::WorkerHandle;
use crate::io::net::Address;
use crate::listening::Listening;
use crate::metrics::WorkerStats;
use crate::proxy::RouteId;
use crate::proxy::retry_budget::Reserve;
use crate::worker::ends::Ends;
use crate::worker::mailbox::Mailbox;
use crate::worker::{Prepared, WorkerSetup};

/// Workers that run.
#[derive(Debug)]
pub struct Workers {
    /// In the order of their numbers.
    pub handles: Vec<WorkerHandle>,
    /// Closes once every worker thread has ended: each holds a sender and drops it with its end.
    pub exited: mpsc::Receiver<Infallible>,
    /// Where clients connect, with the ports that were bound.
    pub addresses: Vec<Address>,
    /// The routes of these addresses.
    pub routes: Box<[RouteId]>,
    /// The files of the Unix sockets among them, to be kept until the workers have ended.
    pub files: Vec<SocketFile>,
}

/// Starts the workers, each on its own set of listening sockets.
///
/// # Errors
/// A mailbox or a worker's driver cannot be set up.
pub fn start_workers(
    prepared: Vec<Prepared>,
    listeners: Listeners,
    config: &Arc<Config>,
    capacity: Capacity,
    started: Instant,
) -> Result<Workers, StartError> {
    let workers = prepared.len();
    let Listeners { addresses, routes, sets, files } = listeners;
    assert_eq!(sets.len(), workers, "a set of listening sockets per worker");
    let stats: Arc<[_]> =
        (0..workers).map(|_| Arc::new(WorkerStats::new(config.routes.len()))).collect();
    let mailboxes: Arc<[_]> = (0..workers)
        .map(|_| Mailbox::new(config.routes.len()).map(Arc::new))
        .collect::<Result<_, _>>()?;
    let ends: Vec<Arc<Ends>> = (0..workers).map(|_| Arc::default()).collect();
    let reserve = |_| Arc::new(Reserve::new(started));
    let retry_reserves: Arc<[_]> = (0..config.routes.len()).map(reserve).collect();
    let (alive, exited) = mpsc::channel(1);
    let listening = Listening::new(addresses.clone());
    for (index, (worker, listeners)) in prepared.into_iter().zip(sets).enumerate() {
        worker.start(WorkerSetup {
            index,
            listeners,
            listener_routes: routes.clone(),
            config: Arc::clone(config),
            sessions_max: capacity.sessions_max.get(),
            pool_conns_max: capacity.pool_conns_max,
            mailboxes: Arc::clone(&mailboxes),
            stats: Arc::clone(&stats),
            ends: Arc::clone(&ends[index]),
            retry_reserves: Arc::clone(&retry_reserves),
            started,
            listening: listening.clone(),
            exited: alive.clone(),
        })?;
    }
    let handle = |(index, ends)| WorkerHandle {
        mailbox: Arc::clone(&mailboxes[index]),
        stats: Arc::clone(&stats[index]),
        ends,
    };
    let handles = ends.into_iter().enumerate().map(handle).collect();
    Ok(Workers { handles, exited, addresses, routes, files })
}
