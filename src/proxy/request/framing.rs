//! A client's protocol, beside the buffers that hold what it sent.

use super::{Front, Request};
use crate::config::RequestConfig;
use crate::io::Chain;
use crate::io::buffers::Buffers;
use crate::limits::BUFFER_SIZE;
use crate::protocol::{Conversation, ProtocolName, Reply, RequestEnd, Settings};
use crate::proxy::route::StableHash;

/// Tells the requests of one client apart, and the replies to them.
#[derive(Debug)]
pub struct Framing(Conversation);

impl Framing {
    /// The framing of a new client.
    pub fn new(protocol: ProtocolName, config: &RequestConfig) -> Self {
        Self(Conversation::new(protocol, &settings(config)))
    }

    /// How much of a request has to lie in one piece: the length of the scratch space for
    /// [`Framing::front`], in bytes.
    pub fn scratch_len(protocol: ProtocolName, config: &RequestConfig) -> usize {
        protocol.peek_max(&settings(config))
    }

    /// Looks for a request at the front of `input`, of which the first `scanned` bytes were looked
    /// at before. `scratch` is as long as [`Framing::scratch_len`] says, for what the protocol has to
    /// see in one piece and lies in several buffers.
    pub fn front(
        &mut self,
        input: &mut Chain,
        scanned: &mut u32,
        buffers: &mut Buffers,
        scratch: &mut [u8],
    ) -> Front {
        let (len, whole) = match self.scan(input, scanned, buffers) {
            Scan::Ambiguous => return Front::Opaque,
            Scan::Whole(len) => (len, true),
            Scan::Partial if self.0.is_sent_on(*scanned as usize, BUFFER_SIZE) => {
                (std::mem::take(scanned), false)
            }
            Scan::Partial => {
                if self.0.is_refused() {
                    buffers.clear(input);
                    *scanned = 0;
                }
                return Front::Partial;
            }
        };
        let peek = scratch.len().min(len as usize);
        match self.0.request(buffers.front(input, peek, scratch)) {
            Err(error) => Front::Refused(len, error),
            Ok(request) => Front::Request(Request {
                verb: request.verb,
                key: request.key.map(StableHash::of),
                // It stays at the front of the input until its reply is complete.
                repeatable: request.repeatable && whole && len as usize <= BUFFER_SIZE,
                to_all: request.to_all,
                len,
                whole,
            }),
        }
    }

    /// How many bytes of `input` go on with the request under way, and whether it is whole with
    /// them. None: it has become ambiguous.
    pub fn more(&mut self, input: &Chain, buffers: &Buffers) -> Option<(u32, bool)> {
        let mut seen = 0;
        match self.scan(input, &mut seen, buffers) {
            Scan::Partial => Some((seen, false)),
            Scan::Whole(len) => Some((len, true)),
            Scan::Ambiguous => None,
        }
    }

    /// The request is sent: a reply will follow.
    pub fn on_asked(&mut self) {
        self.0.on_sent();
    }

    /// Judges the bytes that follow those of the reply judged before.
    pub fn reply(&mut self, bytes: &[u8]) -> Reply {
        self.0.on_reply_bytes(bytes)
    }

    /// Whether both ends keep their connections after the reply that was just completed.
    pub fn keeps_alive(&self) -> bool {
        self.0.keeps_alive()
    }

    /// Whether the end of the backend's connection is the end of the reply.
    pub fn ends_with_connection(&self) -> bool {
        self.0.ends_with_connection()
    }

    /// Whether the reply says that the request did not do what it was for, so that the rest of it
    /// need not be sent.
    pub fn refuses(&self) -> bool {
        self.0.refuses()
    }

    /// Gives the protocol what follows the first `scanned` bytes of `input`, buffer by buffer, until
    /// a request ends. What was looked at is added to `scanned`, which starts again at an end.
    fn scan(&mut self, input: &Chain, scanned: &mut u32, buffers: &Buffers) -> Scan {
        let mut skip = *scanned as usize;
        for slice in buffers.slices(input) {
            let fresh = &slice[skip.min(slice.len())..];
            skip = skip.saturating_sub(slice.len());
            if fresh.is_empty() {
                continue;
            }
            match self.0.on_request_bytes(fresh) {
                RequestEnd::Partial => *scanned += fresh.len() as u32,
                RequestEnd::Whole(end) => {
                    return Scan::Whole(std::mem::take(scanned) + end as u32);
                }
                RequestEnd::Ambiguous => {
                    *scanned = 0;
                    return Scan::Ambiguous;
                }
            }
        }
        Scan::Partial
    }
}

/// What was found in an input.
enum Scan {
    Partial,
    /// A request that is this long.
    Whole(u32),
    Ambiguous,
}

fn settings(config: &RequestConfig) -> Settings {
    Settings { line_max: config.line_max, repeat_writes: config.repeat_writes }
}
