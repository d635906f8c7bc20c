//! Reasons why the metadata API gave no response.

use std::error::Error;
use std::io;
use std::time::Duration;

use super::RequestBound;
use super::address::UpstreamAddress;
use super::tls::is_about_certificates;
use crate::proxy::metrics::UpstreamErrorLabel;

#[derive(Debug, thiserror::Error)]
pub(crate) enum UpstreamError {
    #[error("cannot resolve the name of {address}")]
    Resolve { address: UpstreamAddress, source: Box<dyn Error + Send + Sync> },
    #[error("cannot connect to {address}")]
    Connect { address: UpstreamAddress, source: Box<dyn Error + Send + Sync> },
    #[error("no connection to {address} within {limit:?}")]
    ConnectTimeout { address: UpstreamAddress, limit: Duration },
    #[error("no slot for the request within {limit:?}: {bound}")]
    Busy { limit: Duration, bound: RequestBound },
    #[error("TLS handshake with {address} failed")]
    Tls { address: UpstreamAddress, source: Box<dyn Error + Send + Sync> },
    #[error("HTTP handshake with {address} failed")]
    Handshake { address: UpstreamAddress, source: hyper::Error },
    #[error("the connection to {address} broke before the response")]
    Broken { address: UpstreamAddress, source: hyper::Error },
    #[error("the response of {address} is not HTTP")]
    Garbled { address: UpstreamAddress, source: hyper::Error },
    #[error("{address} switched protocols without being asked")]
    Upgraded { address: UpstreamAddress },
    #[error("no response of {address} within {limit:?}")]
    AnswerTimeout { address: UpstreamAddress, limit: Duration },
}

impl UpstreamError {
    pub(crate) const fn label(&self) -> UpstreamErrorLabel {
        match self {
            Self::Resolve { .. } => UpstreamErrorLabel::Resolve,
            Self::Connect { .. } => UpstreamErrorLabel::Connect,
            Self::ConnectTimeout { .. } => UpstreamErrorLabel::ConnectTimeout,
            Self::Busy { .. } => UpstreamErrorLabel::Busy,
            Self::Tls { .. } => UpstreamErrorLabel::Tls,
            Self::Handshake { .. } => UpstreamErrorLabel::Handshake,
            Self::Broken { .. } => UpstreamErrorLabel::Broken,
            Self::Garbled { .. } => UpstreamErrorLabel::Garbled,
            Self::Upgraded { .. } => UpstreamErrorLabel::Upgraded,
            Self::AnswerTimeout { .. } => UpstreamErrorLabel::AnswerTimeout,
        }
    }

    /// Returns whether other certificates or another key could have prevented it. The server has
    /// then not handled the request: in TLS 1.3 a client learns only after its first request that
    /// its certificate is refused.
    pub(super) fn is_about_certificates(&self) -> bool {
        tls_error(self).is_some_and(is_about_certificates)
    }
}

/// Returns whether a connection ended because the server acknowledged nothing
/// (`TCP_USER_TIMEOUT`).
pub(super) fn is_silence(error: &hyper::Error) -> bool {
    let mut cause: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<io::Error>() {
            return error.kind() == io::ErrorKind::TimedOut;
        }
        cause = error.source();
    }
    false
}

/// Returns whether a connection ended because the server sent bytes that answer no request.
pub(super) fn is_unsolicited(error: &hyper::Error) -> bool {
    // hyper has no predicate for it. A test would fail if the words changed.
    const TEXT: &str = "received unexpected message from connection";
    let mut cause: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if error.is::<hyper::Error>() && error.to_string().starts_with(TEXT) {
            return true;
        }
        cause = error.source();
    }
    false
}

/// Finds the TLS library's own error among the causes.
pub(super) fn tls_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        // `io::Error::source` skips the error that it wraps.
        let wrapped = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        cause = wrapped.map(|error| error as &(dyn Error + 'static)).or_else(|| error.source());
    }
    None
}
