//! The body of an upstream response. Its connection is free at the last byte, not before.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::body::{Body, Bytes, Incoming, SizeHint};
use tokio::time::{Instant, Sleep, sleep};

use super::ConnectionLease;
use crate::proxy::metrics::UpstreamErrorLabel;

#[derive(Debug, thiserror::Error)]
pub(crate) enum UpstreamBodyError {
    #[error("the response body stalled for {limit:?}")]
    Stalled { limit: Duration },
    #[error("the response body is incomplete")]
    Broken { source: hyper::Error },
}

impl UpstreamBodyError {
    pub(crate) const fn label(&self) -> UpstreamErrorLabel {
        match self {
            Self::Stalled { .. } => UpstreamErrorLabel::BodyStalled,
            Self::Broken { .. } => UpstreamErrorLabel::BodyBroken,
        }
    }
}

#[derive(Debug)]
pub(crate) struct UpstreamBody {
    body: Incoming,
    lease: Option<ConnectionLease>,
    stall: StallTimer,
}

/// Limits the wait between two pieces. Most bodies never wait, so the timer is created on first
/// use.
#[derive(Debug)]
struct StallTimer {
    limit: Duration,
    timer: Option<Pin<Box<Sleep>>>,
    armed: bool,
}

impl UpstreamBody {
    pub(super) fn new(body: Incoming, lease: ConnectionLease, stall_timeout: Duration) -> Self {
        let stall = StallTimer { limit: stall_timeout, timer: None, armed: false };
        let mut body = Self { body, lease: Some(lease), stall };
        body.give_back_if_complete();
        body
    }

    pub(crate) fn poll_data(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, UpstreamBodyError>>> {
        loop {
            match Pin::new(&mut self.body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => {
                    self.stall.armed = false;
                    self.give_back_if_complete();
                    // Trailers belong to this hop; we did not ask for any.
                    if let Ok(bytes) = frame.into_data() {
                        return Poll::Ready(Some(Ok(bytes)));
                    }
                }
                Poll::Ready(Some(Err(source))) => {
                    return Poll::Ready(Some(Err(UpstreamBodyError::Broken { source })));
                }
                Poll::Ready(None) => {
                    self.give_back();
                    return Poll::Ready(None);
                }
                Poll::Pending => return self.stall.poll(cx),
            }
        }
    }

    /// Makes the buffers towards Nova those of a long response, until the connection is used for
    /// another request.
    pub(crate) fn enlarge_buffers(&self) {
        if let Some(lease) = &self.lease {
            lease.connection.set_large_buffers(true);
        }
    }

    pub(crate) fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    pub(crate) fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }

    fn give_back_if_complete(&mut self) {
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

impl StallTimer {
    fn poll<T>(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<T, UpstreamBodyError>>> {
        let limit = self.limit;
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep(limit)));
        if !self.armed {
            self.armed = true;
            timer.as_mut().reset(Instant::now() + limit);
        }
        timer.as_mut().poll(cx).map(|()| Some(Err(UpstreamBodyError::Stalled { limit })))
    }
}
