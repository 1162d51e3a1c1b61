//! Requests that are sent again.

use super::*;

#[test]
fn without_a_retry_left_a_lost_request_gets_the_error_of_the_last_attempt() {
    for (why, is_free) in [
        (Retry::Ended, false),
        (Retry::Broken, false),
        (Retry::Silent, true),
        (Retry::Forgotten, true),
        (Retry::Removed, true),
    ] {
        let mut bench = Bench::asked(Protocol::Chronos, "GET a\n");
        while bench.retries.take(bench.now) {}
        let actions = bench.lose(why);
        assert_eq!(actions.contains(&Action::CountRetry(why)), is_free, "{actions:?}");
        assert_eq!(actions.contains(&Action::CountRefusedRetry), !is_free, "{actions:?}");
        let replied = |action: &Action| matches!(action, Action::Reply(ErrorReply::Lost, _));
        assert_eq!(actions.iter().any(replied), !is_free, "{actions:?}");
    }
}

#[test]
fn each_request_earns_a_part_of_a_retry() {
    let mut bench = Bench::new(Protocol::Chronos);
    while bench.retries.take(bench.now) {}
    for number in 1..=5 {
        assert!(!bench.retries.take(bench.now), "after {} of five", number - 1);
        bench.feed("GET a\n");
        assert_eq!(bench.next(), [Action::Acquire]);
        bench.acquire();
        bench.backend_sent(6);
        bench.reply("a\n");
        bench.client.release();
    }
    assert!(bench.retries.take(bench.now));
}

#[test]
fn a_request_that_is_sent_again_waits_anew() {
    let mut bench = Bench::asked(Protocol::Chronos, "GET a\n");
    bench.now += 5 * SECOND;
    let start = bench.now;
    assert!(bench.lose(Retry::Ended).contains(&Action::CountRetry(Retry::Ended)));
    assert_eq!(bench.after(Duration::ZERO), [], "it has just begun to wait");
    bench.now = start + SECOND / 2;
    let asks = Action::Asks(EndpointId::at(0), conn(), SECOND / 2);
    assert_eq!(bench.acquire()[..2], [asks, Action::Send(conn())], "the wait for a connection");
    bench.now = start + SECOND;
    bench.backend_sent(6);
    let count = Action::Count(GET, Outcome::Answered, 6 * SECOND);
    assert_eq!(
        bench.reply("a\n"),
        (2, vec![Action::ReleaseSoon, count, Action::Serve]),
        "all of it"
    );
}

#[test]
fn a_request_is_sent_so_many_times_at_most() {
    let mut bench = Bench::asked(Protocol::Chronos, "GET a\n");
    for _ in 1..bench.policy.attempts_max {
        assert!(bench.lose(Retry::Broken).contains(&Action::CountRetry(Retry::Broken)));
        bench.acquire();
    }
    assert!(matches!(bench.lose(Retry::Broken)[2], Action::Reply(ErrorReply::Lost, _)));
}

#[test]
fn what_is_cut_is_none_of_these_attempts() {
    let mut bench = Bench::asked(Protocol::Chronos, "GET a\n");
    bench.policy.attempts_max = 1;
    for count in 2..20 {
        assert!(bench.lose(Retry::Removed).contains(&Action::CountRetry(Retry::Removed)));
        bench.acquire();
        let course = bench.client.course().expect("it was sent");
        assert_eq!(course.attempts.count, count, "they are told of all the same");
    }
    assert!(matches!(bench.lose(Retry::Broken)[2], Action::Reply(ErrorReply::Lost, _)));
}
