//! The body of a response on its way to the guest: Nova's, unchanged, or a sentence of our own.
//!
//! If Nova stops in the middle, the body ends with an error, which also ends the guest's
//! connection: a truncated response must not look complete.

use std::error::Error;
use std::pin::Pin;
use std::task::{Context, Poll};

use hyper::body::{Body, Bytes, Frame, SizeHint};

use super::record::RequestRecord;
use crate::proxy::upstream::{UpstreamBody, UpstreamBodyError};

#[derive(Debug)]
pub(crate) struct ResponseBody {
    content: Content,
    record: RequestRecord,
}

#[derive(Debug)]
enum Content {
    Text(Option<Bytes>),
    Upstream(UpstreamBody),
}

impl ResponseBody {
    pub(super) fn from_text(text: Bytes, record: RequestRecord) -> Self {
        Self { content: Content::Text(Some(text)), record }
    }

    pub(super) fn from_upstream(body: UpstreamBody, record: RequestRecord) -> Self {
        Self { content: Content::Upstream(body), record }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = UpstreamBodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, UpstreamBodyError>>> {
        let Self { content, record } = self.get_mut();
        let data = match content {
            Content::Text(text) => Poll::Ready(text.take().map(Ok)),
            Content::Upstream(body) => {
                if record.has_large_buffers() {
                    body.enlarge_buffers();
                }
                body.poll_data(cx)
            }
        };
        match &data {
            Poll::Ready(Some(Ok(bytes))) => record.sent(bytes.len()),
            Poll::Ready(Some(Err(error))) => {
                record.metrics().upstream_error(error.label());
                tracing::debug!(error = error as &dyn Error, "response truncated");
            }
            Poll::Ready(None) | Poll::Pending => {}
        }
        data.map(|data| data.map(|data| data.map(Frame::data)))
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Content::Text(text) => text.is_none(),
            Content::Upstream(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Text(text) => SizeHint::with_exact(text.as_ref().map_or(0, Bytes::len) as u64),
            Content::Upstream(body) => body.size_hint(),
        }
    }
}
