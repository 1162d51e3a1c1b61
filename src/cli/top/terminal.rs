//! A terminal that is used as a whole, and given back as it was.

use std::io::{self, Stdin, Stdout, Write};

use procfs::ProcResult;
use procfs::process::Process;
use rustix::process::{Signal, getpid, kill_process};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};

use super::screen::{Line, Tone};

/// What a terminal without a size is taken for.
const SIZE_USUAL: (usize, usize) = (80, 24);

/// The screen of its own with a hidden cursor, and back.
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";

pub(super) struct Terminal {
    input: Stdin,
    output: Stdout,
    before: Termios,
    has_colors: bool,
    is_suspended: bool,
}

/// Whether this process reads from a terminal and writes to one.
pub(super) fn is_there() -> bool {
    isatty(io::stdin()) && isatty(io::stdout())
}

impl Terminal {
    /// The terminal of this process.
    ///
    /// # Errors
    /// It is gone.
    pub(super) fn take() -> io::Result<Self> {
        let (input, output) = (io::stdin(), io::stdout());
        let before = tcgetattr(&input)?;
        let has_colors = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let mut terminal = Self { input, output, before, has_colors, is_suspended: false };
        terminal.enter()?;
        Ok(terminal)
    }

    /// Uses the terminal as a whole, whatever has become of it.
    ///
    /// # Errors
    /// It is gone.
    pub(super) fn enter(&mut self) -> io::Result<()> {
        self.is_suspended = false;
        let mut raw = self.before.clone();
        raw.make_raw();
        tcsetattr(&self.input, OptionalActions::Flush, &raw)?;
        self.write(ENTER)
    }

    /// Gives it back as it was.
    fn leave(&mut self) {
        // One that is gone has nothing to get back.
        let _ = self.write(LEAVE);
        let _ = tcsetattr(&self.input, OptionalActions::Flush, &self.before);
    }

    /// Leaves the terminal to a shell, until that has this process go on. As the kernel does, not where
    /// there is none: nobody would ever do so.
    pub(super) fn suspend(&mut self) {
        if !has_shell() {
            return;
        }
        self.leave();
        self.is_suspended = true;
        let _ = kill_process(getpid(), Signal::STOP);
    }

    /// Columns and lines.
    pub(super) fn size(&self) -> (usize, usize) {
        match tcgetwinsize(&self.output) {
            Ok(size) if size.ws_col > 0 && size.ws_row > 0 => {
                (usize::from(size.ws_col), usize::from(size.ws_row))
            }
            _ => SIZE_USUAL,
        }
    }

    /// Shows these lines, which have to fit.
    ///
    /// # Errors
    /// The terminal is gone.
    pub(super) fn show(&mut self, lines: &[Line]) -> io::Result<()> {
        if self.is_suspended {
            return Ok(());
        }
        // Over what is there, so that nothing flickers.
        let mut text = "\x1b[H".to_owned();
        for (at, line) in lines.iter().enumerate() {
            let color = if self.has_colors { color(line.tone) } else { "" };
            let end = if color.is_empty() { "" } else { "\x1b[0m" };
            let next = if at == 0 { "" } else { "\r\n" };
            text.extend([next, color, &line.text, end, "\x1b[K"]);
        }
        self.write(&(text + "\x1b[J"))
    }

    fn write(&mut self, text: &str) -> io::Result<()> {
        self.output.write_all(text.as_bytes())?;
        self.output.flush()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if !self.is_suspended {
            self.leave();
        }
    }
}

/// Whether a process of the same session, and of another job, has started this one.
///
/// One that cannot be seen from this PID namespace is no shell that could be told apart. It has the id 0
/// here, which the calls of `rustix` for a session and a group take for impossible.
fn has_shell() -> bool {
    let told = || -> ProcResult<bool> {
        let own = Process::myself()?.stat()?;
        let parent = Process::new(own.ppid)?.stat()?;
        Ok(own.session == parent.session && own.pgrp != parent.pgrp)
    };
    told().unwrap_or(false)
}

fn color(tone: Tone) -> &'static str {
    match tone {
        Tone::Plain => "",
        Tone::Good => "\x1b[32m",
        Tone::Warning => "\x1b[33m",
        Tone::Bad => "\x1b[31m",
        Tone::Dim => "\x1b[2m",
    }
}
