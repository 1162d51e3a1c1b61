//! The protocol of a client: where its requests end, and the answers to them.

use super::{ErrorReply, Front, Reply, Request};
use crate::config::{Protocol, RequestConfig};
use crate::io::Chain;
use crate::io::buffers::Buffers;
use crate::limits::BUFFER_SIZE;
use crate::metrics::Verb;
use crate::protocol::chronos::{self, Command, LineEnd};
use crate::protocol::http1::{self, Method, Scan};
use crate::proxy::route::StableHash;

/// Tells the requests of one client apart, and their answers.
#[allow(clippy::large_enum_variant, reason = "of a worker's clients all are the same variant")]
#[derive(Debug)]
pub enum Framing {
    /// Lines.
    Chronos {
        /// Finds them.
        lines: chronos::RequestScanner,
        /// The longest line.
        line_max: usize,
        /// Whether writes may be sent again.
        repeat_writes: bool,
    },
    /// Messages.
    Http1 {
        /// Finds requests.
        requests: http1::RequestScanner,
        /// Finds the answer to the one under way.
        responses: http1::ResponseScanner,
    },
}

impl Framing {
    /// The framing of a new client.
    pub fn new(protocol: Protocol, config: &RequestConfig) -> Self {
        match protocol {
            Protocol::Http1 => Self::Http1 {
                requests: http1::RequestScanner::new(),
                responses: http1::ResponseScanner::new(),
            },
            Protocol::Chronos | Protocol::Tcp => Self::Chronos {
                lines: chronos::RequestScanner::new(config.line_max),
                line_max: config.line_max,
                repeat_writes: config.repeat_writes,
            },
        }
    }

    /// Looks for a request at the front of `input`, of which the first `scanned` bytes were looked
    /// at before. `scratch` holds a line of the greatest length, for one in several buffers.
    pub fn front(
        &mut self,
        input: &mut Chain,
        scanned: &mut u32,
        buffers: &mut Buffers,
        scratch: &mut [u8],
    ) -> Front {
        match self {
            Self::Chronos { lines, line_max, repeat_writes } => {
                let end = scan(input, scanned, buffers, |fresh| {
                    lines.on_bytes(fresh).map(|end| match end {
                        LineEnd::Whole(count) => (count, true),
                        LineEnd::TooLong(count) => (count, false),
                    })
                });
                match end {
                    None => {
                        if lines.is_too_long() {
                            buffers.clear(input);
                            *scanned = 0;
                        }
                        Front::Partial
                    }
                    Some((len, false)) => Front::Refused(len, ErrorReply::TooLong(*line_max)),
                    Some((len, true)) => {
                        let line = buffers.front(input, len as usize, scratch);
                        understand(line, len, *repeat_writes)
                    }
                }
            }
            Self::Http1 { requests, .. } => {
                let end = scan(input, scanned, buffers, |fresh| message_end(requests, fresh));
                match end {
                    Some((_, false)) => Front::Opaque,
                    // What is known of the last request is not to be taken for the next.
                    None if requests.is_between_requests() || !requests.is_head_complete() => {
                        Front::Partial
                    }
                    None if *scanned < BUFFER_SIZE as u32 && comes_in_one_buffer(requests) => {
                        Front::Partial
                    }
                    end => {
                        let len = end.map_or_else(|| std::mem::take(scanned), |(len, _)| len);
                        let whole = end.is_some();
                        let method = requests.method();
                        let short = whole && len as usize <= BUFFER_SIZE;
                        let repeatable = short && method.is_idempotent();
                        Front::Request(Request {
                            verb: verb(method),
                            key: None,
                            repeatable,
                            len,
                            whole,
                        })
                    }
                }
            }
        }
    }

    /// How many bytes of `input` go on with the request under way, and whether it is whole with
    /// them. None: it has become ambiguous.
    pub fn more(&mut self, input: &Chain, buffers: &Buffers) -> Option<(u32, bool)> {
        let Self::Http1 { requests, .. } = self else { return Some((0, true)) };
        let mut seen = 0;
        match scan(input, &mut seen, buffers, |fresh| message_end(requests, fresh)) {
            None => Some((seen, false)),
            Some((len, true)) => Some((len, true)),
            Some((_, false)) => None,
        }
    }

    /// The request is sent: an answer will follow.
    pub fn on_asked(&mut self) {
        if let Self::Http1 { requests, responses } = self {
            responses.begin(requests.method());
        }
    }

    /// Judges the bytes that follow those of the answer judged before.
    pub fn reply(&mut self, bytes: &[u8]) -> Reply {
        match self {
            Self::Chronos { .. } => match chronos::reply(bytes) {
                chronos::Reply::Partial => Reply::Partial,
                chronos::Reply::Complete => Reply::Complete,
                chronos::Reply::Surplus(count) => Reply::Surplus(count),
            },
            Self::Http1 { responses, .. } => match responses.scan(bytes) {
                Scan::Partial => Reply::Partial,
                Scan::Complete(count) if count == bytes.len() => Reply::Complete,
                Scan::Complete(count) => Reply::Surplus(count),
                Scan::Tunnel(_) | Scan::Ambiguous(_) => Reply::Opaque,
            },
        }
    }

    /// Whether both ends keep their connections after the answer that was just completed.
    pub fn keeps_alive(&self) -> bool {
        match self {
            Self::Chronos { .. } => true,
            Self::Http1 { requests, responses } => {
                requests.keeps_alive() && responses.is_reusable()
            }
        }
    }

    /// Whether the end of the backend's connection is the end of the answer.
    pub fn ends_with_connection(&self) -> bool {
        match self {
            Self::Chronos { .. } => false,
            Self::Http1 { responses, .. } => responses.is_until_close(),
        }
    }

    /// Whether the answer says that the request did not do what it was for, so that the rest of it
    /// need not be sent.
    pub fn refuses(&self) -> bool {
        match self {
            Self::Chronos { .. } => false,
            Self::Http1 { responses, .. } => responses.status().is_some_and(|status| status >= 300),
        }
    }

    /// The protocol, for errors.
    pub fn protocol(&self) -> Protocol {
        match self {
            Self::Chronos { .. } => Protocol::Chronos,
            Self::Http1 { .. } => Protocol::Http1,
        }
    }
}

/// The end of a request, and whether it is one that can be understood.
fn message_end(requests: &mut http1::RequestScanner, bytes: &[u8]) -> Option<(usize, bool)> {
    match requests.scan(bytes) {
        Scan::Partial => None,
        Scan::Complete(count) => Some((count, true)),
        Scan::Tunnel(_) | Scan::Ambiguous(_) => Some((0, false)),
    }
}

/// Whether a request is waited for until it is whole, since it would hold a connection while its
/// client takes its time. One that is larger than a buffer is sent on as it comes, and so is one
/// whose client expects to be asked for the body: it sends none before.
fn comes_in_one_buffer(requests: &http1::RequestScanner) -> bool {
    let small = requests.body_len().is_none_or(|len| len <= BUFFER_SIZE as u64);
    small && !requests.expects_continue()
}

/// Gives `look` what follows the first `scanned` bytes of `input`, buffer by buffer, until it has
/// found an end. Returns how many bytes there are up to it, with what it said.
fn scan<T>(
    input: &Chain,
    scanned: &mut u32,
    buffers: &Buffers,
    mut look: impl FnMut(&[u8]) -> Option<(usize, T)>,
) -> Option<(u32, T)> {
    let mut skip = *scanned as usize;
    for slice in buffers.slices(input) {
        let fresh = &slice[skip.min(slice.len())..];
        skip = skip.saturating_sub(slice.len());
        if fresh.is_empty() {
            continue;
        }
        if let Some((count, found)) = look(fresh) {
            return Some((std::mem::take(scanned) + count as u32, found));
        }
        *scanned += fresh.len() as u32;
    }
    None
}

fn understand(line: &[u8], len: u32, repeat_writes: bool) -> Front {
    let Some(request) = chronos::Request::parse(line) else {
        return Front::Refused(len, ErrorReply::Blank);
    };
    let verb = match request.command {
        Command::Ping => Verb::Ping,
        Command::Get => Verb::Get,
        Command::Set => Verb::Set,
        Command::Del => Verb::Del,
        Command::Compact => Verb::Compact,
        Command::Other => Verb::Other,
    };
    let write = matches!(verb, Verb::Set | Verb::Del);
    Front::Request(Request {
        verb,
        key: request.key.map(StableHash::of),
        repeatable: request.command.is_repeatable() || (write && repeat_writes),
        len,
        whole: true,
    })
}

fn verb(method: Method) -> Verb {
    match method {
        Method::Get => Verb::Get,
        Method::Head => Verb::Head,
        Method::Post => Verb::Post,
        Method::Put => Verb::Put,
        Method::Delete => Verb::Delete,
        Method::Options | Method::Trace | Method::Connect | Method::Other => Verb::Other,
    }
}
