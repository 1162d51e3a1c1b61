//! Temporary.
use aegis::config::*;
use aegis::worker::{self, WorkerSetup, listener, mailbox::Mailbox};
use aegis::proxy::endpoints::*;
use std::sync::Arc;
use std::time::*;
fn env(k: &str, d: &str) -> String { std::env::var(k).unwrap_or(d.into()) }
fn main() {
    tracing_subscriber::fmt().with_env_filter("debug").init();
    let s = Duration::from_secs;
    let config = Arc::new(Config { listen: vec![env("AEGIS_LISTEN","127.0.0.1:8081").parse().unwrap()], admin: "127.0.0.1:0".parse().unwrap(), backends: vec![], dns_refresh: s(5), workers: None, pin: Switch::Auto,
        io: match env("AEGIS_IO","auto").as_str() {"uring"=>IoChoice::Uring,"epoll"=>IoChoice::Epoll,_=>IoChoice::Auto}, balance: Balance::LeastConn, pool: PoolConfig{min_idle:4,max_idle:64,idle_timeout:Some(s(60)),max_lifetime:Some(s(900))}, max_sessions: None, connect_timeout: s(1), connect_attempts: 3, idle_timeout: None, half_close_timeout: Some(s(60)), tcp_user_timeout: Some(s(30)), keepalive: Some(s(60)), proxy_protocol: ProxyProtocol::Off, drain_delay: s(0), drain_timeout: s(5), eject_failures: 3, eject_time: s(1), log: "info".into(), log_format: LogFormat::Text });
    let n = env("AEGIS_WORKERS","2").parse().unwrap();
    let verdict = aegis::io::probe::choose(config.io).unwrap();
    println!("{verdict:?}");
    let l = listener::listen(&config.listen, n, &worker::socket_options(&config)).unwrap();
    let started = Instant::now();
    let stats: Arc<[_]> = (0..n).map(|_| Arc::default()).collect::<Vec<_>>().into();
    let (tx, _rx) = tokio::sync::mpsc::channel(1);
    let snap = Arc::new(EndpointSnapshot{generation:1, endpoints: vec![Endpoint::new("b", env("AEGIS_BACKENDS","127.0.0.1:8080").parse().unwrap(), n)]});
    let mut boxes = vec![];
    for (index, listeners) in l.sets.into_iter().enumerate() {
        let mailbox = Arc::new(Mailbox::new().unwrap());
        worker::spawn(WorkerSetup { index, core: None, listeners, driver: verdict.driver, config: config.clone(), sessions_max: 9000, mailbox: mailbox.clone(), stats: Arc::clone(&stats), started, exited: tx.clone() }).unwrap();
        mailbox.deliver(snap.clone());
        boxes.push(mailbox);
    }
    loop { std::thread::sleep(s(100)); }
}
