//! One name, looked up again and again, and how soon each time.

use std::net::IpAddr;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use super::resolver::{Answer, Family, Resolve};
use crate::config::HostPort;
use crate::limits::{DNS_ANSWERS_TO_LEAVE, DNS_CONFIRM, DNS_LOOKUP_MAX, DNS_TTL_MAX};

/// The wait after a first failed lookup; it doubles up to the refresh interval.
const RETRY_MIN: Duration = Duration::from_millis(500);

/// What a lookup of backend `index` found for one family.
#[derive(Debug)]
pub(super) struct News {
    pub(super) index: usize,
    pub(super) family: Family,
    pub(super) answer: Answer,
}

/// Looks `host` up again and again, sooner after failures, until nobody listens.
pub(super) async fn follow<R: Resolve>(
    index: usize,
    host: HostPort,
    refresh: Duration,
    resolver: R,
    news: mpsc::UnboundedSender<News>,
) {
    let name = format!("{}:{}", host.host, host.port);
    let mut origin = None;
    let mut failures = 0u32;
    let mut pace = Pace::default();
    while !news.is_closed() {
        let mut answers = [None, None];
        let mut tell = |family: Family, answer: Answer| {
            answers[family as usize] = Some(answer.clone());
            // Nobody listens any more only where this is about to end too.
            let _ = news.send(News { index, family, answer });
        };
        let _ = timeout(DNS_LOOKUP_MAX, resolver.resolve(&host.host, &mut origin, &mut tell)).await;
        for family in Family::ALL {
            if answers[family as usize].is_none() {
                let answer = Answer::Failed(format!("no answer for {family} in time"));
                let _ = news.send(News { index, family, answer: answer.clone() });
                answers[family as usize] = Some(answer);
            }
        }
        let answers = answers.map(|answer| answer.unwrap_or(Answer::Absent));
        let wait = pace.on_answers(&answers, refresh);
        if let Some(error) = trouble(&answers) {
            if failures == 0 {
                warn!(backend = name, error, "name does not resolve: keeping what is known");
            }
            let retry = RETRY_MIN.saturating_mul(1 << failures.min(16));
            failures = failures.saturating_add(1);
            // Answers that take addresses away are not to come all at once.
            sleep(if pace.soon > 0 { wait } else { wait.min(retry) }).await;
        } else {
            if failures > 0 {
                info!(backend = name, failures, "name resolves again");
            }
            failures = 0;
            // A fleet that was started at once does not ask at once for ever.
            sleep(wait.mul_f64(1.0 + fastrand::f64() / 10.0)).await;
        }
    }
}

/// What is wrong with a name, if anything is: a family failed, or there is no address at all.
fn trouble(answers: &[Answer]) -> Option<&str> {
    let failed = answers.iter().find_map(|answer| match answer {
        Answer::Failed(why) => Some(why.as_str()),
        Answer::Found { .. } | Answer::Absent => None,
    });
    let absent = answers.iter().all(|answer| *answer == Answer::Absent);
    failed.or(absent.then_some("it does not exist"))
}

/// How soon a name is looked up again.
#[derive(Debug, Default)]
struct Pace {
    /// The addresses of each family as they were last reported.
    last: [Vec<IpAddr>; Family::ALL.len()],
    /// So many more answers are to come soon.
    soon: u32,
}

impl Pace {
    /// Addresses that hold for some time are asked for again after that, within bounds. One that is
    /// missing has left, or only this answer has not named it: the next few tell, and come soon.
    /// Where each answer has other addresses, that is not the case all the time.
    fn on_answers(&mut self, answers: &[Answer; Family::ALL.len()], refresh: Duration) -> Duration {
        let (mut is_missing, mut wait) = (false, None);
        for (last, answer) in self.last.iter_mut().zip(answers) {
            let now = match answer {
                Answer::Found { addresses, ttl } => {
                    wait = wait.into_iter().chain(*ttl).min();
                    addresses.clone()
                }
                Answer::Absent => Vec::new(),
                Answer::Failed(_) => continue,
            };
            is_missing |= last.iter().any(|known| !now.contains(known));
            *last = now;
        }
        self.soon = match self.soon {
            0 if is_missing => DNS_ANSWERS_TO_LEAVE,
            soon => soon.saturating_sub(1),
        };
        match wait {
            _ if self.soon > 0 => refresh.min(DNS_CONFIRM),
            Some(ttl) => ttl.clamp(refresh, refresh.max(DNS_TTL_MAX)),
            None => refresh,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::found;
    use super::*;

    #[test]
    fn after_an_answer_that_lacks_an_address_the_next_ones_come_soon() {
        const HOUR: Duration = Duration::from_secs(3600);
        let [both, one, other] = [&["10.0.0.1", "10.0.0.2"][..], &["10.0.0.1"], &["10.0.0.3"]]
            .map(|ips| found(ips, None));
        let mut pace = Pace::default();
        let mut waits = |answers: &[&Answer], refresh| {
            let answers = answers.iter().map(|&four| [four.clone(), Answer::Absent]);
            answers.map(|answers| pace.on_answers(&answers, refresh)).collect::<Vec<_>>()
        };
        assert_eq!(waits(&[&one, &both, &both], HOUR), [HOUR; 3]);
        let soon = DNS_CONFIRM;
        assert_eq!(waits(&[&one, &one, &one, &one, &one], HOUR), [soon, soon, soon, HOUR, HOUR]);
        assert_eq!(waits(&[&other, &both], HOUR / 3600), [HOUR / 3600; 2], "sooner if so set");
        assert_eq!(waits(&[&both, &both], HOUR), [soon, HOUR]);
        let turns = waits(&[&one, &other, &one, &other, &one, &other, &one, &other], HOUR);
        assert_eq!(turns.iter().filter(|&&wait| wait == HOUR).count(), 2, "{turns:?}");
        let mut pace = Pace::default();
        let failed = Answer::Failed(String::new());
        for answer in [&other, &failed, &other] {
            let wait = pace.on_answers(&[answer.clone(), Answer::Absent], HOUR);
            assert_eq!(wait, HOUR, "it takes nothing away");
        }
    }

    #[test]
    fn addresses_hold_as_long_as_name_servers_say_within_bounds() {
        let second = Duration::from_secs;
        let wait = |refresh, four: Option<u64>, six: Option<u64>| {
            let answers = [found(&["10.0.0.1"], four), found(&["fd00::1"], six)];
            Pace::default().on_answers(&answers, second(refresh))
        };
        assert_eq!(wait(5, Some(10), Some(20)), second(10));
        assert_eq!(wait(5, Some(20), None), second(20));
        assert_eq!(wait(5, Some(0), Some(20)), second(5));
        assert_eq!(wait(5, Some(1 << 31), Some(1 << 31)), DNS_TTL_MAX);
        assert_eq!(wait(5, None, None), second(5));
        assert_eq!(wait(600, Some(0), Some(1 << 31)), second(600));
    }
}
