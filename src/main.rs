//! The life of the process, top to bottom.

use std::fmt::{Display, Write as _};
use std::io::{self, Write as _};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use aegis::cli::{self, Command};
use aegis::config::{Config, Discovery, IoChoice};
use aegis::control::{DriverInfo, Outcome, Plane, Runtime, WorkerHandle, admin, logging};
use aegis::io::probe::{self, DriverKind, Unavailable, Verdict};
use aegis::limits::{self, Capacity, DescriptorUsers, LimitError};
use aegis::listening::Listening;
use aegis::startup::cores::{self, Plan};
use aegis::startup::listeners::{self, ListenError};
use aegis::worker::mailbox::Mailbox;
use aegis::worker::{self, Prepared, WorkerError, WorkerSetup};

/// The command line is wrong, as with any command.
const EXIT_USAGE: u8 = 2;

/// The configuration is wrong (`EX_CONFIG` of BSD's sysexits).
const EXIT_CONFIG: u8 = 78;

fn main() -> ExitCode {
    let command = match cli::parse(std::env::args_os()) {
        Ok(command) => command,
        Err(error) if error.use_stderr() => return fail(EXIT_USAGE, error.to_string().trim_end()),
        Err(asked) => return print(&asked.to_string()),
    };
    let config = match Config::from_env() {
        Ok(config) => Arc::new(config),
        Err(problems) => return fail(EXIT_CONFIG, problems),
    };
    let outcome = match command {
        Command::Run => run(config),
        Command::Check => check(&config),
    };
    outcome.unwrap_or_else(|error| fail(exit_code(&error), error))
}

type Error = Box<dyn std::error::Error>;

/// What is decided before anything is bound.
struct Decisions {
    plan: Plan,
    verdict: Verdict,
    capacity: Capacity,
}

fn decide(config: &Config) -> Result<Decisions, Error> {
    let nofile = limits::raise_nofile()?;
    let verdict = probe::choose(config.io)?;
    let plan = cores::plan(config.workers, config.pin, &config.resources);
    let users = DescriptorUsers {
        workers: plan.cores.len(),
        listeners: config.listen.len(),
        pool_max_idle: config.pool.most(),
        backends: (config.discovery != Discovery::Kubernetes).then(|| config.addresses()),
        names: if config.discovery == Discovery::Kubernetes { 0 } else { config.names() },
    };
    let capacity = limits::capacity(config.max_sessions, nofile, &users)?;
    Ok(Decisions { plan, verdict, capacity })
}

fn run(config: Arc<Config>) -> Result<ExitCode, Error> {
    let started = Instant::now();
    let runtime = Runtime::new()?;
    logging::init_logging(&config)?;
    logging::end_with_any_thread();
    for warning in config.warnings() {
        tracing::warn!("{warning}");
    }
    let Decisions { plan, verdict, capacity } = decide(&config)?;
    let (prepared, verdict) = prepare(&plan, verdict, config.io)?;
    let max_sessions = capacity.sessions.get();
    let pool_conns_max = capacity.pool_conns;
    let workers = plan.cores.len();
    let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
    let version = env!("CARGO_PKG_VERSION");
    tracing::info!(
        version,
        workers,
        max_sessions,
        pool_conns_max,
        cores = plan.reason,
        "aegis-proxy starts"
    );
    tracing::info!(driver = verdict.driver.name(), reason = verdict.reason, kernel, "io driver");

    // Everything is bound before anything is announced or served.
    let options = worker::socket_options(&config);
    let listeners = listeners::listen(&config.listen, workers, &options)?;
    let admin = admin::bind(config.admin)?;

    let stats: Arc<[_]> = (0..workers).map(|_| Arc::default()).collect();
    let mailboxes: Arc<[_]> =
        (0..workers).map(|_| Mailbox::new().map(Arc::new)).collect::<Result<_, _>>()?;
    let (alive, exited) = tokio::sync::mpsc::channel(1);
    let listening = Listening::new(listeners.addresses.clone());
    let mut handles = Vec::with_capacity(workers);
    for (index, (worker, listeners)) in prepared.into_iter().zip(listeners.sets).enumerate() {
        handles.push(WorkerHandle {
            mailbox: Arc::clone(&mailboxes[index]),
            stats: Arc::clone(&stats[index]),
        });
        worker.start(WorkerSetup {
            index,
            listeners,
            config: Arc::clone(&config),
            sessions_max: max_sessions,
            pool_conns_max,
            mailboxes: Arc::clone(&mailboxes),
            stats: Arc::clone(&stats),
            started,
            listening: listening.clone(),
            exited: alive.clone(),
        })?;
    }
    drop(alive);
    for address in &listeners.addresses {
        tracing::info!(%address, "listening");
    }

    let driver = DriverInfo { driver: verdict.driver.name(), reason: verdict.reason, kernel };
    let listening = listeners.addresses;
    let plane =
        Plane { config, started, listening, workers: handles, driver, max_sessions, exited, admin };
    let outcome = plane.run(runtime)?;
    if let Outcome::Misconfigured { reason } = outcome {
        return Ok(fail(EXIT_CONFIG, reason));
    }
    logging::flush();
    Ok(if outcome.is_failure() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Prepares the workers on the driver that was chosen, or all on epoll where it may be that and the
/// kernel does not give each a ring.
fn prepare(
    plan: &Plan,
    verdict: Verdict,
    choice: IoChoice,
) -> Result<(Vec<Prepared>, Verdict), WorkerError> {
    let all = |driver| -> Result<Vec<_>, _> {
        let cores = plan.cores.iter().enumerate();
        cores.map(|(index, &core)| worker::prepare(index, core, driver)).collect()
    };
    match all(verdict.driver) {
        Err(error) if choice == IoChoice::Auto && verdict.driver != DriverKind::Epoll => {
            let reason = format!("io_uring cannot be used: {error}");
            let verdict = Verdict { driver: DriverKind::Epoll, reason };
            Ok((all(verdict.driver)?, verdict))
        }
        outcome => Ok((outcome?, verdict)),
    }
}

/// Prints what a start would do, and starts nothing.
fn check(config: &Config) -> Result<ExitCode, Error> {
    let mut text = String::new();
    for (name, value) in config.effective() {
        writeln!(text, "{name}={value}")?;
    }
    // What is in force is worth knowing above all where it does not fit.
    let Decisions { plan, verdict, capacity } = decide(config).inspect_err(|_| {
        print(&text);
    })?;
    writeln!(text)?;
    writeln!(text, "workers: {} ({})", plan.cores.len(), plan.reason)?;
    writeln!(text, "sessions at a time: {}", capacity.sessions)?;
    writeln!(text, "pool connections of a worker: {} at most", capacity.pool_conns)?;
    writeln!(
        text,
        "warm connections to an endpoint: {} at least, of all workers; {} at most, of each",
        config.pool.min_idle,
        config.pool.most()
    )?;
    writeln!(text, "driver: {} ({})", verdict.driver.name(), verdict.reason)?;
    for warning in config.warnings() {
        writeln!(text, "warning: {warning}")?;
    }
    Ok(print(&text))
}

/// Prints what was asked for. A reader that has seen enough and left is no failure.
fn print(text: &str) -> ExitCode {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            fail(1, format_args!("cannot write to standard output: {error}"))
        }
        _ => ExitCode::SUCCESS,
    }
}

/// What only somebody who changes the configuration can mend is told from what may be gone at the
/// next start.
fn exit_code(error: &Error) -> u8 {
    let listen = error.downcast_ref().map(ListenError::kind);
    let kind = listen.or_else(|| error.downcast_ref().map(io::Error::kind));
    let never_to_be_had = matches!(
        kind,
        Some(
            io::ErrorKind::AddrNotAvailable
                | io::ErrorKind::InvalidInput
                | io::ErrorKind::PermissionDenied
                | io::ErrorKind::Unsupported
        )
    );
    if never_to_be_had || error.is::<Unavailable>() || error.is::<LimitError>() {
        EXIT_CONFIG
    } else {
        1
    }
}

fn fail(code: u8, error: impl Display) -> ExitCode {
    logging::complain(format_args!("aegis-proxy: {error}"));
    ExitCode::from(code)
}
