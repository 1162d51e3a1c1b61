use super::login_limit::ALONE_FOR;
use super::pacing::ROUND;
use super::*;
use crate::config::PoolMode;
use crate::proxy::backoff::BACKOFF_MIN;

const SECOND: Duration = Duration::from_secs(1);
const MS: Duration = Duration::from_millis(1);
const ALL: usize = usize::MAX;

fn config() -> PoolConfig {
    PoolConfig {
        endpoint_max: None,
        mode: PoolMode::Preconnect,
        size: 4,
        min_idle: 2,
        max_idle: 8,
        idle_timeout: Some(10 * SECOND),
        max_lifetime: Some(100 * SECOND),
    }
}

fn conn(number: u32) -> ConnId {
    ConnId::from_parts(number, 0)
}

/// A pool that has been warm for long, in which nothing is paced any more.
fn warmed(now: Instant, count: u32) -> Pool {
    let mut rng = fastrand::Rng::with_seed(1);
    let mut pool = Pool::new(&config(), now);
    for number in 0..count {
        pool.on_connecting();
        assert!(pool.on_connected(conn(number), true, false, now, &mut rng));
    }
    pool.pacing.round = None;
    pool
}

/// Makes what is missing, a look every 10 ms, for so long. Returns how many each look made.
fn fill(pool: &mut Pool, next: &mut u32, start: Instant, time: Duration) -> Vec<usize> {
    let mut rng = fastrand::Rng::with_seed(1);
    let mut made = Vec::new();
    let mut now = start;
    while now < start + time {
        assert_eq!(pool.expire(now), None);
        let short = pool.shortage(ALL, now);
        for _ in 0..short {
            pool.on_connecting();
            assert!(pool.on_connected(conn(*next), true, false, now, &mut rng));
            *next += 1;
        }
        made.push(short);
        now += 10 * MS;
    }
    made.retain(|&made| made > 0);
    made
}

#[test]
fn it_warms_up_to_its_minimum_one_connect_first() {
    let now = Instant::now();
    let mut pool = Pool::new(&PoolConfig { min_idle: 40, max_idle: 40, ..config() }, now);
    assert_eq!(fill(&mut pool, &mut 0, now, SECOND), [1, 2, 4, 8, 16, 9]);
}

#[test]
fn it_grows_by_the_sessions_that_were_served_without_it_and_by_nothing_else() {
    let now = Instant::now();
    let mut pool = Pool::new(&config(), now);
    pool.on_miss_served();
    assert_eq!(pool.target(), 2, "it had no time to be filled");
    fill(&mut pool, &mut 0, now, SECOND);
    for _ in 0..100 {
        pool.enter(now + SECOND);
    }
    assert_eq!(pool.target(), 2, "attempts are no demand");
    for expected in [3, 4, 5, 6, 7, 8, 8] {
        pool.on_miss_served();
        assert_eq!(pool.target(), expected);
    }
}

#[test]
fn what_was_lost_in_an_outage_is_no_demand_and_comes_back_in_rounds() {
    let mut rng = fastrand::Rng::with_seed(1);
    let mut now = Instant::now();
    let mut pool = Pool::new(&PoolConfig { min_idle: 2, max_idle: 64, ..config() }, now);
    fill(&mut pool, &mut 0, now, SECOND);
    now += SECOND;
    while pool.evict().is_some() {}
    for _ in 0..300 {
        assert_eq!(pool.enter(now), None);
        if pool.shortage(ALL, now) > 0 {
            pool.on_connecting();
            pool.on_connect_failed(now, &mut rng);
        }
        now += 10 * MS;
    }
    pool.on_miss_served();
    assert_eq!(pool.target(), 2, "it is empty because of the outage");
    now += 2 * SECOND;
    assert_eq!(fill(&mut pool, &mut 10, now, SECOND), [1, 1]);
    pool.on_miss_served();
    assert_eq!(pool.target(), 3);
}

/// What a server does that ends each login after `limit`, over so many seconds without any
/// session. Returns how many it ended.
fn end_logins(pool: &mut Pool, start: Instant, limit: Duration, seconds: u32) -> u32 {
    let mut rng = fastrand::Rng::with_seed(1);
    let mut open: Vec<(ConnId, Instant)> = Vec::new();
    let (mut next, mut ended) = (1000, 0);
    for step in 0..seconds * 100 {
        let now = start + step * 10 * MS;
        open.retain(|&(conn, made)| {
            let over = now.saturating_duration_since(made) >= limit;
            if over {
                assert!(!pool.on_died(conn, now, &mut rng), "the endpoint is well");
                ended += 1;
            }
            !over
        });
        if step % 10 == 0 {
            pool.expire(now);
        }
        for _ in 0..pool.shortage(ALL, now) {
            pool.on_connecting();
            assert!(pool.on_connected(conn(next), true, false, now, &mut rng));
            open.push((conn(next), now));
            next += 1;
        }
    }
    ended
}

#[test]
fn a_server_that_ends_what_is_not_used_is_left_alone_until_there_is_demand() {
    for limit in [SECOND, 2 * SECOND, 10 * SECOND, 60 * SECOND] {
        let now = Instant::now();
        let few = PoolConfig { min_idle: 4, idle_timeout: None, max_lifetime: None, ..config() };
        let mut pool = Pool::new(&few, now);
        let ended = end_logins(&mut pool, now, limit, 600);
        assert!(ended <= 6, "{ended} of {limit:?}");
        assert_eq!((pool.target(), pool.idle()), (0, 0));
        for sessions in 1.. {
            pool.on_session_served();
            if pool.target() == 1 {
                assert!((8..100).contains(&sessions), "after {sessions}");
                break;
            }
        }
    }
}

#[test]
fn a_server_that_greets_gets_one_connection_first_and_none_once_it_has_ended_that() {
    for (limit, ended) in [(SECOND, 1), (10 * SECOND, 1), (20 * SECOND, 4)] {
        let now = Instant::now();
        let mut pool = Pool::new(&PoolConfig { min_idle: 4, ..config() }, now);
        pool.on_greeting();
        assert_eq!(end_logins(&mut pool, now, limit, 100), ended, "{limit:?}");
        assert_eq!(pool.target(), 0);
    }
}

#[test]
fn sessions_make_a_server_that_greets_no_less_unknown() {
    let mut rng = fastrand::Rng::with_seed(1);
    let start = Instant::now();
    let mut pool = Pool::new(&PoolConfig { max_idle: 64, ..config() }, start);
    let (mut now, mut next) = (start, 0);
    // A burst of sessions wears each connection out before it gets old.
    while now < start + 2 * ALONE_FOR {
        for _ in 0..pool.shortage(ALL, now) {
            pool.on_connecting();
            assert!(pool.on_connected(conn(next), true, false, now, &mut rng));
            pool.on_greeting();
            next += 1;
        }
        assert!(pool.idle() <= 1, "after {:?}", now - start);
        for _ in 0..2 {
            if pool.enter(now).is_none() {
                pool.on_miss_served();
            }
            pool.on_session_served();
        }
        assert_eq!(pool.expire(now), None);
        now += 100 * MS;
    }
    assert!(pool.target() > 20, "there is demand");
    assert_eq!(end_logins(&mut pool, now, 10 * SECOND, 100), 1);
    for _ in 0..10_000 {
        pool.on_session_served();
    }
    assert_eq!(pool.target(), 1, "it would end each of more than that");
}

#[test]
fn a_server_that_greets_and_waits_gets_all() {
    let now = Instant::now();
    let mut pool = Pool::new(&PoolConfig { min_idle: 4, ..config() }, now);
    pool.on_greeting();
    let config = pool.config.clone();
    pool.config = PoolConfig { idle_timeout: None, ..config };
    assert_eq!(fill(&mut pool, &mut 0, now, ALONE_FOR), [1]);
    fill(&mut pool, &mut 1, now + ALONE_FOR, SECOND);
    assert_eq!(pool.idle(), 4);
}

#[test]
fn a_server_that_is_restarted_over_and_over_is_kept_warm() {
    let mut rng = fastrand::Rng::with_seed(1);
    let mut now = Instant::now();
    let mut pool = Pool::new(&config(), now);
    let mut next = 0;
    for _ in 0..10 {
        fill(&mut pool, &mut next, now, 2 * SECOND);
        now += 2 * SECOND;
        assert_eq!(pool.idle(), 2);
        for age in [2, 1] {
            pool.on_died(conn(next - age), now, &mut rng);
        }
        now += 100 * MS;
    }
    assert_eq!(pool.target(), 2);
}

#[test]
fn the_oldest_is_taken_first_and_replaced() {
    let now = Instant::now();
    let mut pool = warmed(now, 2);
    assert_eq!(pool.enter(now), Some((conn(0), now)));
    assert_eq!(pool.shortage(ALL, now), 1);
    pool.remove(conn(1));
    assert_eq!(pool.shortage(ALL, now), 2);
}

#[test]
fn idle_connections_above_the_minimum_are_closed_and_not_replaced() {
    let now = Instant::now();
    let mut pool = warmed(now, 4);
    assert_eq!(pool.expire(now + 9 * SECOND), None);
    let later = now + 10 * SECOND;
    assert_eq!(pool.expire(later), Some((conn(0), Discard::Idle)));
    assert_eq!(pool.expire(later), Some((conn(1), Discard::Idle)));
    assert_eq!(pool.expire(later), None, "the minimum stays");
    assert_eq!(pool.shortage(ALL, later), 0);
}

#[test]
fn old_connections_are_replaced_but_not_all_at_once() {
    let now = Instant::now();
    let mut pool = warmed(now, 2);
    assert_eq!(pool.expire(now + 89 * SECOND), None);
    let first = (90..=110).find(|&s| pool.expire(now + s * SECOND).is_some());
    assert!(first.is_some_and(|s| s < 110), "the first goes at {first:?}");
    assert_eq!(pool.idle(), 1, "their ages are spread");
    assert_eq!(pool.shortage(ALL, now + 100 * SECOND), 1);
}

#[test]
fn failures_back_off_and_one_connect_tries_the_way() {
    let mut rng = fastrand::Rng::with_seed(1);
    let now = Instant::now();
    let mut pool = warmed(now, 0);
    pool.on_connecting();
    pool.on_connect_failed(now, &mut rng);
    assert_eq!(pool.shortage(ALL, now), 0);
    let later = now + 2 * BACKOFF_MIN;
    assert_eq!(pool.shortage(ALL, later), 1);
    pool.on_connecting();
    assert!(pool.on_connected(conn(7), true, false, later, &mut rng));
    assert_eq!(pool.shortage(ALL, later), 0, "one at a time");
    assert_eq!(pool.shortage(ALL, later + 2 * ROUND), 1);
}

#[test]
fn lent_connections_come_back_and_the_latest_is_lent_first() {
    let now = Instant::now();
    let mut pool = Pool::new(&PoolConfig { mode: PoolMode::Request, ..config() }, now);
    let mut rng = fastrand::Rng::with_seed(1);
    assert_eq!(pool.shortage(ALL, now), 1, "the minimum, one first");
    pool.want(9);
    assert_eq!(pool.shortage(ALL, now), 4, "what waits, up to the size");
    pool.stop_wanting();
    for number in 0..3 {
        pool.on_connecting();
        assert!(pool.on_connected(conn(number), true, false, now, &mut rng));
    }
    let last = pool.acquire().unwrap();
    assert_eq!((last.conn, pool.in_use(), pool.room()), (conn(2), 1, 1));
    let first = pool.acquire().unwrap();
    assert_eq!(first.conn, conn(1));
    assert_eq!(pool.shortage(ALL, now), 0, "the minimum counts those in use");
    assert!(pool.release(last, now));
    assert_eq!(pool.acquire(), Some(last));
    pool.leave();
    assert!(!pool.release(last, now + 200 * SECOND), "too old");
    assert_eq!((pool.in_use(), pool.idle(), pool.room()), (0, 1, 3));
}

#[test]
fn connections_that_requests_share_are_kept_up_to_the_size_and_no_further() {
    let now = Instant::now();
    let mut rng = fastrand::Rng::with_seed(1);
    let few = PoolConfig { mode: PoolMode::Request, min_idle: 0, max_idle: 1, ..config() };
    let mut pool = Pool::new(&few, now);
    for number in 0..4 {
        pool.on_connecting();
        assert!(pool.on_connected(conn(number), true, false, now, &mut rng), "four requests wait");
    }
    let in_use: Vec<_> = std::iter::from_fn(|| pool.acquire()).collect();
    pool.on_connecting();
    assert!(!pool.on_connected(conn(4), true, false, now, &mut rng), "a probe is one too many");
    for taken in in_use {
        assert!(pool.release(taken, now), "others may wait");
    }
    assert_eq!((pool.idle(), pool.room()), (4, 0));
}

#[test]
fn a_backend_that_closes_after_it_has_served_is_connected_to_again() {
    let now = Instant::now();
    let mut pool = Pool::new(&PoolConfig { mode: PoolMode::Request, ..config() }, now);
    let mut rng = fastrand::Rng::with_seed(1);
    pool.on_connecting();
    assert!(pool.on_connected(conn(0), true, false, now, &mut rng));
    let taken = pool.acquire().unwrap();
    assert!(pool.release(Taken { served: true, ..taken }, now));
    assert!(!pool.on_died(taken.conn, now, &mut rng));
    pool.want(1);
    assert!(pool.shortage(ALL, now) > 0, "it is well");
}

#[test]
fn a_backend_that_accepts_only_to_close_is_not_stormed() {
    let mut rng = fastrand::Rng::with_seed(1);
    let start = Instant::now();
    let mut pool = Pool::new(&config(), start);
    let mut connects = 0;
    for millisecond in 0..10_000 {
        let now = start + Duration::from_millis(millisecond);
        for _ in 0..pool.shortage(ALL, now) {
            connects += 1;
            pool.on_connecting();
            assert!(pool.on_connected(conn(connects), true, false, now, &mut rng));
            assert!(pool.on_died(conn(connects), now, &mut rng), "it is no good");
        }
        pool.expire(now);
    }
    assert!((10..30).contains(&connects), "{connects} connects in ten seconds");
}
