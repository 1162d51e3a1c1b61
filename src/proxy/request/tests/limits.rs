//! Time limits: which one holds in which state, and what follows.

use super::*;
use crate::limits::{CLIENT_STALL_MAX, LINGER_MAX};

#[test]
fn each_state_has_its_own_time_limit() {
    let mut bench = Bench::new(Protocol::Chronos);
    bench.policy.limits = Limits {
        idle: Some(7 * SECOND),
        half_close: Some(5 * SECOND),
        queue: SECOND,
        endpoint: SECOND,
        request: Some(3 * SECOND),
    };
    assert_eq!(bench.deadline(), Some(7 * SECOND));
    bench.feed("SET a b\n");
    assert_eq!(bench.next(), [Action::Acquire]);
    bench.wait();
    assert_eq!(bench.after(Duration::ZERO), []);
    assert_eq!(bench.after(SECOND), [Action::Fail(ErrorReply::QueueTimeout(SECOND))]);
    assert_eq!(bench.acquire()[0], Action::Asks(EndpointId::at(0), conn(), SECOND));
    assert_eq!(bench.deadline(), Some(3 * SECOND));
    bench.backend_sent(8);
    bench.reply("OK\n");
    bench.sent(3);
    bench.client.on_ended(bench.now);
    let closed = Action::Close(CloseReason::HalfCloseTimeout);
    assert_eq!(bench.after(5 * SECOND), [closed]);
}

#[test]
fn one_that_may_have_left_does_not_wait_for_ever_for_a_backend_without_a_limit() {
    let mut bench = Bench::asked(Protocol::Http1, DOWNLOAD);
    bench.policy.limits.half_close = Some(5 * SECOND);
    bench.backend_sent(DOWNLOAD.len());
    assert_eq!(bench.deadline(), None, "it may want to wait");
    bench.client.on_ended(bench.now);
    bench.policy.limits.request = Some(9 * SECOND);
    assert_eq!(bench.deadline(), Some(9 * SECOND), "a limit of its own");
    bench.policy.limits.request = None;
    assert_eq!(bench.after(5 * SECOND), [Action::Close(CloseReason::HalfCloseTimeout)]);
}

#[test]
fn a_backend_is_timed_only_while_it_is_its_turn() {
    let asked = |bytes: &str| {
        let mut bench = Bench::asked(Protocol::Http1, bytes);
        bench.policy.limits.request = Some(3 * SECOND);
        bench
    };
    let is_error = |actions: &[Action], error| actions[2] == Action::Reply(error, None);
    let timeout = ErrorReply::Timeout(3 * SECOND);
    for (bytes, then) in [(UPLOAD, CLIENT_STALL_MAX), (DOWNLOAD, 3 * SECOND)] {
        assert!(is_error(&asked(bytes).after(3 * SECOND), timeout), "it takes nothing");
        let mut bench = asked(bytes);
        bench.now += SECOND;
        bench.backend_sent(bytes.len());
        assert_eq!(bench.deadline(), Some(then), "it has all of it");
    }
    let mut bench = asked(UPLOAD);
    bench.backend_sent(UPLOAD.len());
    assert!(is_error(&bench.after(CLIENT_STALL_MAX), ErrorReply::Unfinished(CLIENT_STALL_MAX)));
    // Within an answer.
    let begun = || {
        let mut bench = asked(DOWNLOAD);
        bench.backend_sent(DOWNLOAD.len());
        let answer = "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n";
        assert_eq!(bench.reply(answer).0, answer.len());
        (bench, answer.len())
    };
    let (mut bench, _) = begun();
    assert_eq!(bench.after(3 * SECOND), [], "a slow reader");
    let stalled = Action::Close(CloseReason::ClientTimeout);
    let rest = CLIENT_STALL_MAX.saturating_sub(3 * SECOND);
    assert_eq!(bench.after(rest), [stalled]);
    let (mut bench, _) = begun();
    bench.policy.limits.idle = Some(2 * SECOND);
    assert_eq!(bench.after(2 * SECOND), [Action::Close(CloseReason::IdleTimeout)]);
    let (mut bench, len) = begun();
    bench.now += 20 * SECOND;
    bench.sent(len);
    assert_eq!(bench.deadline(), Some(3 * SECOND));
    bench.now += 2 * SECOND;
    bench.reply("12345");
    bench.sent(5);
    assert_eq!(bench.deadline(), Some(3 * SECOND), "it flows");
    let discard = bench.discard(Discard::Timeout);
    let cut_off = Action::Close(CloseReason::BackendReset);
    let count = Action::Count(GET, Outcome::Timeout, 25 * SECOND);
    assert_eq!(bench.after(3 * SECOND), [discard, count, cut_off]);
}

#[test]
fn one_that_is_to_leave_may_linger_for_less_time_once_it_has_all() {
    let mut bench = Bench::asked(Protocol::Http1, DOWNLOAD);
    bench.backend_sent(DOWNLOAD.len());
    let closes = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    assert!(bench.reply(closes).1.contains(&Action::Shutdown));
    bench.next();
    assert_eq!(bench.deadline(), Some(CLIENT_STALL_MAX), "it takes none of its reply");
    let at = bench.now + LINGER_MAX;
    assert_eq!(bench.sent(closes.len()), [Action::Arm(at)]);
    assert_eq!(bench.after(LINGER_MAX), [Action::Close(CloseReason::HalfCloseTimeout)]);
}
