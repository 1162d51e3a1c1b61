//! Every bound: its unit, how it is derived, and why.

use std::time::Duration;

/// Endpoints in a snapshot; further ones are left out with a warning.
pub const ENDPOINTS_MAX: usize = 1024;

/// An endpoint that left the set is taken to come back for so long: it gets nothing new, but its
/// sessions and warm connections stay. A slice is rewritten within milliseconds, and a readiness
/// probe that failed once succeeds a second later or more. A server that shuts down and waits for
/// its clients to leave waits as much longer.
pub const ENDPOINT_LINGER: Duration = Duration::from_secs(2);

/// What is on an endpoint that left is cut within so long, each session at a moment of its own. All at
/// once would be reconnects and logins all at once, of a whole fleet, at the endpoint that takes its
/// place. With the usual hundred to a few hundred connections to a database that is as many logins a
/// second, which one core serves; and a server that still takes writes has that much longer for them.
pub const CUT_TIME: Duration = Duration::from_secs(1);

/// An address behind a name may be missing in fewer answers than this, since name servers give a
/// part of the addresses at a time, and has left only then.
pub const DNS_ANSWERS_TO_LEAVE: u32 = 3;

/// After an answer in which an address is missing, the next comes no later than this.
pub const DNS_CONFIRM: Duration = Duration::from_secs(5);

/// Addresses that a name server gives hold at least for `AEGIS_DNS_REFRESH`, and at most for so long
/// whatever it says: as long as Kubernetes' own names by default, and no longer than people wait who
/// have moved a database.
pub const DNS_TTL_MAX: Duration = Duration::from_secs(30);

/// The lookup of a name ends after this, whatever name servers do: as long as three silent ones take
/// with the times that are usual, 5 s each, twice.
pub const DNS_LOOKUP_MAX: Duration = Duration::from_secs(30);

/// Name servers that are asked, as many as C libraries do; further ones are not.
pub const DNS_SERVERS_MAX: usize = 3;

/// Domains of a search list, as many as Kubernetes allows; further ones are not searched.
pub const DNS_SEARCH_MAX: usize = 32;

/// Queries that one connection to a name server may carry: one of each family of each name that can
/// be configured.
pub const DNS_QUERIES_MAX: usize = 2 * ENDPOINTS_MAX;

/// Bytes that are read of `/etc/hosts` and of `/etc/resolv.conf`: far above what people write, and
/// quickly gone through.
pub const DNS_FILE_BYTES_MAX: u64 = 1 << 20;

// ---- Buffers -----------------------------------------------------------------------------------

/// Bytes of one buffer. As large as a TLS record, so that bulk is moved in few operations; small
/// messages touch only its first page.
pub const BUFFER_SIZE: usize = 16 * 1024;

/// Buffers' worth of bytes that one direction of a session may hold before reading stops, while
/// buffers are plenty: enough to keep a bulk stream moving while a send is under way.
pub const RELAY_BUFFERS_MAX: u32 = 8;

/// Buffers that a request may hold that is not whole yet, while buffers are short: a line may lie in
/// two, an HTTP head in more. As many a session are reserved.
pub const PARTIAL_BUFFERS_SHORT_MAX: u32 = 2;

/// Buffers provided to the kernel at a time for whichever socket receives next: at least, …
pub const BUFFERS_PROVIDED_MIN: usize = 32;

/// … and where more sockets than that receive in one turn, at most. A power of two. With 1024 there
/// is no more to win.
pub const BUFFER_RING_ENTRIES: u16 = 512;

/// Buffers provided at a time at most while they are short.
pub const BUFFERS_PROVIDED_SHORT_MAX: usize = 128;

/// Bytes that one pipe takes, through which bulk is moved within the kernel: that much is moved at a
/// time. What a user may make larger without privileges is 1 MiB, and 64 MiB in all.
pub const PIPE_SIZE: usize = 1 << 20;

/// Pipes of one worker. A bulk stream holds one only while its reader is slower than it.
pub const PIPES_MAX: usize = 16;

/// Sessions for which a worker reserves buffers: above, stalled sessions share.
const BUFFERED_SESSIONS_MAX: usize = 32 * 1024;

/// Sessions share so many buffers each, beside those that are reserved, …
const BUFFERS_SHARED_PER_SESSION: usize = 14;

/// … but all of a worker at most this: 64 MiB, enough for five hundred directions that run as
/// far ahead as any may.
const BUFFERS_SHARED_MAX: usize = 4096;

/// A direction may take one more buffer for so many that are spare.
const SPARE_PER_BUFFER: u32 = 16;

/// Buffers that a direction may come to hold where none is spare. Reading goes on below
/// [`BUFFER_SIZE`] bytes and brings as many at a time, so it ends below twice that; such a queue lies
/// in three buffers at most, as its first may be sent in part.
const BUFFERS_RESERVED_PER_DIRECTION: usize = 3;

/// Buffers of one worker: those that are reserved, those that are provided to the kernel, and those
/// that sessions share. It is address space: memory is what is in use.
pub const fn buffers_max(sessions_max: usize) -> usize {
    let shared = sessions_max.saturating_mul(BUFFERS_SHARED_PER_SESSION);
    let shared = if shared < BUFFERS_SHARED_MAX { shared } else { BUFFERS_SHARED_MAX };
    buffers_reserved(sessions_max) as usize
        + BUFFER_RING_ENTRIES as usize
        // For bursts of few sessions.
        + 256
        + shared
}

/// Buffers that are reserved for both directions of each session, so that however many readers
/// stall, no direction waits for what another one holds.
pub const fn buffers_reserved(sessions_max: usize) -> u32 {
    let sessions =
        if sessions_max < BUFFERED_SESSIONS_MAX { sessions_max } else { BUFFERED_SESSIONS_MAX };
    (2 * BUFFERS_RESERVED_PER_DIRECTION * sessions) as u32
}

/// Bytes that one direction may have in flight where so many buffers are spare. Reading stops there.
///
/// The limit follows what is left, as thresholds of switches do that share their memory (Choudhury
/// and Hahne, "Dynamic queue length thresholds for shared-memory packet switches", 1998): a few that
/// stall have all that they may, and many leave something. Of `S` shared buffers, `n` directions
/// that stall take `n(x - 1)` where each holds `x`, and `x - 1 = (S - n(x - 1)) / 16`. So
/// `x = 1 + S / (16 + n)`, and as many spare buffers remain as 16 directions have beyond their first.
/// With 4,096, a direction may hold 8 while up to 569 stall, 5 with 1,000, and 2 with 4,000.
pub const fn in_flight_max(spare: u32) -> u32 {
    let buffers = 1 + spare / SPARE_PER_BUFFER;
    let buffers = if buffers < RELAY_BUFFERS_MAX { buffers } else { RELAY_BUFFERS_MAX };
    buffers * BUFFER_SIZE as u32
}

/// Whether so few buffers are spare that a direction may hold at most one when it is read.
/// Then each receive takes one and no more: a multishot receive may run many ahead.
pub const fn buffers_are_short(spare: u32) -> bool {
    spare < SPARE_PER_BUFFER
}

// ---- Connections -------------------------------------------------------------------------------

/// Descriptors that each worker holds in reserve for backends of clients that it has accepted. Where
/// they are short, it accepts one client a turn and listener.
pub const DESCRIPTORS_RESERVED: usize = 16;

/// Connections of the kernel's accept queue, a listener.
pub const LISTEN_BACKLOG: i32 = 1024;

/// Sessions that one worker may hold beyond `AEGIS_MAX_SESSIONS`: what a drain finds, which empties
/// the accept queues whatever they hold. Only slots are kept for them, which cost no memory before
/// they are used. Whoever comes beyond, as handshakes may still end meanwhile, is refused.
pub const ACCEPT_OVERSHOOT: usize = LISTEN_ADDRESSES_MAX * ACCEPT_QUEUE_MAX + HANDED_OVER_MAX;

/// Clients in a full accept queue: the kernel takes one more than the backlog.
const ACCEPT_QUEUE_MAX: usize = LISTEN_BACKLOG as usize + 1;

/// Clients that may wait in a worker's mailbox, handed over by others: a full accept queue, which one
/// worker may take at once and share with another. With 64, of 400 that came at a time by a Unix socket
/// one of two workers on `io_uring` had 236 to 335, the latter being all but 65; with 1,024 never more
/// than 206.
pub const HANDED_OVER_MAX: usize = 1024;

/// Connections that all pools of one worker together may hold, warm or being made.
pub const POOL_CONNS_MAX: usize = 4096;

/// How long an endpoint may take to end the connection of a cancel request, which says that it has
/// taken note of it, before the next endpoint is asked. It takes a millisecond or two.
pub const CANCEL_WAIT: Duration = Duration::from_secs(1);

/// A client that is to get what a broken backend had sent may pause for so long; then it is reset.
/// As long as proxies give clients that take nothing, and far above any pause of a healthy one.
pub const FLUSH_STALL_MAX: Duration = Duration::from_secs(30);

/// Active checks of all routes at a time. Half of them are of endpoints whose latest check was not quick, and
/// may take their whole time: with one of 1 s, 32 endpoints that hang are checked each second.
pub const CHECKS_MAX: usize = 64;

/// A check that takes longer is not quick. If 1,024 endpoints begin to hang at once, the checks of others are
/// late by 32 times this. A connection and an answer take less, except between continents, and there each check
/// has its place in the other half.
pub const CHECK_QUICK_MAX: Duration = Duration::from_millis(250);

/// A Unix socket whose queue is full is tried again by a check after this: the queue of a server that
/// is well has room again within far less.
pub const CHECK_RETRY_PAUSE: Duration = Duration::from_millis(10);

/// Of the reply to a check so many bytes are looked at; its first line says enough.
pub const CHECK_REPLY_MAX: usize = 4096;

/// The longest path that a check asks for.
pub const CHECK_PATH_MAX: usize = 1024;

/// Who was to go on so long ago has stood still: the process was stopped or frozen, or had no core. The
/// kernel's timers are exact to far less; a thread that shares its core may wait a few milliseconds.
pub const LATE_MIN: Duration = Duration::from_millis(20);

/// Pools and health are looked over this often.
pub const UPKEEP_INTERVAL: Duration = Duration::from_millis(100);

/// Peers are looked at for their acknowledgements this often, where `AEGIS_TCP_USER_TIMEOUT` allows;
/// silence for as long is suspicious, since a kernel has sent the same thing four times by then.
pub const SILENCE_LOOK_MAX: Duration = Duration::from_millis(1250);

/// Ends of sessions and requests that a worker holds for the log.
pub const ENDS_MAX: usize = 256;

/// Slots of connections passed, and connections looked at for what the kernel has measured of them, in
/// one upkeep: a look takes half a microsecond.
pub const NETWORK_SLOTS: usize = 256;
/// See [`NETWORK_SLOTS`].
pub const NETWORK_LOOKS: usize = 16;

/// In so many upkeeps all who may wait for a first byte are looked at once: a second.
pub const OVERDUE_TURNS: usize = 10;

/// Looks at connections in one turn: half a microsecond each, so that they stay below 100 µs. That is
/// 1,280 a second for one worker; with more that are silent at once the looks come later.
pub const SILENCE_LOOKS_MAX: usize = 128;

/// Connects at a time that try whether an endpoint is there whose connection is silent. Of three, one
/// succeeds in all but 13 % of cases where half of the packets are lost, and each look has three.
pub const SILENCE_WITNESSES: usize = 3;

/// A connection whose peer acknowledges nothing, while its host does otherwise, may be given up after
/// so many times `AEGIS_TCP_USER_TIMEOUT`: with 15 s, after nine losses in a
/// row, or ten.
pub const SILENCE_WITNESSED_FACTOR: u32 = 3;

/// Sessions that one worker may hold, those included of which only something is left to deliver.
pub const fn sessions_of_worker_max(sessions_max: usize) -> usize {
    sessions_max + ACCEPT_OVERSHOOT
}

/// A client that takes nothing of an answer may hold a backend's connection for so long where
/// `AEGIS_IDLE_TIMEOUT` does not say otherwise: twice what proxies commonly allow, since it may be a
/// reader that thinks. One that sends nothing is held to [`UPLOAD_BEHIND_MAX`].
pub const CLIENT_STALL_MAX: Duration = Duration::from_secs(60);

/// A client that was sent everything may go on sending for so long without taking anything. What it sends
/// is dropped, so that it gets to see the answer before its connection is closed.
pub const LINGER_MAX: Duration = Duration::from_secs(30);

/// After an answer that refuses a request, its rest may pause for so long. A client that waits for
/// the end instead of sending it should not wait longer than a person would.
pub const REFUSED_REST_MAX: Duration = Duration::from_secs(1);

/// Bytes a second that a client has to send of a request that holds a connection: far below any
/// network, far above a trickle.
pub const UPLOAD_RATE_MIN: u32 = 1024;

/// A client may be so far behind with such a request, be it that it sends nothing: above the waits
/// of TCP for packets lost twice, and well below the time for which others wait for a connection…
pub const UPLOAD_BEHIND_CONTENDED_MAX: Duration = Duration::from_secs(2);

/// …or, while nobody else waits for one, as long as proxies give clients.
pub const UPLOAD_BEHIND_MAX: Duration = Duration::from_secs(30);

/// In a drain, a client that has sent no request yet may take so long to send its first, and one
/// that was asked to leave to do so.
pub const DRAIN_PATIENCE: Duration = Duration::from_secs(1);

/// Connections of one worker.
pub const fn conns_max(sessions_max: usize) -> usize {
    // A client and a backend each.
    2 * sessions_of_worker_max(sessions_max)
        // Warm ones, and those being made.
        + POOL_CONNS_MAX
}

/// How long a worker without a share of an endpoint's places may use one while others wait for
/// theirs, which have all had a turn after [`PLACE_ROUND`]. For each turn a connection is closed and
/// another one made, which costs 0.15 ms: a hundredth of the least turn would be 3 %.
pub const fn place_turn(places: usize, workers: usize) -> Duration {
    let millis = PLACE_ROUND.as_millis() as usize * places / workers;
    let most = if millis < 100 { millis } else { 100 };
    Duration::from_millis(if most > 5 { most as u64 } else { 5 })
}

/// See [`place_turn`]: far below the time for which requests wait.
const PLACE_ROUND: Duration = Duration::from_millis(250);

/// A connection that serves several clients is not needed if it has been idle for so long: then it
/// makes room for those of other workers. Shorter, and they would be made and closed in turns.
pub const UNNEEDED_AFTER: Duration = Duration::from_millis(100);

/// The same where others have less than their share: ten times what it takes to make another one.
pub const UNNEEDED_BEYOND_SHARE_AFTER: Duration = Duration::from_millis(2);

/// Endpoints counted for each configured address: pools hold their maximum only under load that
/// comes and goes faster than they shrink, but an endpoint may go while another one comes.
pub const POOL_ENDPOINTS_PER_BACKEND: usize = 2;

/// Pool connections being made at a time, per worker and endpoint: a cold pool fills in a few
/// round trips without a burst of handshakes at the backend.
pub const POOL_CONNECTING_MAX: usize = 16;

/// Buffers that an idle pooled connection may hold of what its backend sent unsolicited: a greeting,
/// which may come in a few pieces.
pub const POOL_GREETING_BUFFERS_MAX: u32 = 4;

/// Endpoints that can be tried for one session; the bound of `AEGIS_CONNECT_ATTEMPTS`.
pub const CONNECT_ATTEMPTS_MAX: usize = 8;

/// Bytes of an HTTP/1 head, of a trailer section, and of the line before a chunk. Larger ones are
/// passed on, but not understood. Servers take between 8 and 64 KiB.
pub const HTTP1_HEAD_MAX: usize = 64 * 1024;

/// Connects at a time of sessions that have waited for an endpoint, per endpoint and worker: it begins
/// with one, and with each that succeeds there may be one more. Sixteen proxies that reach this at once
/// leave room in the accept queue of a server that asks for 512, and one alone makes ten thousand
/// connects a second where each takes 3 ms.
///
/// How many may wait is no limit of its own: each that waits has its place among `AEGIS_MAX_SESSIONS`,
/// and holds at most one buffer of what it has sent.
pub const WAITING_CONNECTS_MAX: u32 = 32;

// ---- The log ------------------------------------------------------------------------------------

/// Lines of the log that wait to be written: seconds of any log but `trace`.
pub const LOG_QUEUE_LINES_MAX: usize = 4096;

/// Bytes of the log that wait to be written. Lines are 200 bytes long, so both bounds are met at
/// about the same time.
pub const LOG_QUEUE_BYTES_MAX: usize = 1 << 20;

/// How long the end of the process waits for what it logged last to be written. The log of a pod is
/// read within milliseconds; nobody waits for a log that nobody reads.
pub const LOG_FLUSH_MAX: Duration = Duration::from_secs(1);

// ---- What can be configured ---------------------------------------------------------------------

/// Routes of the process: more than the databases of one application. Each has pools of its own in every
/// worker.
pub const ROUTES_MAX: usize = 16;

/// Bytes of a route's name, which stands in the names of variables, in labels and in the log.
pub const ROUTE_NAME_BYTES_MAX: usize = 24;

/// Addresses in `AEGIS_LISTEN` of all routes together: one of each family for each. Each is a listening
/// socket in every worker.
pub const LISTEN_ADDRESSES_MAX: usize = 2 * ROUTES_MAX;

/// Worker threads: more cores than this are no sidecar's.
pub const WORKERS_MAX: usize = 256;

/// Worker threads at most where nothing says how many CPUs are for this process. The machine is
/// shared then: more workers take more cores from others, and each has pools of its own. One worker
/// serves tens of thousands of requests a second, so four are above what an application beside it
/// asks for.
pub const WORKERS_AUTO_MAX: usize = 4;

/// Warm connections per endpoint.
pub const POOL_IDLE_MAX: usize = 4096;

/// Sessions that can be asked for: about what one local address can hold towards many endpoints.
pub const SESSIONS_MAX: usize = 1_000_000;

/// Most sessions where the number is left to the program. Memory is the reason: the kernel's
/// socket buffers and ours are paid for each session, and a sidecar's memory limit should not
/// have to be sized for a descriptor limit in the millions. Who wants more says so.
pub const SESSIONS_AUTO_MAX: usize = 10_000;

/// A name counts as so many addresses. Nobody knows how many it will stand for; where there are
/// more, their pools share what there is.
pub const ADDRESSES_PER_NAME: usize = 8;

// ---- The admin port -----------------------------------------------------------------------------

/// Connections to the admin port: a scraper, the kubelet's probes, people. Each is in one room at a
/// time, and who comes into a full one takes the place of another.
pub const ADMIN_CONNECTIONS: usize = ADMIN_HEADS + ADMIN_ANSWERS + ADMIN_HELD;

/// Admin connections that have not sent a whole head yet. It comes within a round trip.
pub const ADMIN_HEADS: usize = 12;

/// Admin connections that are being answered. Each answer may hold some [`ADMIN_PIECE_BYTES`].
pub const ADMIN_ANSWERS: usize = 12;

/// Admin connections held until the start is over. A kubelet has one.
pub const ADMIN_HELD: usize = 8;

/// Bytes of an admin page that are made at a time, so that none holds up the control thread for more
/// than a millisecond or two. Twice as many would do as well, half as many cost more writes.
pub const ADMIN_PIECE_BYTES: usize = 16 * 1024;

/// Connections to the control socket whose command has not been answered yet. Each has its answer, or
/// is closed, within seconds; who comes into a full house is told so.
pub const CONTROL_CONNECTIONS: usize = 16;

/// Connections to the control socket that wait for the end of the process.
pub const CONTROL_WAITING: usize = 16;

/// Bytes of a line on the control socket. A log filter that names every module is shorter.
pub const CONTROL_LINE_BYTES_MAX: usize = 4096;

/// Bytes of the file that a tap makes, at most, and so of the memory that the proxy has for it meanwhile.
pub const TAP_BYTES_MAX: usize = 16 << 20;

/// The least that can be asked for: a few messages.
pub const TAP_BYTES_MIN: usize = 4 << 10;

/// How long a tap may wait and capture. Who looks for longer does so again.
pub const TAP_TIME_MAX: Duration = Duration::from_secs(3600);

/// Descriptors held back for admin connections, so that a probe is answered where there are no
/// others: what is short is known then, and a restart would not mend it. One of them is never used.
pub const ADMIN_DESCRIPTORS_RESERVED: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_more_directions_stall_the_less_each_may_hold_and_some_is_left() {
        for (stalled, held) in [(100, 8), (500, 8), (1_000, 6), (4_000, 3), (20_000, 2)] {
            let sessions = 10_000;
            let shared = buffers_max(sessions) - buffers_reserved(sessions) as usize;
            let mut spare = (shared - usize::from(BUFFER_RING_ENTRIES)) as u32;
            let mut holds = vec![1; stalled];
            // They take turns, one buffer at a time.
            for round in 1..=RELAY_BUFFERS_MAX {
                for hold in holds.iter_mut().filter(|hold| **hold == round) {
                    let more = u32::from(*hold * (BUFFER_SIZE as u32) < in_flight_max(spare));
                    *hold += more;
                    spare -= more;
                }
            }
            assert_eq!(holds.iter().max(), Some(&held), "{stalled} stalled, {spare} spare");
            let another = in_flight_max(spare) / BUFFER_SIZE as u32;
            assert!(another + 1 >= held, "{another} for who comes next to {stalled}");
        }
    }
}
