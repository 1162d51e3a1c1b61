//! Writes what workers tell of sessions and requests that have ended into the log: a line each, with
//! the names of OpenTelemetry where it has some.

use std::sync::Arc;
use std::time::Duration;

use super::View;
use crate::config::ENDS_TARGET;
use crate::io::net::Address;
use crate::limits;
use crate::metrics::LabelSet;
use crate::proxy::Side;
use crate::worker::ends::{End, How};

/// How often the workers' rings are emptied.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Lines written each time, for each worker: a storm of ends must not fill the log for hours. What
/// waits too long is dropped, and counted.
const LINES_MAX: usize = 50;

/// Writes for as long as the process runs.
pub(super) async fn run(view: Arc<View>) {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        write(&view, LINES_MAX);
    }
}

/// Writes what there is to tell when the process ends: most of all, whom the deadline of its drain has cut.
/// What found no room is told as well, since nobody reads the metric any more.
pub(super) fn finish(view: &View) {
    let dropped = view.workers().iter().map(|worker| worker.ends.dropped()).sum::<u64>();
    if dropped > 0 {
        tracing::warn!(
            dropped,
            "ends of sessions and requests were not logged: there were too many"
        );
    }
    // Last, since they may take all the room that the log has.
    write(view, limits::ENDS_MAX);
}

/// Writes what there is to tell now, at most so many lines for each worker.
fn write(view: &View, lines_max: usize) {
    for (number, worker) in view.workers().iter().enumerate() {
        let ends = std::iter::from_fn(|| worker.ends.take());
        ends.take(lines_max).for_each(|end| line(view, number, &end));
    }
}

fn line(view: &View, worker: usize, end: &End) {
    let route = view.config().routes[usize::from(end.route)].name.as_str();
    let (name, command, how) = match end.how {
        How::Session(reason) => ("aegis.session.end", None, reason.name()),
        How::Request(verb, outcome) => ("aegis.request.end", Some(verb.label()), outcome.name()),
    };
    let error = (!end.how.is_normal()).then_some(how);
    let seconds = |time: Option<Duration>| time.map(|time| time.as_secs_f64());
    let endpoint = end.endpoint.as_deref();
    let (server, port) = match endpoint.map(|endpoint| &endpoint.address) {
        Some(Address::Tcp(address)) => (Some(address.ip().to_string()), Some(address.port())),
        Some(Address::Unix(path)) => (Some(path.display().to_string()), None),
        None => (None, None),
    };
    let first = end.ended_first.map(|side| match side {
        Side::Client => "client",
        Side::Backend => "backend",
    });
    tracing::info!(
        target: ENDS_TARGET,
        {
        "event.name" = name,
        "error.type" = error,
        "aegis.end" = how,
        "aegis.ended_first" = first,
        "aegis.route" = route,
        "aegis.command" = command,
        "aegis.worker" = worker,
        "aegis.endpoint" = endpoint.map(|endpoint| endpoint.name.as_str()),
        "aegis.attempts" = end.attempts,
        "client.address" = end.client.map(|client| client.ip().to_string()),
        "client.port" = end.client.map(|client| client.port()),
        "server.address" = server,
        "server.port" = port,
        "aegis.bytes.to_backend" = end.bytes.to_backend,
        "aegis.bytes.to_client" = end.bytes.to_client,
        duration = end.lasted.as_secs_f64(),
        "aegis.seconds.to_backend" = seconds(end.placed),
        "aegis.seconds.first_byte" = seconds(end.first_byte),
        "aegis.seconds.transfer" = seconds(end.transfer),
        },
        "ended"
    );
}
