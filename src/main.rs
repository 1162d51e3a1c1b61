//! The life of the process, top to bottom.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use aegis::cli::{self, Command, EXIT_CONFIG, EXIT_USAGE};
use aegis::config::{Config, RouteName};
use aegis::control::{DriverInfo, Outcome, Plane, Runtime, admin, logging};
use aegis::io::ignore_file_size_signal;
use aegis::startup::{self, Capacity, Decisions, Plan, StartError, listeners};

fn main() -> ExitCode {
    ignore_file_size_signal();
    let command = match cli::parse(std::env::args_os()) {
        Ok(command) => command,
        Err(error) if error.use_stderr() => {
            return cli::fail(EXIT_USAGE, error.to_string().trim_end());
        }
        Err(asked) => return cli::print(&asked.to_string()),
    };
    let check = match command {
        Command::Tool(tool) => return tool.run(),
        Command::Check(check) => Some(check),
        Command::Run => None,
    };
    let config = match Config::from_env() {
        Ok(config) => Arc::new(config),
        Err(problems) => return cli::fail(EXIT_CONFIG, problems),
    };
    let outcome = match check {
        Some(check) => cli::check(&config, check),
        None => run(config),
    };
    outcome.unwrap_or_else(|error| {
        cli::fail(if error.is_configuration() { EXIT_CONFIG } else { 1 }, error)
    })
}

fn run(config: Arc<Config>) -> Result<ExitCode, StartError> {
    let started = Instant::now();
    // It takes the signals over, which is to be done before all else.
    let runtime = Runtime::new()?;
    logging::init_logging(&config)?;
    logging::end_with_any_thread();
    for warning in config.warnings() {
        tracing::warn!("{warning}");
    }

    let Decisions { plan, driver, capacity } = startup::decide(&config)?;
    let (prepared, driver) = startup::prepare_workers(&plan, driver, config.io)?;
    let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
    let driver = DriverInfo { driver: driver.driver.name(), reason: driver.reason, kernel };
    log_start(&plan, capacity, &driver);

    // Everything is bound before anything is announced or served.
    let listeners = listeners::listen_by_route(&config, prepared.len())?;
    let admin = admin::bind(config.admin)?;
    let (control, _control_file) = listeners::listen_control(&config)?.unzip();
    let workers = startup::start_workers(prepared, listeners, &config, capacity, started)?;
    for (address, &route) in workers.addresses.iter().zip(&workers.routes) {
        let route = config.name_in_log(usize::from(route)).map(RouteName::as_str);
        tracing::info!(%address, route, "listening");
    }

    // Dropped at the end, which removes them.
    let _files = workers.files;
    let plane = Plane {
        config,
        started,
        listening: workers.addresses,
        workers: workers.handles,
        driver,
        max_sessions: capacity.sessions_max.get(),
        exited: workers.exited,
        admin,
        control,
    };
    let outcome = plane.run(runtime)?;
    if let Outcome::Misconfigured { reason } = outcome {
        return Ok(cli::fail(EXIT_CONFIG, reason));
    }
    logging::flush();
    Ok(if outcome.is_failure() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn log_start(plan: &Plan, capacity: Capacity, DriverInfo { driver, reason, kernel }: &DriverInfo) {
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        workers = plan.cores.len(),
        max_sessions = capacity.sessions_max,
        pool_conns_max = capacity.pool_conns,
        cores = plan.reason,
        "aegis-proxy starts"
    );
    tracing::info!(driver, reason, kernel, "io driver");
}
