//! The body of an answer on its way to the guest: Nova's, piece by piece and unchanged, or a sentence of our own.
//!
//! When Nova stops in the middle the body ends with an error, and the guest's connection with it: an answer cut
//! short must not look whole. The connection to Nova goes back to its pool at the last byte and not before.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use tokio::time::{Instant, Sleep, sleep};

use super::exchange::Exchange;
use super::upstream::Lease;

/// Why an answer ended before its end.
#[derive(Debug, thiserror::Error)]
pub(super) enum RelayError {
    #[error("the answer's body stalled for {limit:?}")]
    Stalled { limit: Duration },
    #[error("the answer's body broke off")]
    Broken { source: hyper::Error },
}

impl RelayError {
    const fn label(&self) -> &'static str {
        match self {
            Self::Stalled { .. } => "body_stalled",
            Self::Broken { .. } => "body_broken",
        }
    }
}

/// An answer's body.
#[derive(Debug)]
pub(super) struct Answer {
    source: Source,
    exchange: Exchange,
}

#[derive(Debug)]
enum Source {
    Sentence(Option<Bytes>),
    Nova(Stream),
}

#[derive(Debug)]
struct Stream {
    body: Incoming,
    lease: Option<Lease>,
    stall: Stall,
}

/// Made only when a body lets us wait, which most never do.
#[derive(Debug)]
struct Stall {
    limit: Duration,
    timer: Option<Pin<Box<Sleep>>>,
    armed: bool,
}

impl Answer {
    pub(super) fn sentence(text: Bytes, exchange: Exchange) -> Self {
        Self { source: Source::Sentence(Some(text)), exchange }
    }

    pub(super) fn relay(body: Incoming, lease: Lease, stall_limit: Duration, exchange: Exchange) -> Self {
        let stall = Stall { limit: stall_limit, timer: None, armed: false };
        let mut stream = Stream { body, lease: Some(lease), stall };
        stream.give_back_if_whole();
        Self { source: Source::Nova(stream), exchange }
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = RelayError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, RelayError>>> {
        let Self { source, exchange } = self.get_mut();
        let piece = match source {
            Source::Sentence(text) => Poll::Ready(text.take().map(Ok)),
            Source::Nova(stream) => stream.poll_piece(cx),
        };
        match &piece {
            Poll::Ready(Some(Ok(bytes))) => exchange.sent(bytes.len()),
            Poll::Ready(Some(Err(error))) => {
                exchange.metrics().upstream_error(error.label());
                tracing::debug!(error = error as &dyn std::error::Error, "an answer is cut short");
            }
            Poll::Ready(None) | Poll::Pending => {}
        }
        piece.map(|piece| piece.map(|piece| piece.map(Frame::data)))
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Source::Sentence(text) => text.is_none(),
            Source::Nova(stream) => stream.body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Sentence(text) => SizeHint::with_exact(text.as_ref().map_or(0, Bytes::len) as u64),
            Source::Nova(stream) => stream.body.size_hint(),
        }
    }
}

impl Stream {
    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, RelayError>>> {
        loop {
            match Pin::new(&mut self.body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => {
                    self.stall.armed = false;
                    self.give_back_if_whole();
                    // Trailers belong to the hop: we asked for none.
                    if let Ok(bytes) = frame.into_data() {
                        return Poll::Ready(Some(Ok(bytes)));
                    }
                }
                Poll::Ready(Some(Err(source))) => {
                    return Poll::Ready(Some(Err(RelayError::Broken { source })));
                }
                Poll::Ready(None) => {
                    self.give_back();
                    return Poll::Ready(None);
                }
                Poll::Pending => return self.stall.poll(cx),
            }
        }
    }

    fn give_back_if_whole(&mut self) {
        if self.body.is_end_stream() {
            self.give_back();
        }
    }

    fn give_back(&mut self) {
        if let Some(lease) = self.lease.take() {
            lease.give_back();
        }
    }
}

impl Stall {
    fn poll<T>(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<T, RelayError>>> {
        let limit = self.limit;
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep(limit)));
        if !self.armed {
            self.armed = true;
            timer.as_mut().reset(Instant::now() + limit);
        }
        timer.as_mut().poll(cx).map(|()| Some(Err(RelayError::Stalled { limit })))
    }
}
