//! A terminal that is used as a whole, and given back as it was.

use std::io::{self, Stdin, Stdout, Write};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
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
}

/// What somebody did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Key {
    None,
    Byte(u8),
    /// The terminal is gone.
    End,
}

impl Terminal {
    /// The terminal of this process; none where input or output is something else.
    pub(super) fn take() -> Option<Self> {
        let (input, output) = (io::stdin(), io::stdout());
        if !isatty(&input) || !isatty(&output) {
            return None;
        }
        let before = tcgetattr(&input).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&input, OptionalActions::Flush, &raw).ok()?;
        let has_colors = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let mut terminal = Self { input, output, before, has_colors };
        terminal.write(ENTER).ok()?;
        Some(terminal)
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

    /// Waits for a key.
    pub(super) fn key(&self, within: Duration) -> Key {
        let limit = Timespec::try_from(within).ok();
        let mut fds = [PollFd::new(&self.input, PollFlags::IN)];
        match poll(&mut fds, limit.as_ref()) {
            // Its size may have changed.
            Ok(0) | Err(Errno::INTR) => return Key::None,
            Ok(_) => {}
            Err(_) => return Key::End,
        }
        let mut byte = [0];
        match rustix::io::read(&self.input, &mut byte) {
            Ok(1) => Key::Byte(byte[0]),
            Err(Errno::INTR) => Key::None,
            _ => Key::End,
        }
    }

    /// Shows these lines, which have to fit.
    ///
    /// # Errors
    /// The terminal is gone.
    pub(super) fn show(&mut self, lines: &[Line]) -> io::Result<()> {
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
        // One that is gone has nothing to get back.
        let _ = self.write(LEAVE);
        let _ = tcsetattr(&self.input, OptionalActions::Flush, &self.before);
    }
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
