//! What no proxy can do without: the sends and receives of its two sockets, and where each request
//! comes on a new connection, making and ending that. Done bare, by one thread that never waits,
//! they are the least CPU time that a request can cost.

use std::io::{self, Read, Write};
use std::num::NonZeroUsize;
use std::thread;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use socket2::Socket;

use crate::load::Pace;
use crate::net::{Address, Listener, Transport};
use crate::peers::Way;
use crate::scenarios::Scenario;
use crate::stats::Run;

/// Measures the floor of a scenario by a way for about so long; there is none where a proxy may do
/// with other operations than these.
pub fn measure(scenario: &Scenario, way: Way, measured: Duration) -> io::Result<Option<Run>> {
    // A proxy that lends connections makes fewer of them, and bulk it may splice.
    if scenario.pools || scenario.is_bulk() {
        return Ok(None);
    }
    // It does half of its sends and receives on either side.
    let sides = [way.of_clients(), way.of_backend()];
    let costs = sides.map(|side| of_transport(scenario, side, measured / 2));
    let [clients, backend] = costs;
    Ok(Some(Run { cpu: Some(f64::midpoint(clients?, backend?)), ..Run::default() }))
}

fn of_transport(scenario: &Scenario, by: Transport, measured: Duration) -> io::Result<f64> {
    let folder = tempfile::tempdir()?;
    let address = Address::free(by, &folder.path().join("socket"))?;
    let listener = address.listen()?;
    let connect = || connect(&address, &listener);
    let mut messages = Messages::of(scenario);
    match scenario.pace {
        Pace::Churn => cost(measured, 1, || {
            let mut pair = connect()?;
            messages.round_trips(std::slice::from_mut(&mut pair))?;
            let (client, mut server) = pair;
            drop(client);
            server.read(&mut [0]).map(drop)
        }),
        Pace::Closed | Pace::Open(_) | Pace::Bulk => {
            let mut pairs: Vec<_> =
                (0..scenario.connections).map(|_| connect()).collect::<io::Result<_>>()?;
            cost(measured, pairs.len(), || messages.round_trips(&mut pairs))
        }
    }
}

/// Fills in what follows from a floor's CPU time, if `ends` is what the load and the backend take
/// of a request: the rate with every core busy, and with as many requests under way as the scenario
/// has, the latency (Little's law; without another's wait, nobody's is longer).
pub fn extend(floor: &mut Run, scenario: &Scenario, ends: Option<f64>) {
    let (Some(cost), Some(ends)) = (floor.cpu, ends) else { return };
    if let Pace::Open(_) = scenario.pace {
        return;
    }
    let cores = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let at_once = cores.min(scenario.connections) as f64;
    let rate = at_once * 1e6 / (ends + cost);
    floor.throughput = Some(rate);
    floor.p99 = Some(scenario.connections as f64 * 1e6 / rate);
    floor.p50 = floor.p99.filter(|_| scenario.connections == 1);
}

/// Microseconds of CPU time that a request takes, `requests` of which are made each time.
fn cost(
    measured: Duration,
    requests: usize,
    mut request: impl FnMut() -> io::Result<()>,
) -> io::Result<f64> {
    request()?;
    let start = cpu_time();
    let mut made = 0;
    loop {
        request()?;
        made += requests;
        let used = cpu_time().saturating_sub(start);
        if used >= measured {
            return Ok(used.as_secs_f64() * 1e6 / made as f64);
        }
    }
}

fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

fn connect(address: &Address, listener: &Listener) -> io::Result<(Socket, Socket)> {
    let client = address.connect()?;
    Ok((client, listener.accept(true)?))
}

struct Messages {
    request: Vec<u8>,
    reply: Vec<u8>,
    buffer: Vec<u8>,
}

impl Messages {
    fn of(scenario: &Scenario) -> Self {
        let bytes = |len: u32| vec![0; len as usize];
        let longest = scenario.request.max(scenario.reply);
        let (request, reply) = (bytes(scenario.request), bytes(scenario.reply));
        Self { request, reply, buffer: bytes(longest) }
    }

    /// A request and its reply on each of the connections.
    fn round_trips(&mut self, pairs: &mut [(Socket, Socket)]) -> io::Result<()> {
        let (requested, replied) = (self.request.len(), self.reply.len());
        for (client, _) in pairs.iter_mut() {
            client.write_all(&self.request)?;
        }
        for (_, server) in pairs.iter_mut() {
            server.read_exact(&mut self.buffer[..requested])?;
        }
        for (_, server) in pairs.iter_mut() {
            server.write_all(&self.reply)?;
        }
        for (client, _) in pairs.iter_mut() {
            client.read_exact(&mut self.buffer[..replied])?;
        }
        Ok(())
    }
}
