//! What sessions do, event by event.

use super::deadline::LEFT_AFTER;
use super::*;
use crate::io::Close;
use crate::limits::FLUSH_STALL_MAX;
use crate::proxy::line::Line;
use std::time::Duration;

const LIMIT: u32 = 100;
const SECOND: Duration = Duration::from_secs(1);

fn open() -> (Session, Instant) {
    let now = Instant::now();
    let mut session = Session::new(ConnId::from_parts(0, 0), now);
    session.on_trying(EndpointId::at(3), None, now);
    session.on_connected(ConnId::from_parts(1, 0), 0, now);
    (session, now)
}

#[test]
fn each_end_is_passed_on_and_the_second_one_finishes_the_session() {
    for first in [Side::Client, Side::Backend] {
        let (mut session, now) = open();
        assert_eq!(session.on_ended(first, now), Action::Shutdown(first.other()));
        let second = first.other();
        assert_eq!(session.on_received(second, 5, LIMIT, now), Action::None);
        assert_eq!(session.on_ended(second, now), Action::Shutdown(first));
        assert_eq!(
            session.on_sent(first, 5, LIMIT, now),
            Action::Close(CloseReason::Finished),
            "only once the last byte has gone out"
        );
    }
}

#[test]
fn a_reset_waits_for_the_bytes_that_came_before_it() {
    let (mut session, now) = open();
    session.on_received(Side::Backend, 10, LIMIT, now);
    assert_eq!(session.on_receive_failed(Side::Backend, now), Action::None);
    assert_eq!(session.on_received(Side::Client, 7, LIMIT, now), Action::Discard);
    assert_eq!(
        session.on_sent(Side::Client, 10, LIMIT, now),
        Action::Close(CloseReason::BackendReset)
    );
}

#[test]
fn a_side_that_takes_nothing_is_still_read_to_its_end() {
    let (mut session, now) = open();
    session.on_received(Side::Client, 10, LIMIT, now);
    assert_eq!(session.on_send_failed(Side::Backend, now), Action::None);
    assert_eq!(session.on_received(Side::Backend, 3, LIMIT, now), Action::None);
    // The kernel reports an ordinary end once the error was taken by the send.
    assert_eq!(session.on_ended(Side::Backend, now), Action::None);
    assert_eq!(
        session.on_sent(Side::Client, 3, LIMIT, now),
        Action::Close(CloseReason::BackendReset)
    );
}

#[test]
fn both_sides_breaking_closes_for_the_first_reason() {
    let (mut session, now) = open();
    session.on_send_failed(Side::Client, now);
    assert_eq!(session.on_send_failed(Side::Backend, now), Action::Close(CloseReason::ClientReset));
}

#[test]
fn activity_moves_the_deadline_and_a_half_close_changes_it() {
    let (mut session, start) = open();
    let second = Duration::from_secs(1);
    let timeouts = Timeouts { idle: Some(10 * second), half_close: Some(3 * second) };
    session.on_received(Side::Client, 1, LIMIT, start + 4 * second);
    assert_eq!(session.on_deadline(&timeouts, 0, start + 10 * second), Action::None);
    assert_eq!(
        session.on_deadline(&timeouts, 0, start + 14 * second),
        Action::Close(CloseReason::IdleTimeout)
    );
    session.on_ended(Side::Client, start + 5 * second);
    assert_eq!(session.deadline(&timeouts), Some(start + 8 * second));
    assert_eq!(
        session.on_deadline(&timeouts, 0, start + 8 * second),
        Action::Close(CloseReason::HalfCloseTimeout)
    );
}

#[test]
fn without_a_limit_of_its_own_a_half_closed_session_keeps_the_idle_limit() {
    let (mut session, start) = open();
    let second = Duration::from_secs(1);
    let timeouts = Timeouts { idle: Some(10 * second), half_close: None };
    session.on_ended(Side::Client, start);
    assert_eq!(
        session.on_deadline(&timeouts, 0, start + 10 * second),
        Action::Close(CloseReason::IdleTimeout)
    );
}

const UNLIMITED: Timeouts = Timeouts { idle: None, half_close: None };
#[test]
fn a_paused_side_that_broke_is_read_on_as_the_other_takes_bytes() {
    let (mut session, now) = open();
    assert_eq!(session.on_received(Side::Backend, LIMIT, LIMIT, now), Action::Pause(Side::Backend));
    assert_eq!(session.on_send_failed(Side::Backend, now), Action::None);
    assert_eq!(session.on_sent(Side::Client, LIMIT, LIMIT, now), Action::Resume(Side::Backend));
    assert_eq!(session.on_received(Side::Backend, 9, LIMIT, now), Action::None);
    assert_eq!(session.on_receive_failed(Side::Backend, now), Action::None);
    let closed = Action::Close(CloseReason::BackendReset);
    assert_eq!(session.on_sent(Side::Client, 9, LIMIT, now), closed);
    let ending = |side| session.ending(side, CloseReason::BackendReset);
    assert_eq!(ending(Side::Backend), Ending::Now(Close::Reset));
    assert_eq!(ending(Side::Client), Ending::ResetBehind);
}

#[test]
fn a_session_with_a_broken_side_ends_when_the_other_takes_nothing_whatever_the_limits() {
    for timeouts in [UNLIMITED, Timeouts { idle: None, half_close: Some(60 * SECOND) }] {
        let (mut session, start) = open();
        session.on_received(Side::Backend, LIMIT, LIMIT, start);
        session.on_send_failed(Side::Backend, start);
        let (closed, now) = loop {
            let now = session.deadline(&timeouts).expect("it is looked at");
            match session.on_deadline(&timeouts, 1000, now) {
                Action::None => {}
                action => break (action, now),
            }
        };
        assert_eq!(closed, Action::Close(CloseReason::BackendReset));
        assert_eq!(now - start, FLUSH_STALL_MAX);
        let ending = session.ending(Side::Client, CloseReason::BackendReset);
        assert_eq!(ending, Ending::Now(Close::Reset), "it takes nothing");
    }
}

#[test]
fn what_the_kernel_delivers_is_progress_of_a_session_with_a_broken_side() {
    let (mut session, start) = open();
    session.on_received(Side::Backend, LIMIT, LIMIT, start);
    session.on_send_failed(Side::Backend, start);
    // One byte in 20 s is taken, of which no send tells.
    for step in 0..600_u32 {
        let (now, left) = (start + step * SECOND, 1000 - u64::from(step / 20));
        assert_eq!(session.on_deadline(&UNLIMITED, left, now), Action::None, "{step}");
    }
}

#[test]
fn what_comes_for_a_broken_side_is_dropped_and_is_no_progress() {
    let (mut session, start) = open();
    session.on_received(Side::Backend, LIMIT, LIMIT, start);
    assert_eq!(session.on_received(Side::Client, LIMIT, LIMIT, start), Action::Pause(Side::Client));
    assert_eq!(session.on_send_failed(Side::Backend, start), Action::Resume(Side::Client));
    for second in 0..30 {
        let now = start + second * SECOND;
        assert_eq!(session.on_received(Side::Client, 1, LIMIT, now), Action::Discard);
        assert_eq!(session.on_deadline(&UNLIMITED, 5, now), Action::None);
    }
    let closed = Action::Close(CloseReason::BackendReset);
    assert_eq!(session.on_deadline(&UNLIMITED, 5, start + 30 * SECOND), closed);
}

#[test]
fn a_shorter_limit_holds_for_a_broken_side_as_well() {
    let timeouts = Timeouts { idle: Some(3 * SECOND), half_close: Some(SECOND) };
    let (mut session, start) = open();
    session.on_received(Side::Client, LIMIT, LIMIT, start);
    session.on_send_failed(Side::Client, start);
    let closed = Action::Close(CloseReason::ClientReset);
    assert_eq!(session.on_deadline(&timeouts, 0, start + SECOND), closed);
}

#[test]
fn what_is_cut_looks_cut() {
    let cuts = [
        CloseReason::IdleTimeout,
        CloseReason::HalfCloseTimeout,
        CloseReason::EndpointRemoved,
        CloseReason::DrainDeadline,
        CloseReason::Overload,
    ];
    for reason in cuts {
        for bytes in [0, 5] {
            let (mut session, now) = open();
            session.on_received(Side::Backend, bytes, LIMIT, now);
            for side in [Side::Client, Side::Backend] {
                assert_eq!(session.ending(side, reason), Ending::Now(Close::Reset));
            }
        }
    }
}

#[test]
fn who_has_a_whole_stream_before_him_gets_it_before_the_cut() {
    let (mut session, now) = open();
    session.on_received(Side::Backend, 5, LIMIT, now);
    session.on_ended(Side::Backend, now);
    let ending = |session: &Session, side| session.ending(side, CloseReason::HalfCloseTimeout);
    assert_eq!(ending(&session, Side::Client), Ending::Now(Close::Reset), "it takes nothing");
    session.on_sent(Side::Client, 5, LIMIT, now);
    assert_eq!(ending(&session, Side::Client), Ending::ResetBehind);
    assert_eq!(ending(&session, Side::Backend), Ending::Now(Close::Reset));
    let at_deadline = session.ending(Side::Client, CloseReason::DrainDeadline);
    assert_eq!(at_deadline, Ending::ResetOrEnd, "there is no time to wait");
}

#[test]
fn both_ends_in_order_are_an_orderly_end() {
    let (mut session, now) = open();
    session.on_ended(Side::Backend, now);
    let closed = Action::Close(CloseReason::Finished);
    assert_eq!(session.on_ended(Side::Client, now), closed);
    for side in [Side::Client, Side::Backend] {
        assert_eq!(session.ending(side, CloseReason::Finished), Ending::Now(Close::Graceful));
    }
}

#[test]
fn a_client_without_a_backend_leaves_by_a_reset_or_by_an_end_before_the_first_byte() {
    let now = Instant::now();
    let connecting = || {
        let mut session = Session::new(ConnId::from_parts(0, 0), now);
        session.on_trying(EndpointId::at(3), None, now);
        session.on_connecting(ConnId::from_parts(1, 0), now);
        session
    };
    let left = Action::Close(CloseReason::ClientLeft);
    let mut waiting = Session::new(ConnId::from_parts(0, 0), now);
    waiting.on_waiting(Line::default().ticket(now, now), CloseReason::NoEndpoint);
    assert_eq!(waiting.on_ended(Side::Client, now), left, "no endpoint is there");
    let none = Timeouts { idle: None, half_close: None };
    let mut slow = connecting();
    assert_eq!(slow.on_ended(Side::Client, now), Action::None, "the connect may succeed");
    assert_eq!(slow.on_deadline(&none, 0, now + LEFT_AFTER / 2), Action::None);
    assert_eq!(slow.on_deadline(&none, 0, now + LEFT_AFTER), left);
    let reset = Action::Close(CloseReason::ClientReset);
    assert_eq!(connecting().on_receive_failed(Side::Client, now), reset);
    assert_eq!(connecting().on_send_failed(Side::Client, now), reset);
    assert_eq!(connecting().on_early(now), Action::Pause(Side::Client));
    for side in [Side::Client, Side::Backend] {
        let ending = connecting().ending(side, CloseReason::ClientLeft);
        assert_eq!(ending, Ending::Now(Close::Reset));
    }
}

#[test]
fn a_session_waits_for_as_long_as_it_may_since_it_looks_for_a_backend() {
    let start = Instant::now();
    let mut session = Session::new(ConnId::from_parts(0, 0), start);
    let ticket = Line::default().ticket(start, start);
    session.on_waiting(ticket, CloseReason::NoEndpoint);
    assert_eq!(session.waits_until(SECOND), start + SECOND);
    session.on_waited();
    assert_eq!(session.why_waits(), None, "it is being connected");
    session.on_trying(EndpointId::at(3), None, start);
    session.on_connect_failed();
    session.on_waiting(ticket, CloseReason::ConnectFailed);
    assert_eq!(session.tried().attempts(), 0, "all may be tried again");
    let made = Attempts { count: 1, endpoint: EndpointId::at(3), at: start };
    assert_eq!(session.attempts(), Some(made), "and are told of all the same");
    let failed = Some(CloseReason::ConnectFailed);
    assert_eq!(session.why_waits(), failed, "of its last failure");
    assert_eq!(session.waits_until(SECOND), start + SECOND);
    session.on_waited();
    session.on_connected(ConnId::from_parts(1, 0), 0, start);
    // A day later it is moved, before a byte.
    let later = start + 24 * 3600 * SECOND;
    session.on_moved(later);
    session.on_waiting(Line::default().ticket(later, later), CloseReason::BackendReset);
    assert_eq!(session.waits_until(SECOND), later + SECOND);
}

#[test]
fn a_client_that_ends_behind_bytes_is_served() {
    let mut buffers = crate::io::buffers::Buffers::new(1).unwrap();
    let now = Instant::now();
    let mut session = Session::new(ConnId::from_parts(0, 0), now);
    session.on_trying(EndpointId::at(3), None, now);
    let mut buf = buffers.take().unwrap();
    buffers.set_len(&mut buf, 4);
    buffers.push(&mut session.early, buf);
    session.on_early(now);
    assert_eq!(session.on_ended(Side::Client, now), Action::None);
    session.on_connected(ConnId::from_parts(1, 0), 0, now);
    assert!(session.has_ended(Side::Client) && !session.has_ended(Side::Backend));
    assert_eq!(session.on_received(Side::Client, 4, LIMIT, now), Action::None);
    assert_eq!(session.on_sent(Side::Backend, 4, LIMIT, now), Action::None);
    assert_eq!(session.on_ended(Side::Backend, now), Action::Close(CloseReason::Finished));
}

#[test]
fn what_a_client_sent_early_is_timed_from_when_its_backend_gets_it() {
    let now = Instant::now();
    let mut session = Session::new(ConnId::from_parts(0, 0), now);
    session.on_early(now);
    let (connected, answered) = (now + Duration::from_secs(4), now + Duration::from_secs(5));
    session.on_trying(EndpointId::at(0), None, now);
    session.on_connected(ConnId::from_parts(1, 0), 0, connected);
    assert_eq!(session.placed_within(), Some(Duration::from_secs(4)));
    assert_eq!(session.take_first_byte(answered), Some(Duration::from_secs(1)));
}

#[test]
fn the_first_byte_back_is_timed_once() {
    let (mut session, now) = open();
    assert_eq!(session.take_first_byte(now), None);
    session.on_received(Side::Client, 1, LIMIT, now);
    let later = now + Duration::from_millis(2);
    assert_eq!(session.take_first_byte(later), Some(Duration::from_millis(2)));
    assert_eq!(session.take_first_byte(later), None);
}

#[test]
fn an_answer_is_due_from_the_first_byte_on_unless_the_client_still_sends() {
    let (mut session, now) = open();
    let second = Duration::from_secs(1);
    assert_eq!(session.asked_since(), None, "it has nothing to answer");
    session.on_received(Side::Client, 1, LIMIT, now);
    assert_eq!(session.asked_since(), Some(now));
    session.on_received(Side::Client, 1, LIMIT, now + 5 * second);
    assert!(session.may_still_ask(now + 5 * second, second));
    assert!(!session.may_still_ask(now + 6 * second, second));
    // Who ends after that has lost patience, or has asked all.
    session.on_ended(Side::Client, now + 7 * second);
    assert!(!session.may_still_ask(now + 7 * second, second));
    assert_eq!(session.asked_since(), Some(now));
    session.take_first_byte(now + 8 * second);
    assert_eq!(session.asked_since(), None);
    let (mut ended, now) = open();
    ended.on_received(Side::Client, 1, LIMIT, now);
    ended.on_ended(Side::Backend, now);
    assert_eq!(ended.asked_since(), None, "there will be none");
}
