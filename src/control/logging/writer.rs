//! A bounded queue of lines, and the one thread that writes them.
//!
//! Who logs never waits and never fails: a worker must not stand still because nobody reads the log,
//! nor end because its disk is full. A line that finds no room, or that cannot be written, is
//! dropped and counted. `tracing-appender` does not do: it bounds lines and not bytes, counts
//! nothing that fails to be written, and at the end prints to standard output if the log is stuck.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, Thread};
use std::time::Duration;

use crossbeam_queue::ArrayQueue;
use rustix::event::{PollFd, PollFlags, poll};

use crate::limits::{LOG_QUEUE_BYTES_MAX, LOG_QUEUE_LINES_MAX};

/// How long the writer leaves a destination alone that says it has room, and takes nothing.
const NOT_READY_PAUSE: Duration = Duration::from_millis(1);

/// Where lines are queued to be written.
#[derive(Debug)]
pub(super) struct LogWriter {
    queue: Arc<Queue>,
    thread: Thread,
}

#[derive(Debug)]
struct Queue {
    lines: ArrayQueue<Box<[u8]>>,
    bytes: AtomicUsize,
    /// Lines that found no room.
    refused: AtomicU64,
    /// Lines that could not be written.
    failed: AtomicU64,
    /// Lines that found room.
    queued: AtomicU64,
    /// Those of them that were written or failed, as of the last time when the queue was empty.
    done: Mutex<u64>,
    emptied: Condvar,
}

impl LogWriter {
    /// Starts the thread, which writes to `destination`. It calls `report` with the number of lines
    /// that found no room, once there is room and somebody reads again.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub(super) fn start<W>(destination: W, report: fn(u64)) -> io::Result<Self>
    where
        W: Write + AsFd + Send + 'static,
    {
        let queue = Arc::new(Queue {
            lines: ArrayQueue::new(LOG_QUEUE_LINES_MAX),
            bytes: AtomicUsize::new(0),
            refused: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            queued: AtomicU64::new(0),
            done: Mutex::new(0),
            emptied: Condvar::new(),
        });
        let writing = Arc::clone(&queue);
        let destination = Destination { file: destination, is_torn: false };
        let thread = thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || write_lines(&writing, destination, report))
            .map_err(|error| {
                io::Error::new(error.kind(), format!("no thread for the log: {error}"))
            })?;
        Ok(Self { queue, thread: thread.thread().clone() })
    }

    /// Queues a line, its line feed included, or drops and counts it.
    pub(super) fn line(&self, line: &[u8]) {
        let queue = &*self.queue;
        // Two threads that meet at the limit may both be refused: lines are short beside it.
        let bytes = queue.bytes.fetch_add(line.len(), Relaxed) + line.len();
        if bytes <= LOG_QUEUE_BYTES_MAX && queue.lines.push(line.into()).is_ok() {
            queue.queued.fetch_add(1, Relaxed);
        } else {
            queue.bytes.fetch_sub(line.len(), Relaxed);
            queue.refused.fetch_add(1, Relaxed);
        }
        self.thread.unpark();
    }

    /// Lines that were dropped so far.
    pub(super) fn dropped(&self) -> u64 {
        self.queue.refused.load(Relaxed) + self.queue.failed.load(Relaxed)
    }

    /// Waits until the lines that are queued now have been written or dropped, at most `within`.
    pub(super) fn flush(&self, within: Duration) {
        let queued = self.queue.queued.load(Relaxed);
        let done = self.queue.done.lock().unwrap_or_else(PoisonError::into_inner);
        // Whether it got so far or not: there is nothing more to be done about it.
        let _ = self.queue.emptied.wait_timeout_while(done, within, |done| *done < queued);
    }
}

fn write_lines<W: Write + AsFd>(queue: &Queue, mut to: Destination<W>, report: fn(u64)) {
    let (mut done, mut reported) = (0, 0);
    loop {
        let mut is_read = false;
        while let Some(line) = queue.lines.pop() {
            let written = to.write_line(&line);
            is_read = written.is_ok();
            if written.is_err() {
                queue.failed.fetch_add(1, Relaxed);
            }
            // Only now: the line counts until it is out of memory.
            queue.bytes.fetch_sub(line.len(), Relaxed);
            done += 1;
        }
        *queue.done.lock().unwrap_or_else(PoisonError::into_inner) = done;
        queue.emptied.notify_all();
        let refused = queue.refused.load(Relaxed);
        // Never about a line that failed: the report would fail like it, again and again.
        if is_read && refused > reported {
            report(refused - reported);
            reported = refused;
        }
        thread::park();
    }
}

struct Destination<W> {
    file: W,
    /// True exactly when the latest line was written in part only.
    is_torn: bool,
}

impl<W: Write + AsFd> Destination<W> {
    fn write_line(&mut self, line: &[u8]) -> io::Result<()> {
        if self.is_torn {
            self.write_all(b"\n").map_err(|(error, _)| error)?;
            self.is_torn = false;
        }
        self.write_all(line).map_err(|(error, written)| {
            self.is_torn = written > 0;
            error
        })
    }

    /// As `Write::write_all`, also where the descriptor does not block: whoever shares it with this
    /// process can set that. The error tells how much was written before it.
    fn write_all(&mut self, bytes: &[u8]) -> Result<(), (io::Error, usize)> {
        let mut written = 0;
        while written < bytes.len() {
            match self.file.write(&bytes[written..]) {
                Ok(0) => return Err((io::ErrorKind::WriteZero.into(), written)),
                Ok(n) => written += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    // What goes wrong here, the next write says.
                    let _ = poll(&mut [PollFd::new(&self.file, PollFlags::OUT)], None);
                    thread::sleep(NOT_READY_PAUSE);
                }
                Err(error) => return Err((error, written)),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};
    use std::io::{BufRead, BufReader, Read};
    use std::time::Instant;

    use rustix::io::ioctl_fionbio;
    use rustix::pipe::{fcntl_setpipe_size, pipe};

    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    /// A writer to a pipe, and the pipe's other end.
    fn piped(is_blocking: bool) -> (LogWriter, File) {
        let (reader, writer) = pipe().unwrap();
        ioctl_fionbio(&writer, !is_blocking).unwrap();
        fcntl_setpipe_size(&writer, 4096).unwrap();
        (LogWriter::start(File::from(writer), |_| {}).unwrap(), File::from(reader))
    }

    #[test]
    fn lines_are_written_in_order() {
        let (log, reader) = piped(true);
        for line in ["one\n", "two\n", "three\n"] {
            log.line(line.as_bytes());
        }
        log.flush(LONG);
        let lines: Vec<_> = BufReader::new(reader).lines().take(3).map(Result::unwrap).collect();
        assert_eq!((lines, log.dropped()), (["one", "two", "three"].map(str::to_owned).into(), 0));
    }

    /// Fills a pipe that nobody reads with `count` lines of `len` bytes, then reads what was kept.
    fn kept_of(count: usize, len: usize, is_blocking: bool) -> usize {
        let (log, reader) = piped(is_blocking);
        for i in 0..count {
            log.line(format!("{i:0>width$}\n", width = len - 1).as_bytes());
        }
        let dropped = log.dropped() as usize;
        let kept = count - dropped;
        let lines = BufReader::new(reader).lines().take(kept).map(Result::unwrap);
        let numbers: Vec<usize> = lines.map(|line| line.parse().unwrap()).collect();
        assert!(numbers.is_sorted(), "what is kept is in order: {numbers:?}");
        log.flush(LONG);
        assert_eq!(log.dropped() as usize, dropped, "what was queued is not dropped");
        kept
    }

    #[test]
    fn a_pipe_that_nobody_reads_keeps_as_much_as_its_bounds_say() {
        let short = kept_of(3 * LOG_QUEUE_LINES_MAX, 16, true);
        // The pipe has some more, and the thread one in its hands.
        let room = LOG_QUEUE_LINES_MAX..=LOG_QUEUE_LINES_MAX + 4096 / 16 + 1;
        assert!(room.contains(&short), "{short} short lines");
        let long = 3 * LOG_QUEUE_BYTES_MAX / 4096;
        for is_blocking in [true, false] {
            let kept = kept_of(long, 4096, is_blocking) * 4096;
            let room = LOG_QUEUE_BYTES_MAX..=LOG_QUEUE_BYTES_MAX + 2 * 4096;
            assert!(room.contains(&kept), "{kept} bytes of long lines, {is_blocking}");
        }
    }

    #[test]
    fn flushing_a_stuck_log_ends_in_time() {
        let (log, _reader) = piped(true);
        log.line(&[b'x'; 8192]);
        let begun = Instant::now();
        log.flush(Duration::from_millis(20));
        assert!((Duration::from_millis(20)..LONG).contains(&begun.elapsed()));
    }

    #[test]
    fn lines_that_cannot_be_written_are_dropped() {
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        let unwritable = File::open("/dev/null").unwrap();
        for destination in [full, File::from(writer), unwritable] {
            let log = LogWriter::start(destination, |_| panic!("nothing was refused")).unwrap();
            for _ in 0..10 {
                log.line(b"line\n");
            }
            log.flush(LONG);
            assert_eq!(log.dropped(), 10);
        }
    }

    #[test]
    fn a_line_behind_a_torn_one_begins_a_line() {
        let (reader, writer) = pipe().unwrap();
        let mut reader = File::from(reader);
        let mut to = Destination { file: File::from(writer), is_torn: true };
        to.write_line(b"whole\n").unwrap();
        to.write_line(b"next\n").unwrap();
        let mut text = [0; 12];
        reader.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"\nwhole\nnext\n");
    }
}
