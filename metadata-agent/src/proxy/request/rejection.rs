//! Reasons to reject a request, and the response that the guest gets.
//!
//! The response is a status and one sentence. It names no host, id or cause. The cause goes to the
//! log, and its label to a counter.

use std::time::Duration;

use hyper::body::Bytes;
use hyper::header::{CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use hyper::{Response, StatusCode};

use super::target::TargetError;
use crate::proxy::client::HaproxyHeaderError;
use crate::proxy::downstream::AdmissionError;
use crate::proxy::metrics::{Metrics, RejectionLabel};
use crate::proxy::upstream::UpstreamError;

/// The reason why a request is not answered by Nova.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Rejection {
    #[error("request target: {0}")]
    Target(#[from] TargetError),
    #[error("the request body is longer than {limit} bytes")]
    BodyTooLarge { limit: usize },
    #[error("the request body did not arrive within {limit:?}")]
    BodyTimeout { limit: Duration },
    #[error("the request body is incomplete")]
    BodyBroken { source: Box<dyn std::error::Error + Send + Sync> },
    #[error("the guest exceeds its rate limit")]
    RateLimited { probe: bool },
    #[error(transparent)]
    TooManyConnections(#[from] AdmissionError),
    #[error("the port is not known yet")]
    IdentityPending,
    #[error("the port did not become known in time")]
    IdentityUnknown,
    #[error("the port does not belong to a Nova instance")]
    NotAnInstance,
    #[error("the attachment is gone")]
    AttachmentGone,
    #[error(transparent)]
    HaproxyHeader(#[from] HaproxyHeaderError),
    #[error("no port has the client's address")]
    ClientNotFound,
    #[error("several ports have the client's address")]
    ClientAmbiguous,
    #[error(transparent)]
    Upstream(#[from] UpstreamError),
}

/// The response to a rejected request.
struct ErrorResponse {
    status: StatusCode,
    text: &'static str,
    retry_after: bool,
    close: bool,
}

impl Rejection {
    /// The contract with guests: every status and text is here.
    fn error_response(&self) -> ErrorResponse {
        let response = |status, text| ErrorResponse { status, text, retry_after: false, close: false };
        match self {
            Self::Target(
                TargetError::Connect
                | TargetError::AmbiguousHost
                | TargetError::OtherHost
                | TargetError::Fragment
                | TargetError::NoPath,
            )
            | Self::HaproxyHeader(
                HaproxyHeaderError::NoScope
                | HaproxyHeaderError::AmbiguousScope
                | HaproxyHeaderError::InvalidScope { .. }
                | HaproxyHeaderError::NoAddress
                | HaproxyHeaderError::InvalidAddress { .. },
            )
            | Self::BodyBroken { .. } => ErrorResponse {
                close: true,
                ..response(StatusCode::BAD_REQUEST, "The request is malformed.\n")
            },
            Self::BodyTooLarge { .. } => ErrorResponse {
                close: true,
                ..response(StatusCode::PAYLOAD_TOO_LARGE, "The request is too large.\n")
            },
            Self::BodyTimeout { .. } => ErrorResponse {
                close: true,
                ..response(StatusCode::REQUEST_TIMEOUT, "The request took too long.\n")
            },
            Self::RateLimited { probe } => {
                let status =
                    if *probe { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::TOO_MANY_REQUESTS };
                ErrorResponse { retry_after: true, ..response(status, "There are too many requests.\n") }
            }
            Self::TooManyConnections(_) => ErrorResponse {
                retry_after: true,
                close: true,
                ..response(StatusCode::SERVICE_UNAVAILABLE, "There are too many requests.\n")
            },
            Self::IdentityPending => ErrorResponse {
                retry_after: true,
                ..response(StatusCode::SERVICE_UNAVAILABLE, "The metadata is not ready yet.\n")
            },
            Self::IdentityUnknown | Self::NotAnInstance | Self::ClientNotFound | Self::ClientAmbiguous => {
                response(StatusCode::NOT_FOUND, "There is no metadata for this port.\n")
            }
            Self::AttachmentGone => ErrorResponse {
                close: true,
                ..response(StatusCode::NOT_FOUND, "There is no metadata for this port.\n")
            },
            Self::Upstream(
                UpstreamError::Resolve { .. }
                | UpstreamError::Connect { .. }
                | UpstreamError::ConnectTimeout { .. }
                | UpstreamError::Busy { .. }
                | UpstreamError::Tls { .. }
                | UpstreamError::Handshake { .. },
            ) => ErrorResponse {
                retry_after: true,
                ..response(StatusCode::SERVICE_UNAVAILABLE, "The metadata service is not available.\n")
            },
            Self::Upstream(
                UpstreamError::Broken { .. } | UpstreamError::Garbled { .. } | UpstreamError::Upgraded { .. },
            ) => response(StatusCode::BAD_GATEWAY, "The metadata service gave no valid answer.\n"),
            Self::Upstream(UpstreamError::AnswerTimeout { .. }) => {
                response(StatusCode::GATEWAY_TIMEOUT, "The metadata service did not answer in time.\n")
            }
        }
    }

    /// Counts the rejection by its variant.
    pub(crate) fn count(&self, metrics: &Metrics) {
        match self {
            Self::Upstream(error) => metrics.upstream_error(error.label()),
            Self::Target(_) => metrics.rejected_request(RejectionLabel::Target),
            Self::BodyTooLarge { .. } => metrics.rejected_request(RejectionLabel::BodyTooLarge),
            Self::BodyTimeout { .. } => metrics.rejected_request(RejectionLabel::BodyTimeout),
            Self::BodyBroken { .. } => metrics.rejected_request(RejectionLabel::BodyBroken),
            Self::RateLimited { .. } => metrics.rejected_request(RejectionLabel::RateLimited),
            Self::TooManyConnections(error) => metrics.rejected_request(error.label()),
            Self::IdentityPending => metrics.rejected_request(RejectionLabel::IdentityPending),
            Self::IdentityUnknown => metrics.rejected_request(RejectionLabel::IdentityUnknown),
            Self::NotAnInstance => metrics.rejected_request(RejectionLabel::NotAnInstance),
            Self::AttachmentGone => metrics.rejected_request(RejectionLabel::AttachmentGone),
            Self::HaproxyHeader(_) => metrics.rejected_request(RejectionLabel::CallerUnreadable),
            Self::ClientNotFound => metrics.rejected_request(RejectionLabel::CallerUnknown),
            Self::ClientAmbiguous => metrics.rejected_request(RejectionLabel::CallerAmbiguous),
        }
    }

    /// Returns the response, and whether unread bytes of the request may still arrive.
    pub(crate) fn response(&self) -> (Response<Bytes>, bool) {
        let error = self.error_response();
        let mut response = Response::new(Bytes::from_static(error.text.as_bytes()));
        *response.status_mut() = error.status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        headers.insert(CONTENT_LENGTH, HeaderValue::from(error.text.len()));
        if error.retry_after {
            headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        if error.close {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        (response, error.close)
    }
}

/// The response to a request head that did not arrive in time. hyper would send none.
pub(crate) const HEAD_TIMEOUT_RESPONSE: &[u8] = b"HTTP/1.1 408 Request Timeout\r\n\
    content-type: text/plain\r\n\
    content-length: 27\r\n\
    connection: close\r\n\
    \r\n\
    The request took too long.\n";

/// The response to the preface of HTTP/2, to which hyper sends none.
pub(crate) const MALFORMED_RESPONSE: &[u8] = b"HTTP/1.1 400 Bad Request\r\n\
    content-type: text/plain\r\n\
    content-length: 26\r\n\
    connection: close\r\n\
    \r\n\
    The request is malformed.\n";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_temporary_rejection_has_retry_after() {
        let (response, closes) = Rejection::IdentityPending.response();
        assert_eq!(response.status(), 503);
        assert_eq!(response.headers()[RETRY_AFTER], "1");
        assert!(!closes);
        let (response, _) = Rejection::NotAnInstance.response();
        assert_eq!(response.status(), 404);
        assert!(!response.headers().contains_key(RETRY_AFTER));
    }

    #[test]
    fn the_constant_responses_equal_the_built_ones() {
        for (constant, rejection) in [
            (HEAD_TIMEOUT_RESPONSE, Rejection::BodyTimeout { limit: Duration::ZERO }),
            (MALFORMED_RESPONSE, Rejection::Target(TargetError::NoPath)),
        ] {
            let (built, _) = rejection.response();
            let text = std::str::from_utf8(constant).unwrap();
            let (head, body) = text.split_once("\r\n\r\n").unwrap();
            assert_eq!(body.as_bytes(), &built.body()[..]);
            assert_eq!(head.lines().next(), Some(format!("HTTP/1.1 {}", built.status()).as_str()));
            let headers: Vec<_> = head.lines().skip(1).map(|line| line.split_once(": ").unwrap()).collect();
            assert_eq!(headers.len(), built.headers().len());
            for (name, value) in headers {
                assert_eq!(built.headers()[name], value);
            }
        }
    }
}
