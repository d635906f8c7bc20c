//! Asks one metadata API what it tells without authentication: the list of versions at `/`.
//!
//! On the way that guests' requests take, with the same names, certificates and deadlines. Whether the shared secret is
//! right shows only with an instance.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::header::{HOST, HeaderValue};
use hyper::{Request, StatusCode, Uri};
use prometheus_client::registry::Registry;
use rustls::{AlertDescription, CertificateError};
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

use super::upstream::{Question, Upstream, UpstreamConfig, UpstreamError, UpstreamSetupError};
use crate::proxy::metrics::Metrics;

/// The list has some hundred bytes.
const LONGEST_LIST: usize = 64 * 1024;

/// Why there is no list of versions.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The configuration does not do.
    #[error(transparent)]
    Setup(#[from] UpstreamSetupError),
    /// The name has no address.
    #[error("its address cannot be found ({0})")]
    Resolve(String),
    /// Nobody takes the connection.
    #[error("cannot connect ({0})")]
    Connect(String),
    /// Nobody answers.
    #[error("does not answer within {0:?}")]
    Silent(Duration),
    /// There is no TLS with it.
    #[error("no TLS ({text})")]
    Tls {
        /// What is wrong.
        fault: TlsErrorKind,
        /// In the words of the TLS library.
        text: String,
    },
    /// It does not speak HTTP.
    #[error("does not answer in HTTP ({0})")]
    NotHttp(String),
    /// It is something else.
    #[error("answers {0} and no list of versions")]
    NotNova(StatusCode),
}

/// Why there is no TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsErrorKind {
    /// The other side does not speak it.
    NotTls,
    /// Its certificate is signed by somebody unknown.
    UnknownAuthority,
    /// Its certificate is for other names.
    OtherName,
    /// Its certificate is not valid at this time.
    OutOfDate,
    /// It wants a certificate of ours, or another one.
    ClientCertificate,
    /// Anything else.
    Other,
}

/// Asks the first endpoint of `config` for its versions.
///
/// # Errors
/// [`ProbeError`], if they do not come.
pub async fn probe(config: UpstreamConfig) -> Result<(), ProbeError> {
    let limit = config.answer_timeout;
    let metrics = Arc::new(Metrics::register(&mut Registry::default()));
    let upstream = Upstream::new(config, metrics, TaskTracker::new())?;
    let reply = upstream.ask(&mut Versions).await.map_err(told)?;
    let status = reply.head.status;
    let list = timeout(limit, Limited::new(reply.body, LONGEST_LIST).collect());
    let list = list.await.map_err(|_| ProbeError::Silent(limit))?;
    let list = list.map_err(|error| ProbeError::NotHttp(text(&*error)))?.to_bytes();
    let is_list = list.split(|byte| *byte == b'\n').any(|line| line == b"latest");
    if status == StatusCode::OK && is_list { Ok(()) } else { Err(ProbeError::NotNova(status)) }
}

struct Versions;

impl Question for Versions {
    fn repeatable(&self) -> bool {
        true
    }

    fn ask(&mut self, host: &HeaderValue) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::default());
        *request.uri_mut() = Uri::from_static("/");
        request.headers_mut().insert(HOST, host.clone());
        request
    }
}

fn told(error: UpstreamError) -> ProbeError {
    // A server that wants a certificate says so only after the handshake, in place of an answer.
    if let Some(fault) = tls_error(&error) {
        return ProbeError::Tls { fault: kind(fault), text: fault.to_string() };
    }
    match error {
        UpstreamError::Resolve { source, .. } => ProbeError::Resolve(text(&*source)),
        UpstreamError::Connect { source, .. } => ProbeError::Connect(text(&*source)),
        UpstreamError::ConnectTimeout { limit, .. }
        | UpstreamError::AnswerTimeout { limit, .. }
        | UpstreamError::Busy { limit } => ProbeError::Silent(limit),
        UpstreamError::Tls { source, .. } => {
            ProbeError::Tls { fault: TlsErrorKind::NotTls, text: text(&*source) }
        }
        UpstreamError::Handshake { source, .. }
        | UpstreamError::Broken { source, .. }
        | UpstreamError::Garbled { source, .. } => ProbeError::NotHttp(text(&source)),
        UpstreamError::Upgraded { .. } => ProbeError::NotNova(StatusCode::SWITCHING_PROTOCOLS),
    }
}

#[expect(clippy::wildcard_enum_match_arm, reason = "what no option mends is told in the library's own words")]
fn kind(error: &rustls::Error) -> TlsErrorKind {
    match error {
        rustls::Error::InvalidCertificate(certificate) => match certificate {
            // A bad signature: an authority that was made anew under its old name.
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                TlsErrorKind::UnknownAuthority
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                TlsErrorKind::OtherName
            }
            CertificateError::Expired
            | CertificateError::ExpiredContext { .. }
            | CertificateError::NotValidYet
            | CertificateError::NotValidYetContext { .. } => TlsErrorKind::OutOfDate,
            _ => TlsErrorKind::Other,
        },
        rustls::Error::InvalidMessage(_) => TlsErrorKind::NotTls,
        rustls::Error::AlertReceived(
            AlertDescription::CertificateRequired
            | AlertDescription::BadCertificate
            | AlertDescription::UnknownCA
            | AlertDescription::CertificateUnknown
            | AlertDescription::CertificateExpired
            | AlertDescription::DecryptError
            | AlertDescription::HandshakeFailure,
        ) => TlsErrorKind::ClientCertificate,
        _ => TlsErrorKind::Other,
    }
}

/// The TLS library's own error, wherever it is among the causes.
fn tls_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        // `io::Error::source` skips the error it wraps.
        let wrapped = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        cause = wrapped.map(|error| error as &(dyn Error + 'static)).or_else(|| error.source());
    }
    None
}

/// The innermost cause: what the outer ones say, the configuration says as well.
fn text(error: &(dyn Error + 'static)) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}
