//! The state machine without worker or driver: state by event, and what it answers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::state::State;
use super::*;
use crate::config::{Config, PoolMode, Protocol};
use crate::io::buffers::Buffers;
use crate::io::{Buf, Close, Unheard};
use crate::metrics::{CloseReason, Discard, Outcome, Retry};
use crate::proxy::Side;
use crate::proxy::retry_budget::{Reserve, RetryBudget};

mod limits;
mod placing;
mod retries;

const SECOND: Duration = Duration::from_secs(1);
const GET: Verb = Verb::named("get");
const SET: Verb = Verb::named("set");
const POST: Verb = Verb::named("post");
const COMPACT: Verb = Verb::named("compact");
const UPLOAD: &str = "POST / HTTP/1.1\r\nContent-Length: 100000\r\n\r\n";
const DOWNLOAD: &str = "GET / HTTP/1.1\r\n\r\n";
const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";

fn count(verb: Verb, outcome: Outcome) -> Action {
    Action::Count(verb, outcome, Duration::ZERO)
}

/// A client, and all that its decisions depend on.
struct Bench {
    client: Client,
    buffers: Buffers,
    policy: Policy,
    retries: RetryBudget,
    scratch: [u8; 16],
    drains_since: Option<Instant>,
    now: Instant,
}

fn conn() -> ConnId {
    ConnId::from_parts(1, 0)
}

fn backend(made: Instant) -> BackendConn {
    let endpoint = EndpointId::at(0);
    BackendConn { conn: conn(), endpoint, retire_at: None, made, served: false, unread: false }
}

impl Bench {
    fn new(protocol: Protocol) -> Self {
        let mut config = Config::from_vars([]).unwrap();
        let route = Arc::make_mut(&mut config.routes[0]);
        route.protocol = protocol;
        route.requests.line_max = 16;
        route.pool.mode = PoolMode::Request;
        let now = Instant::now();
        let framing = Framing::new(protocol, &route.requests);
        let mut policy = Policy::new(route, Duration::ZERO);
        let (queue, endpoint) = (SECOND, SECOND);
        policy.limits = Limits { idle: None, half_close: None, queue, endpoint, request: None };
        Self {
            client: Client::new(ConnId::from_parts(0, 0), framing, now),
            buffers: Buffers::new(16).unwrap(),
            retries: RetryBudget::new(Some(20), Arc::new(Reserve::new(now)), now),
            policy,
            scratch: [0; 16],
            drains_since: None,
            now,
        }
    }

    /// A client that has sent this, and has got a connection for it.
    fn asked(protocol: Protocol, bytes: &str) -> Self {
        let mut bench = Self::new(protocol);
        bench.feed(bytes);
        assert_eq!(bench.next(), [Action::Acquire], "{bytes:?}");
        bench.acquire();
        bench
    }

    fn tell(&mut self, event: impl FnOnce(&mut Client, &mut Moment<'_>) -> Actions) -> Vec<Action> {
        let mut moment = Moment {
            policy: &self.policy,
            buffers: &mut self.buffers,
            retries: &mut self.retries,
            scratch: &mut self.scratch,
            drains_since: self.drains_since,
            now: self.now,
        };
        let actions: Vec<_> = event(&mut self.client, &mut moment).iter().collect();
        if actions.contains(&Action::Send(conn())) {
            while self.client.has_outgoing() {
                let buf = self.client.take_outgoing(&mut self.buffers).unwrap();
                self.buffers.give(buf);
            }
        }
        actions
    }

    fn buf(&mut self, bytes: &str) -> Buf {
        let mut buf = self.buffers.take().unwrap();
        self.buffers.space(&mut buf)[..bytes.len()].copy_from_slice(bytes.as_bytes());
        self.buffers.set_len(&mut buf, bytes.len());
        buf
    }

    fn feed(&mut self, bytes: &str) {
        let buf = self.buf(bytes);
        self.client.on_received(buf, &mut self.buffers, self.now);
        assert!(self.client.is_due());
    }

    fn next(&mut self) -> Vec<Action> {
        self.tell(Client::next)
    }

    /// Its request joins the queue.
    fn wait(&mut self) {
        self.tell(Client::on_waiting);
    }

    fn acquire(&mut self) -> Vec<Action> {
        let backend = backend(self.now);
        self.tell(|client, moment| client.on_acquired(backend, moment))
    }

    /// Bytes of a reply come. Returns how many go to the client, and what else is to be done.
    fn reply(&mut self, bytes: &str) -> (usize, Vec<Action>) {
        let buf = self.buf(bytes);
        let mut passed = 0;
        let actions = self.tell(|client, moment| {
            let replied = client.on_reply(&buf, moment);
            passed = replied.passed;
            replied.actions
        });
        self.buffers.give(buf);
        (passed, actions)
    }

    fn lose(&mut self, why: Retry) -> Vec<Action> {
        self.tell(|client, moment| client.on_backend_ended(why, moment))
    }

    fn sent(&mut self, bytes: usize) -> Vec<Action> {
        self.tell(|client, moment| client.on_sent(bytes as u32, moment))
    }

    fn backend_sent(&mut self, bytes: usize) -> Vec<Action> {
        self.tell(|client, moment| client.on_backend_sent(bytes as u32, moment.now))
    }

    fn deadline(&self) -> Option<Duration> {
        let deadline = self.client.deadline(&self.policy.limits)?;
        Some(deadline.saturating_duration_since(self.now))
    }

    /// What follows when the timer fires after so long.
    fn after(&mut self, time: Duration) -> Vec<Action> {
        self.now += time;
        let actions = self.tell(|client, moment| client.on_deadline(false, moment));
        actions.into_iter().filter(|action| !matches!(action, Action::Arm(_))).collect()
    }

    fn discard(&self, why: Discard) -> Action {
        let backend = self.client.backend().unwrap();
        Action::Discard(backend.conn, backend.endpoint, why, DiscardHow::Now(Close::Reset))
    }
}

#[test]
fn requests_are_found_one_by_one_however_they_are_split() {
    let mut bench = Bench::new(Protocol::Chronos);
    let mut found = Vec::new();
    for byte in "GET a\n \nSET key 0123456789\nPING\n".chars() {
        bench.feed(&byte.to_string());
        for action in bench.next() {
            if let Action::Reply(error, None) = action {
                found.push(format!("{error}"));
            }
            if action == Action::Acquire {
                let State::Ready { pending, .. } = &bench.client.state else { panic!("it waits") };
                let super::state::Wanted::Request(request) = pending.wanted else {
                    panic!("lines")
                };
                assert_eq!(bench.client.input().bytes(), request.len, "nothing is ahead of it");
                found.push(format!("{} {}", request.verb.label(), request.repeatable));
                bench.acquire();
                bench.backend_sent(request.len as usize);
                assert_eq!(bench.reply("OK\n").0, 3);
                bench.sent(3);
                bench.client.release();
            }
        }
    }
    let expected = ["get true", "empty request", "request longer than 16 bytes", "ping true"];
    assert_eq!(found, expected);
    assert_eq!(bench.buffers.free(), bench.buffers.capacity());
}

#[test]
fn only_what_is_safe_is_sent_again_and_only_before_its_answer() {
    for (line, replied) in
        [("GET a\n", false), ("GET a\n", true), ("SET a b\n", false), ("SET a b\n", true)]
    {
        let mut bench = Bench::asked(Protocol::Chronos, line);
        if replied {
            assert_eq!(bench.reply("O").0, 1);
        }
        let verb = if line.starts_with("GET") { GET } else { SET };
        let dead = bench.discard(Discard::Dead);
        let lost = count(verb, Outcome::Lost);
        let expected = match (line, replied) {
            ("GET a\n", false) => vec![dead, Action::CountRetry(Retry::Ended), Action::Serve],
            (_, true) => vec![dead, lost, Action::Close(CloseReason::BackendReset)],
            _ => vec![dead, lost, Action::Reply(ErrorReply::Lost, None), Action::Serve],
        };
        assert_eq!(bench.lose(Retry::Ended), expected, "{line:?} {replied}");
        let held =
            if expected.contains(&Action::CountRetry(Retry::Ended)) { line.len() } else { 0 };
        assert_eq!(bench.client.input().bytes() as usize, held, "what may be sent again is there");
    }
}

#[test]
fn bytes_of_an_earlier_request_are_not_forgotten_while_a_connection_is_kept() {
    let mut bench = Bench::new(Protocol::Chronos);
    bench.policy.releases_after_reply = false;
    bench.feed("GET a\n");
    assert_eq!(bench.next(), [Action::Acquire]);
    bench.acquire();
    let unsent = |bench: &Bench| bench.client.state.backend().map(|backend| backend.unsent);
    for _ in 0..2 {
        assert_eq!(unsent(&bench), Some(6), "none of a connection that is gone");
        let (passed, actions) = bench.reply("answered too early\n");
        assert_eq!((passed, actions[0]), (19, Action::Keep(EndpointId::at(0))));
        assert_eq!(unsent(&bench), Some(6));
        bench.feed("GET a\n");
        assert_eq!(bench.next(), [Action::Prove(conn())]);
        let unexpected = bench.discard(Discard::Unexpected);
        let actions = bench.tell(|client, moment| client.on_proved(None, moment));
        assert_eq!(actions, [unexpected, Action::Acquire], "open and silent as it is");
        bench.acquire();
    }
}

#[test]
fn a_kept_connection_is_used_again_if_it_is_open_and_silent() {
    for why_not in [None, Some(Discard::Dead), Some(Discard::Unexpected)] {
        let mut bench = Bench::asked(Protocol::Chronos, "GET a\n");
        bench.policy.releases_after_reply = false;
        bench.backend_sent(6);
        bench.reply("a\n");
        bench.feed("GET b\n");
        assert_eq!(bench.next(), [Action::Prove(conn())]);
        let discard = why_not.map(|why| bench.discard(why));
        let actions = bench.tell(|client, moment| client.on_proved(why_not, moment));
        match discard {
            None => assert!(actions.contains(&Action::Send(conn())) && bench.client.is_in_flight()),
            Some(discard) => {
                assert_eq!(actions, [discard, Action::Acquire]);
            }
        }
    }
}

#[test]
fn an_answer_that_comes_early_is_followed_by_the_rest_of_the_request() {
    for (status, cut) in [(202, true), (413, false)] {
        let mut bench = Bench::asked(Protocol::Http1, UPLOAD);
        let answer = format!("HTTP/1.1 {status} X\r\nContent-Length: 0\r\n\r\n");
        let count = count(POST, Outcome::Answered);
        assert_eq!(
            bench.reply(&answer),
            (answer.len(), vec![count, Action::Serve]),
            "counted once"
        );
        bench.sent(answer.len());
        for size in [16_384, 16_384, 16_384, 16_384, 16_384, 16_384, 1_696] {
            bench.backend_sent(bench.client.state.backend().unwrap().unsent as usize);
            bench.feed(&"x".repeat(size));
            assert_eq!(bench.next(), [Action::Send(conn()), Action::Serve]);
        }
        assert!(!bench.next().contains(&Action::ReleaseSoon), "it is still on its way");
        assert_eq!(bench.backend_sent(200_000), [Action::Serve]);
        assert_eq!(bench.next(), [Action::ReleaseSoon, Action::Serve], "as before the request");
        assert!(bench.client.backend().unwrap().unread);
        // Where nothing more of it comes.
        let mut bench = Bench::asked(Protocol::Http1, UPLOAD);
        bench.reply(&answer);
        bench.sent(answer.len());
        bench.tell(|client, _| client.on_backend_send_failed());
        let actions = bench.lose(Retry::Broken);
        assert_eq!(actions.contains(&Action::Close(CloseReason::BackendReset)), cut, "{status}");
    }
}

#[test]
fn a_connection_that_takes_no_more_is_read_to_its_end() {
    let mut bench = Bench::asked(Protocol::Http1, UPLOAD);
    let read_on = [Action::Serve];
    assert_eq!(bench.tell(|client, _| client.on_backend_send_failed()), read_on);
    let answer = "HTTP/1.1 413 X\r\nContent-Length: 0\r\n\r\n";
    let dead = { bench.discard(Discard::Dead) };
    let (passed, actions) = bench.reply(answer);
    assert_eq!((passed, actions[0]), (answer.len(), dead), "nothing can be passed on");
    let mut bench = Bench::asked(Protocol::Http1, DOWNLOAD);
    assert_eq!(bench.tell(|client, _| client.on_backend_send_failed()), read_on);
    let (_, actions) = bench.reply("HTTP/1.1 200 OK\r\n\r\nuntil");
    assert!(bench.client.is_in_flight(), "{actions:?}");
    let cut_off = Action::Close(CloseReason::BackendReset);
    assert_eq!(bench.lose(Retry::Ended).last(), Some(&cut_off), "not whole, whatever its end says");
}

#[test]
fn the_end_of_a_connection_may_be_the_end_of_the_answer() {
    for (why, whole) in [(Retry::Ended, true), (Retry::Broken, false)] {
        let mut bench = Bench::asked(Protocol::Http1, DOWNLOAD);
        bench.backend_sent(DOWNLOAD.len());
        bench.reply("HTTP/1.1 200 OK\r\n\r\nuntil");
        let spent = bench.discard(Discard::Spent);
        let get = |outcome| Action::Count(GET, outcome, Duration::ZERO);
        let expected = if whole {
            vec![spent, get(Outcome::Answered), Action::Shutdown, Action::Serve]
        } else {
            vec![spent, get(Outcome::Lost), Action::Close(CloseReason::BackendReset)]
        };
        assert_eq!(bench.lose(why), expected, "{why:?}");
    }
}

#[test]
fn what_a_reply_leaves_of_its_connection() {
    let closes = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    let surplus = format!("{OK}HTTP");
    for (reply, releases, passed) in [
        (OK, true, OK.len()),
        (OK, false, OK.len()),
        (closes, true, closes.len()),
        (&surplus, true, OK.len()),
    ] {
        let mut bench = Bench::asked(Protocol::Http1, DOWNLOAD);
        bench.policy.releases_after_reply = releases;
        bench.backend_sent(DOWNLOAD.len());
        let mut conn = *bench.client.backend().unwrap();
        conn.served = true;
        let discard =
            |why| Action::Discard(conn.conn, conn.endpoint, why, DiscardHow::Now(Close::Reset));
        let count = count(GET, Outcome::Answered);
        let expected = match (reply, releases) {
            (reply, true) if reply == OK => vec![Action::ReleaseSoon, count, Action::Serve],
            (reply, false) if reply == OK => {
                vec![Action::Keep(conn.endpoint), count, Action::Serve]
            }
            (reply, _) if reply == closes => {
                vec![discard(Discard::Spent), count, Action::Shutdown, Action::Serve]
            }
            _ => vec![discard(Discard::Unexpected), count, Action::Serve],
        };
        assert_eq!(bench.reply(reply), (passed, expected), "{reply}");
        let released = Fate::Released { conn, paused: false, asked: false };
        assert_eq!(bench.client.release(), (reply == OK).then_some(released));
    }
}

#[test]
fn what_nobody_asked_for_ends_a_connection() {
    // Between two requests.
    let mut bench = Bench::asked(Protocol::Chronos, "GET a\n");
    bench.policy.releases_after_reply = false;
    bench.backend_sent(6);
    bench.reply("a\n");
    let discard = bench.discard(Discard::Unexpected);
    assert_eq!(bench.reply("b\n"), (0, vec![discard]));
    assert!(bench.client.is_idle(), "its client does not notice");
    // Behind an early reply, before all of the request was passed on.
    let mut bench = Bench::asked(Protocol::Http1, UPLOAD);
    bench.reply(OK);
    let (passed, actions) = bench.reply("HTTP");
    assert_eq!(passed, 0);
    assert_eq!(actions.last(), Some(&Action::Close(CloseReason::BackendReset)), "it is cut");
}

#[test]
fn a_slow_client_holds_its_backend_up() {
    let mut bench = Bench::asked(Protocol::Http1, DOWNLOAD);
    bench.backend_sent(DOWNLOAD.len());
    // Of 16 buffers so few are spare that a direction may hold one.
    let head = "HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n";
    let big = format!("{head}{}", "x".repeat(16_384 - head.len()));
    let pauses = |actions: &[Action]| actions.contains(&Action::Pause(Side::Backend));
    assert!(pauses(&bench.reply(&big).1));
    assert!(!pauses(&bench.reply("x").1), "once");
    let resumes = |actions: &[Action]| actions.contains(&Action::Resume(Side::Backend));
    assert!(!resumes(&bench.sent(8_000)));
    assert!(resumes(&bench.sent(8_000)), "once it has taken half");
}

#[test]
fn a_client_in_each_state_is_closed_as_it_deserves() {
    let lasted = Duration::from_secs(3);
    let get = |outcome| Action::Count(GET, outcome, lasted);
    let reset = ClientEnding::Now(Close::Reset);
    let close = |bench: &mut Bench, reason| {
        let (ending, actions) =
            bench.client.on_closing(reason, &mut bench.buffers, bench.now + lasted);
        assert_eq!(bench.client.input().bytes(), 0);
        (ending, actions.iter().collect::<Vec<_>>())
    };
    let mut idle = Bench::new(Protocol::Chronos);
    let graceful = ClientEnding::Now(Close::Graceful);
    assert_eq!(close(&mut idle, CloseReason::IdleTimeout), (graceful, vec![]));
    let mut queued = Bench::new(Protocol::Chronos);
    queued.feed("GET a\n");
    queued.next();
    queued.wait();
    let gone = vec![Action::LeaveQueue, get(Outcome::ClientGone)];
    assert_eq!(close(&mut queued, CloseReason::ClientReset), (reset, gone));
    let mut asked = Bench::asked(Protocol::Chronos, "GET a\n");
    let gone = vec![asked.discard(Discard::Abandoned), get(Outcome::ClientGone)];
    assert_eq!(close(&mut asked, CloseReason::ClientReset), (reset, gone));
    let mut slow = Bench::asked(Protocol::Chronos, "GET a\n");
    let timeout = vec![slow.discard(Discard::Timeout), get(Outcome::Timeout)];
    assert_eq!(close(&mut slow, CloseReason::IdleTimeout), (reset, timeout));
    let mut half_closed = Bench::asked(Protocol::Chronos, "GET a\n");
    let timeout = vec![half_closed.discard(Discard::Abandoned), get(Outcome::Timeout)];
    assert_eq!(close(&mut half_closed, CloseReason::HalfCloseTimeout), (reset, timeout));
    let mut cut = Bench::asked(Protocol::Chronos, "GET a\n");
    let by_us = vec![cut.discard(Discard::Abandoned), get(Outcome::Cut)];
    assert_eq!(close(&mut cut, CloseReason::DrainDeadline), (reset, by_us));
    let mut leaving = Bench::asked(Protocol::Http1, DOWNLOAD);
    leaving.lose(Retry::Ended);
    leaving.acquire();
    leaving.policy.attempts_max = 1;
    assert!(leaving.lose(Retry::Ended).contains(&Action::Shutdown));
    let lingers = (ClientEnding::EndOrResetBehind, vec![]);
    assert_eq!(close(&mut leaving, CloseReason::HalfCloseTimeout), lingers);
}

#[test]
fn an_error_of_http_ends_the_connection_and_one_of_lines_does_not() {
    for (protocol, bytes, ends) in
        [(Protocol::Http1, DOWNLOAD, true), (Protocol::Chronos, "PING\n", false)]
    {
        let mut bench = Bench::new(protocol);
        bench.feed(bytes);
        bench.next();
        bench.wait();
        let error = ErrorReply::QueueFull;
        let actions = bench.tell(|client, moment| client.fail(error, None, moment));
        // Where there is no buffer for the error its client is closed: it is counted before.
        let Action::Count(_, counted, _) = actions[1] else { panic!("{actions:?}") };
        assert_eq!((actions[0], counted), (Action::LeaveQueue, Outcome::QueueFull));
        assert_eq!(actions[2], Action::Reply(error, None));
        assert_eq!(actions.contains(&Action::Shutdown), ends, "{protocol:?}");
        assert_eq!(bench.client.input().bytes(), 0);
    }
}

#[test]
fn a_request_waits_for_an_endpoint_once_however_often_they_come_and_go() {
    let mut bench = Bench::new(Protocol::Chronos);
    bench.feed("PING\n");
    bench.next();
    let until = bench.now + SECOND;
    for _ in 0..3 {
        let limits = bench.policy.limits;
        assert_eq!(bench.client.on_no_endpoint(&limits, bench.now), until);
        bench.wait();
        bench.now += SECOND / 4;
        bench.tell(|client, _| client.on_placed_again());
        bench.client.on_endpoints(bench.now);
        assert_eq!(bench.deadline(), Some(SECOND), "now it waits for a connection");
    }
    let limits = bench.policy.limits;
    bench.client.on_no_endpoint(&limits, bench.now);
    assert_eq!(bench.after(SECOND / 4), [Action::Fail(ErrorReply::NoEndpoint(SECOND))]);
}

#[test]
fn what_a_request_waits_for_an_endpoint_is_a_part_of_its_wait_for_a_connection() {
    let mut bench = Bench::new(Protocol::Chronos);
    bench.feed("PING\n");
    bench.next();
    let limits = bench.policy.limits;
    bench.client.on_no_endpoint(&limits, bench.now);
    bench.wait();
    bench.now += SECOND / 2;
    bench.tell(|client, _| client.on_placed_again());
    bench.client.on_endpoints(bench.now);
    bench.now += SECOND / 4;
    let now = bench.now;
    let actions = bench.tell(|client, moment| client.on_acquired(backend(now), moment));
    assert_eq!(actions[0], Action::Asks(EndpointId::at(0), conn(), 3 * SECOND / 4));
}

#[test]
fn a_broadcast_goes_from_store_to_store_and_gets_one_reply() {
    let mut bench = Bench::new(Protocol::Chronos);
    bench.policy.binding = Binding::Key;
    bench.feed("COMPACT\n");
    assert_eq!(bench.next(), [Action::Acquire]);
    let away = |client: &mut Client, moment: &mut Moment<'_>| {
        client.fail(ErrorReply::Unreachable, Some((1, "a")), moment)
    };
    for store in 0..3 {
        assert_eq!(bench.client.target(), Target::Store(store));
        if store == 1 {
            assert_eq!(bench.tell(away), [Action::Serve], "its client is not told yet");
        } else {
            bench.acquire();
            bench.backend_sent(8);
            let reply = bench.reply("OK_COMPACTED\n");
            assert_eq!(reply, (0, vec![Action::ReleaseSoon, Action::Serve]));
            bench.client.release();
        }
    }
    let mut space = [0; 128];
    let mut len = 0;
    let count = count(COMPACT, Outcome::Answered);
    let actions = bench.tell(|client, moment| {
        let (broadcast, actions) = client.on_stores_done(moment);
        len = broadcast.write_answer(&mut space);
        actions
    });
    assert_eq!(actions, [count, Action::Serve]);
    assert_eq!(&space[..len], b"ERR_COMPACT 1 of 3 stores failed, not available: a\n");
    assert!(bench.client.is_idle() && bench.client.input().is_empty());
}

#[test]
fn in_a_drain_who_has_nothing_under_way_leaves() {
    let mut bench = Bench::asked(Protocol::Chronos, "GET a\n");
    bench.drains_since = Some(bench.now);
    assert!(!bench.next().contains(&Action::LookBeforeLeaving), "it is owed a reply");
    bench.backend_sent(6);
    bench.reply("a\n");
    assert_eq!(bench.next().last(), Some(&Action::LookBeforeLeaving));
    let now = bench.now;
    let bytes = bench.tell(|client, _| client.on_looked(Unheard::Bytes, 0, now));
    assert_eq!(bytes, [], "what it has sent is served first");
    let takes = bench.tell(|client, _| client.on_looked(Unheard::Nothing, 2, now));
    assert_eq!(takes, [Action::Shutdown, Action::Serve], "it lacks some of its reply");
    bench.sent(2);
    assert_eq!(bench.after(2 * SECOND), [Action::Close(CloseReason::Drained)]);
    let mut bench = Bench::new(Protocol::Chronos);
    bench.drains_since = Some(bench.now);
    assert!(!bench.next().contains(&Action::LookBeforeLeaving), "it has just come");
    assert_eq!(bench.after(2 * SECOND), [Action::Serve]);
    assert_eq!(bench.next().last(), Some(&Action::LookBeforeLeaving));
    let looked = bench.tell(|client, _| client.on_looked(Unheard::Nothing, 0, now));
    assert_eq!(looked, [Action::Close(CloseReason::Drained)]);
}

#[test]
fn bytes_that_can_be_read_in_two_ways_get_a_connection_of_their_own() {
    let mut bench = Bench::new(Protocol::Http1);
    bench.feed("GET / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n");
    assert_eq!(bench.next(), [Action::Acquire]);
    let counted = count(Verb::OPAQUE, Outcome::Opaque);
    assert_eq!(bench.acquire(), [counted, Action::BecomeOpaque]);
    let parts = bench.client.into_opaque_parts(&mut bench.buffers);
    assert_eq!(parts.backend_unsent, 0);
    assert!(parts.input.bytes() > 60, "nothing of it was sent");
}
