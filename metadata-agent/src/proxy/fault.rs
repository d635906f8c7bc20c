//! Why a request got no answer of Nova's, and what the guest is told instead.
//!
//! The guest learns a status and a sentence: no host, no id, no cause. The cause goes to the log, its label to a
//! counter.

use std::time::Duration;

use hyper::body::Bytes;
use hyper::header::{CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use hyper::{Response, StatusCode};

use super::caller::ClientQueryError;
use super::target::TargetFault;
use super::upstream::UpstreamError;
use crate::proxy::metrics::Metrics;

/// What went wrong with one request.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    #[error("request target: {0}")]
    Target(#[from] TargetFault),
    #[error("the request's body is longer than {limit} bytes")]
    BodyTooLarge { limit: usize },
    #[error("the request's body did not arrive within {limit:?}")]
    BodyTimeout { limit: Duration },
    #[error("the request's body broke off")]
    BodyBroken { source: Box<dyn std::error::Error + Send + Sync> },
    #[error("the port asks too often")]
    RateLimited { probe: bool },
    #[error("the port is not known yet")]
    IdentityPending,
    #[error("the port did not become known in time")]
    IdentityUnknown,
    #[error("the port is no instance of Nova")]
    NotAnInstance,
    #[error("the attachment is gone")]
    AttachmentGone,
    #[error(transparent)]
    ClientQuery(#[from] ClientQueryError),
    #[error("the request comes from nobody that is known")]
    CallerUnknown,
    #[error("the request comes from several ports alike")]
    CallerAmbiguous,
    #[error(transparent)]
    Upstream(#[from] UpstreamError),
}

/// Whether the guest should come back, and whether its connection can be used again.
struct Reply {
    status: StatusCode,
    text: &'static str,
    retry_after: bool,
    close: bool,
}

impl Fault {
    /// The contract with guests, in one place.
    fn reply(&self) -> Reply {
        let reply = |status, text| Reply { status, text, retry_after: false, close: false };
        match self {
            Self::Target(
                TargetFault::Connect
                | TargetFault::AmbiguousHost
                | TargetFault::OtherHost
                | TargetFault::Fragment
                | TargetFault::NoPath,
            )
            | Self::ClientQuery(
                ClientQueryError::NoScope
                | ClientQueryError::AmbiguousScope
                | ClientQueryError::InvalidScope { .. }
                | ClientQueryError::NoAddress
                | ClientQueryError::InvalidAddress { .. },
            )
            | Self::BodyBroken { .. } => {
                Reply { close: true, ..reply(StatusCode::BAD_REQUEST, "The request is malformed.\n") }
            }
            Self::BodyTooLarge { .. } => {
                Reply { close: true, ..reply(StatusCode::PAYLOAD_TOO_LARGE, "The request is too large.\n") }
            }
            Self::BodyTimeout { .. } => {
                Reply { close: true, ..reply(StatusCode::REQUEST_TIMEOUT, "The request took too long.\n") }
            }
            Self::RateLimited { probe } => {
                let status =
                    if *probe { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::TOO_MANY_REQUESTS };
                Reply { retry_after: true, ..reply(status, "There are too many requests.\n") }
            }
            Self::IdentityPending => Reply {
                retry_after: true,
                ..reply(StatusCode::SERVICE_UNAVAILABLE, "The metadata is not ready yet.\n")
            },
            Self::IdentityUnknown | Self::NotAnInstance | Self::CallerUnknown | Self::CallerAmbiguous => {
                reply(StatusCode::NOT_FOUND, "There is no metadata for this port.\n")
            }
            Self::AttachmentGone => {
                Reply { close: true, ..reply(StatusCode::NOT_FOUND, "There is no metadata for this port.\n") }
            }
            Self::Upstream(
                UpstreamError::Resolve { .. }
                | UpstreamError::Connect { .. }
                | UpstreamError::ConnectTimeout { .. }
                | UpstreamError::Busy { .. }
                | UpstreamError::Tls { .. }
                | UpstreamError::Handshake { .. },
            ) => Reply {
                retry_after: true,
                ..reply(StatusCode::SERVICE_UNAVAILABLE, "The metadata service is not available.\n")
            },
            Self::Upstream(
                UpstreamError::Broken { .. } | UpstreamError::Garbled { .. } | UpstreamError::Upgraded { .. },
            ) => reply(StatusCode::BAD_GATEWAY, "The metadata service gave no valid answer.\n"),
            Self::Upstream(UpstreamError::AnswerTimeout { .. }) => {
                reply(StatusCode::GATEWAY_TIMEOUT, "The metadata service did not answer in time.\n")
            }
        }
    }

    /// Counts the fault by its variant.
    pub(super) fn count(&self, metrics: &Metrics) {
        match self {
            Self::Upstream(error) => metrics.upstream_error(error.label()),
            Self::Target(_) => metrics.rejected_request("target"),
            Self::BodyTooLarge { .. } => metrics.rejected_request("body_too_large"),
            Self::BodyTimeout { .. } => metrics.rejected_request("body_timeout"),
            Self::BodyBroken { .. } => metrics.rejected_request("body_broken"),
            Self::RateLimited { .. } => metrics.rejected_request("rate_limited"),
            Self::IdentityPending => metrics.rejected_request("identity_pending"),
            Self::IdentityUnknown => metrics.rejected_request("identity_unknown"),
            Self::NotAnInstance => metrics.rejected_request("not_an_instance"),
            Self::AttachmentGone => metrics.rejected_request("attachment_gone"),
            Self::ClientQuery(_) => metrics.rejected_request("caller_unreadable"),
            Self::CallerUnknown => metrics.rejected_request("caller_unknown"),
            Self::CallerAmbiguous => metrics.rejected_request("caller_ambiguous"),
        }
    }

    /// The guest's answer, and whether unread bytes of the request may still be on their way.
    pub(super) fn response(&self) -> (Response<Bytes>, bool) {
        let reply = self.reply();
        let mut response = Response::new(Bytes::from_static(reply.text.as_bytes()));
        *response.status_mut() = reply.status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        headers.insert(CONTENT_LENGTH, HeaderValue::from(reply.text.len()));
        if reply.retry_after {
            headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        if reply.close {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        (response, reply.close)
    }
}

/// The answer to a request head that did not arrive in time, which hyper drops without a word.
pub(super) const HEAD_TIMEOUT_ANSWER: &[u8] = b"HTTP/1.1 408 Request Timeout\r\n\
    content-type: text/plain\r\n\
    content-length: 27\r\n\
    connection: close\r\n\
    \r\n\
    The request took too long.\n";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_should_come_back_is_told_so() {
        let (response, closes) = Fault::IdentityPending.response();
        assert_eq!(response.status(), 503);
        assert_eq!(response.headers()[RETRY_AFTER], "1");
        assert!(!closes);
        let (response, _) = Fault::NotAnInstance.response();
        assert_eq!(response.status(), 404);
        assert!(!response.headers().contains_key(RETRY_AFTER));
    }

    #[test]
    fn the_written_408_is_the_same_as_the_built_one() {
        let (built, _) = Fault::BodyTimeout { limit: Duration::ZERO }.response();
        let text = std::str::from_utf8(HEAD_TIMEOUT_ANSWER).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert_eq!(body.as_bytes(), &built.body()[..]);
        assert_eq!(head.lines().next(), Some("HTTP/1.1 408 Request Timeout"));
        let headers: Vec<_> = head.lines().skip(1).map(|line| line.split_once(": ").unwrap()).collect();
        assert_eq!(headers.len(), built.headers().len());
        for (name, value) in headers {
            assert_eq!(built.headers()[name], value);
        }
    }
}
