//! A signal that would end the command ends the capture, as with tcpdump.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::process::exit;
use std::thread;

use futures_util::future::select_all;
use tokio::runtime::Builder;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Has the first signal end the capture, and a second one the process: by the end of what this side says
/// the proxy learns that no more is wanted, and sends what there is.
///
/// # Errors
/// A signal handler cannot be set, or there is no thread to wait for them.
pub(super) fn end_capture_by_signal(stream: UnixStream) -> io::Result<()> {
    let runtime = Builder::new_current_thread().enable_io().build()?;
    let entered = runtime.enter();
    let mut signals = Vec::new();
    for kind in [SignalKind::interrupt(), SignalKind::terminate()] {
        signals.push((signal(kind)?, kind));
    }
    drop(entered);
    let wait = async move {
        next(&mut signals).await;
        // Where the proxy has left, there is nothing to wait for.
        let _ = stream.shutdown(Shutdown::Write);
        let kind = next(&mut signals).await;
        exit(128 + kind.as_raw_value());
    };
    thread::Builder::new().spawn(move || runtime.block_on(wait)).map(drop)
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
