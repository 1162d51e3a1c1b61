//! A signal that would end the command ends the capture, as with tcpdump.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::process::exit;

use futures_util::future::select_all;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::cli::signals::{exit_code, watch};

/// Has the first signal end the capture, and a second one the process: by the end of what this side says
/// the proxy learns that no more is wanted, and sends what there is.
///
/// # Errors
/// A signal handler cannot be set, or there is no thread to wait for them.
pub(super) fn end_capture_by_signal(stream: UnixStream) -> io::Result<()> {
    watch(|runtime| {
        let mut signals = Vec::new();
        for kind in [SignalKind::interrupt(), SignalKind::terminate()] {
            signals.push((signal(kind)?, kind));
        }
        runtime.spawn(async move {
            next(&mut signals).await;
            // Where the proxy has left, there is nothing to wait for.
            let _ = stream.shutdown(Shutdown::Write);
            exit(i32::from(exit_code(next(&mut signals).await)));
        });
        Ok(())
    })
}

async fn next(signals: &mut [(Signal, SignalKind)]) -> SignalKind {
    let each = signals.iter_mut().map(|(signal, kind)| {
        Box::pin(async move {
            signal.recv().await;
            *kind
        })
    });
    select_all(each).await.0
}
