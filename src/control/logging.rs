//! Where the log goes: lines of text or JSON on standard error.
//!
//! Nobody but the thread of [`writer`] ever writes there: a write can block for ever, or fail.

mod writer;

use std::backtrace::{Backtrace, BacktraceStatus};
use std::borrow::Cow;
use std::fmt::Display;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::pipe::PIPE_BUF;
use tracing::{Level, Metadata};
use tracing_subscriber::filter::{FilterExt, LevelFilter, ParseError, filter_fn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, reload};

use crate::config::{Config, LogFormat};
use crate::limits::LOG_FLUSH_MAX;
use writer::LogWriter;

/// The log of the process, once there is one.
static LOG: OnceLock<LogWriter> = OnceLock::new();

/// What holds whatever `AEGIS_LOG` says, unless it names the same: libraries tell of troubles which the
/// program tells of itself, once.
const LIBRARIES: &str =
    "kube=off,kube_client=off,hyper=off,hyper_util=off,tower=off,tower_http=off,rustls=off";

/// By which the filter is changed.
static FILTER: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// Starts logging to standard error. A second call changes nothing.
///
/// A filter that cannot be parsed is replaced by `info` with a warning: it is no reason to refuse
/// traffic.
///
/// # Errors
/// There is no descriptor, or no thread, for the log.
pub fn init_logging(config: &Config) -> io::Result<()> {
    start()?;
    let (filter, problem) = match filter_of(&config.log) {
        Ok(filter) => (filter, None),
        Err(error) => (EnvFilter::new("info"), Some(error)),
    };
    let (filter, handle) = reload::Layer::new(filter);
    // Who comes second has no subscriber to change.
    let _ = FILTER.set(handle);
    let layer = fmt::layer()
        .with_writer(|| Lines)
        // These would be printed to standard error, which can block and fail.
        .log_internal_errors(false)
        .with_ansi(io::stderr().is_terminal());
    let layer = match config.log_format {
        LogFormat::Text => layer.boxed(),
        LogFormat::Json => layer.json().flatten_event(true).with_span_list(false).boxed(),
    };
    let always = filter_fn(is_always_logged).with_max_level_hint(LevelFilter::INFO);
    let layer = layer.with_filter(filter.or(always));
    // The only failure is that a subscriber is set already.
    let _ = tracing_subscriber::registry().with(layer).try_init();
    if let Some(error) = problem {
        tracing::warn!(filter = config.log, %error, "AEGIS_LOG is not a log filter, using `info`");
    }
    Ok(())
}

/// Whether something is in the log whatever the filter says: who changes something by the control socket;
/// and what names a route in lines, since it is asked once, for all lines of the process's life.
fn is_always_logged(metadata: &Metadata<'_>) -> bool {
    let is_command =
        metadata.target().starts_with("aegis::control::socket") && *metadata.level() <= Level::INFO;
    is_command || metadata.is_span() && metadata.target() == "aegis::control"
}

/// Changes what is logged, as `AEGIS_LOG` says it.
///
/// # Errors
/// It is no filter; the message says why.
pub fn set_filter(text: &str) -> Result<(), String> {
    let filter = filter_of(text).map_err(|error| error.to_string())?;
    match FILTER.get() {
        Some(handle) => handle.reload(filter).map_err(|error| error.to_string()),
        None => Err("nothing is logged".to_owned()),
    }
}

/// Without regular expressions, which a text of this length could make as large as it likes.
fn filter_of(text: &str) -> Result<EnvFilter, ParseError> {
    EnvFilter::builder().with_regex(false).parse(format!("{LIBRARIES},{text}"))
}

/// Lines of the log that were dropped: nobody read them, or they could not be written.
pub fn lines_dropped() -> u64 {
    LOG.get().map_or(0, LogWriter::dropped)
}

/// Prints a message to standard error, behind what is logged, and waits until it is written, for
/// [`LOG_FLUSH_MAX`] at most.
pub fn complain(message: impl Display) {
    let line = format!("{message}\n");
    if start().is_ok() {
        queue(line.as_bytes());
        flush();
    } else {
        write_without_thread(line.as_bytes(), LOG_FLUSH_MAX);
    }
}

/// Writes to standard error where there is no thread for that, within this time at most. What can be
/// written to takes [`PIPE_BUF`] bytes without a wait.
fn write_without_thread(mut text: &[u8], within: Duration) {
    let until = Instant::now() + within;
    let stderr = io::stderr();
    while !text.is_empty() {
        let left = until.saturating_duration_since(Instant::now());
        let Ok(left) = Timespec::try_from(left) else { return };
        match poll(&mut [PollFd::new(&stderr, PollFlags::OUT)], Some(&left)) {
            Ok(1..) => {}
            Err(Errno::INTR) => continue,
            Ok(0) | Err(_) => return,
        }
        match rustix::io::write(&stderr, &text[..text.len().min(PIPE_BUF)]) {
            Ok(count) => text = &text[count..],
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(_) => return,
        }
    }
}

/// Waits until all that was logged is written, for [`LOG_FLUSH_MAX`] at most.
pub fn flush() {
    if let Some(log) = LOG.get() {
        log.flush(LOG_FLUSH_MAX);
    }
}

/// Lets a panic of any thread end the process with its message: no half-dead proxy. The usual
/// message is written by the thread that panics, which would stand still where nobody reads it.
pub fn end_with_any_thread() {
    std::panic::set_hook(Box::new(|panic| {
        let thread = thread::current();
        let name = thread.name().unwrap_or("unnamed");
        let backtrace = Backtrace::capture();
        let backtrace = match backtrace.status() {
            BacktraceStatus::Captured => format!("\n{backtrace}"),
            _ => String::new(),
        };
        complain(format_args!("thread {name} {panic}{backtrace}"));
        std::process::abort();
    }));
}

fn start() -> io::Result<()> {
    if LOG.get().is_none() {
        // A descriptor of its own: the standard library's handle has a lock, which a thread that is
        // stuck in a write holds.
        let stderr = File::from(io::stderr().as_fd().try_clone_to_owned()?);
        let report = |lines| tracing::warn!(lines, "log lines dropped: they were not read in time");
        // Who comes second drops its own, which has written nothing.
        let _ = LOG.set(LogWriter::start(stderr, report)?);
    }
    Ok(())
}

fn queue(lines: &[u8]) {
    if let Some(log) = LOG.get() {
        log.line(lines);
    }
}

/// What others write, an API server or who names pods, must not look like lines of this process.
fn one_line(line: &[u8]) -> Cow<'_, [u8]> {
    let text = line.strip_suffix(b"\n").unwrap_or(line);
    if !text.iter().any(|byte| matches!(byte, b'\n' | b'\r')) {
        return Cow::Borrowed(line);
    }
    let mut escaped: Vec<u8> = Vec::with_capacity(line.len() + 16);
    for byte in text {
        match byte {
            b'\n' => escaped.extend(b"\\n"),
            b'\r' => escaped.extend(b"\\r"),
            &byte => escaped.push(byte),
        }
    }
    escaped.push(b'\n');
    Cow::Owned(escaped)
}

/// What the subscriber writes to: one event, and so one line, a write.
struct Lines;

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        queue(&one_line(line));
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line_whatever_is_in_it() {
        for (event, line) in [
            ("fine\n", "fine\n"),
            ("torn", "torn"),
            ("a pod\nERROR forged\r\n\n", "a pod\\nERROR forged\\r\\n\n"),
        ] {
            assert_eq!(one_line(event.as_bytes()), line.as_bytes(), "{event:?}");
        }
    }
}
