//! Reasons why the metadata API gave no response.

use std::error::Error;
use std::io;
use std::time::Duration;

use super::address::UpstreamAddress;

#[derive(Debug, thiserror::Error)]
pub(crate) enum UpstreamError {
    #[error("cannot resolve the name of {address}")]
    Resolve { address: UpstreamAddress, source: Box<dyn Error + Send + Sync> },
    #[error("cannot connect to {address}")]
    Connect { address: UpstreamAddress, source: Box<dyn Error + Send + Sync> },
    #[error("no connection to {address} within {limit:?}")]
    ConnectTimeout { address: UpstreamAddress, limit: Duration },
    #[error("the limit of concurrent requests was reached for {limit:?}")]
    Busy { limit: Duration },
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
    pub(crate) const fn label(&self) -> &'static str {
        match self {
            Self::Resolve { .. } => "resolve",
            Self::Connect { .. } => "connect",
            Self::ConnectTimeout { .. } => "connect_timeout",
            Self::Busy { .. } => "busy",
            Self::Tls { .. } => "tls",
            Self::Handshake { .. } => "handshake",
            Self::Broken { .. } => "broken",
            Self::Garbled { .. } => "garbled",
            Self::Upgraded { .. } => "upgraded",
            Self::AnswerTimeout { .. } => "answer_timeout",
        }
    }

    /// Classifies the connector's boxed error. Only the chain of its sources shows what failed.
    pub(super) fn from_connector(
        address: UpstreamAddress,
        limit: Duration,
        source: Box<dyn Error + Send + Sync>,
    ) -> Self {
        let mut cause: Option<&(dyn Error + 'static)> = Some(&*source);
        let mut has_errno = false;
        while let Some(error) = cause {
            if error.is::<rustls::Error>() {
                return Self::Tls { address, source };
            }
            cause = error.source();
            if let Some(error) = error.downcast_ref::<io::Error>() {
                if error.kind() == io::ErrorKind::TimedOut {
                    return Self::ConnectTimeout { address, limit };
                }
                // A name that is not found carries no errno.
                has_errno |= error.raw_os_error().is_some();
                // `io::Error::source` skips the error that it wraps.
                if let Some(inner) = error.get_ref() {
                    cause = Some(inner);
                }
            }
        }
        if has_errno {
            Self::Connect { address, source }
        } else if is_tls_eof(&*source) {
            Self::Tls { address, source }
        } else {
            Self::Resolve { address, source }
        }
    }
}

/// Recognises a server that closes during the handshake: the TLS layer reports an I/O error without
/// an errno and without an error of rustls.
fn is_tls_eof(error: &(dyn Error + 'static)) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::UnexpectedEof)
}
