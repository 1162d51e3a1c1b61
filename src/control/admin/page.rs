//! What the admin port answers.

use std::future::Future;

use futures_util::stream;
use tokio::sync::{Semaphore, SemaphorePermit, mpsc};
use tokio::task::{JoinSet, yield_now};
use warp::Reply;
use warp::http::{Response, StatusCode, header};

use crate::limits::ADMIN_PIECE_BYTES;

/// One piece is made at a time, of whichever page: between two of them the runtime looks at what else
/// there is, such as a probe's connection, however many pages are asked for.
static TURN: Semaphore = Semaphore::const_new(1);

pub(super) type Page = warp::reply::Response;

pub(super) fn page(status: StatusCode, content_type: &'static str, body: String) -> Page {
    typed(content_type, Response::builder().status(status).body(body.into()).unwrap_or_default())
}

/// A page of any size, made piece by piece as its reader takes it: neither the time nor the memory
/// that it takes at once grows with it.
pub(super) fn streamed<F>(content_type: &'static str, write: impl FnOnce(Pieces) -> F) -> Page
where
    F: Future<Output = ()> + Send + 'static,
{
    let (out, mut pieces) = mpsc::channel(1);
    // It ends with the body, so that nothing is made for a client that has left.
    let mut writer = JoinSet::new();
    writer.spawn(write(Pieces { text: String::new(), out, turn: None }));
    let body = stream::poll_fn(move |cx| {
        debug_assert!(writer.len() <= 1);
        pieces.poll_recv(cx).map(|piece| piece.map(Ok::<_, std::convert::Infallible>))
    });
    typed(content_type, warp::reply::stream(body).into_response())
}

fn typed(content_type: &'static str, mut page: Page) -> Page {
    page.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(content_type));
    page
}

/// Where a streamed page is written to.
#[derive(Debug)]
pub struct Pieces {
    /// What is written of the next piece.
    pub text: String,
    out: mpsc::Sender<String>,
    turn: Option<SemaphorePermit<'static>>,
}

impl Pieces {
    /// Waits for the turn to make the first piece.
    pub async fn begin(&mut self) {
        // It is never closed.
        self.turn = TURN.acquire().await.ok();
    }

    /// To be called after each few lines: hands a piece on if there is one, and lets others run.
    pub async fn pause(&mut self) {
        if self.text.len() >= ADMIN_PIECE_BYTES {
            self.hand_on().await;
            self.begin().await;
        }
    }

    /// Hands the rest on.
    pub async fn end(mut self) {
        self.hand_on().await;
    }

    async fn hand_on(&mut self) {
        // The turn is over only once the runtime has looked for events, …
        yield_now().await;
        // … but does not wait for a reader. Who has left ends this at the same moment.
        self.turn = None;
        let _ = self.out.send(std::mem::take(&mut self.text)).await;
    }
}

/// All pieces of a page in one.
#[cfg(test)]
pub(in crate::control) fn whole<F>(write: impl FnOnce(Pieces) -> F) -> String
where
    F: Future<Output = ()>,
{
    crate::control::testing::block_on(async {
        let (out, mut pieces) = mpsc::channel::<String>(1);
        let collect = async {
            let mut text = String::new();
            while let Some(piece) = pieces.recv().await {
                assert!(piece.len() < 2 * ADMIN_PIECE_BYTES, "a piece of {} bytes", piece.len());
                text += &piece;
            }
            text
        };
        futures_util::join!(write(Pieces { text: String::new(), out, turn: None }), collect).1
    })
}
