//! Checks that a metadata API answers, by the one page that needs no authentication (the list of
//! versions at `/`), and that it accepts the shared secret.
//!
//! The probe uses the names, certificates and time-outs of guests' requests.

use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Limited};
use hyper::body::Bytes;
use hyper::header::HeaderMap;
use hyper::http::uri::PathAndQuery;
use hyper::{Method, StatusCode};
use rustls::CertificateError;
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

use super::access::UpstreamAccess;
use super::error::tls_error;
use super::tls::refuses_client_certificate;
use super::{Upstream, UpstreamConfig, UpstreamError, UpstreamRequest, UpstreamSetupError};
use crate::error_chain::innermost_cause;
use crate::ids::InstanceId;
use crate::proxy::client::{SecretStatus, Signatures, SignedIdentity};
use crate::proxy::metrics::Metrics;
use crate::proxy::request::AuthHeaders;

/// The list has a few hundred bytes.
const MAX_LIST: usize = 64 * 1024;

/// The reason why a probe got no list of versions.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    #[error(transparent)]
    Setup(#[from] UpstreamSetupError),
    #[error("its address cannot be found ({0})")]
    Resolve(String),
    #[error("cannot connect ({0})")]
    Connect(String),
    #[error("does not answer within {0:?}")]
    Silent(Duration),
    #[error("no TLS ({text})")]
    Tls {
        kind: TlsErrorKind,
        /// The TLS library's own message.
        text: String,
    },
    #[error("does not answer in HTTP ({0})")]
    NotHttp(String),
    /// The server is not Nova's metadata API.
    #[error("answers {0} and no list of versions")]
    NotNova(StatusCode),
}

/// The reason why a TLS handshake failed, as far as an option can fix it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsErrorKind {
    /// The server does not use TLS.
    NotTls,
    /// The server's certificate is signed by an unknown authority.
    UnknownAuthority,
    /// The server's certificate is for other names.
    OtherName,
    /// The server's certificate has expired or is not yet valid.
    OutOfDate,
    /// The server's certificate has a form that OpenSSL may accept and this agent does not.
    Form,
    /// The server requires a client certificate, or refused ours.
    ClientCertificate,
    Other,
}

/// Requests the list of versions from the first endpoint of `config`.
///
/// # Errors
/// [`ProbeError`] if the response is not a list of versions.
pub async fn probe(config: UpstreamConfig, access: UpstreamAccess) -> Result<(), ProbeError> {
    let limit = config.answer_timeout;
    let upstream = upstream(config, access)?;
    let mut request = get("/");
    let response = upstream.send(&mut request, AuthHeaders::None).await.map_err(probe_error)?;
    let status = response.head.status;
    let list = timeout(limit, Limited::new(response.body, MAX_LIST).collect());
    let list = list.await.map_err(|_| ProbeError::Silent(limit))?;
    let list = list.map_err(|error| ProbeError::NotHttp(innermost_cause(&*error)))?.to_bytes();
    let is_list = list.split(|byte| *byte == b'\n').any(|line| line == b"latest");
    if status == StatusCode::OK && is_list { Ok(()) } else { Err(ProbeError::NotNova(status)) }
}

/// Asks the first endpoint of `config` for an instance that does not exist. Sends its signatures in
/// turn until one is not refused, and returns the last status.
///
/// Nova verifies the signature before it looks for the instance (nova/api/metadata/handler.py), so
/// it answers 403 for a wrong secret and 404 for the right one.
///
/// # Errors
/// [`ProbeError`] if there is no response.
pub async fn probe_secrets(
    config: UpstreamConfig,
    access: UpstreamAccess,
    sign: impl FnOnce(&InstanceId) -> Signatures,
) -> Result<StatusCode, ProbeError> {
    let upstream = upstream(config, access)?;
    let identity = SignedIdentity::of_no_instance(sign);
    let signatures = identity.signatures();
    let (first, signature) = signatures.first(&SecretStatus::default());
    let all = std::iter::once(signature).chain(signatures.others(first).map(|(_, other)| other));
    let mut status = StatusCode::FORBIDDEN;
    for signature in all {
        let mut request = get("/latest/meta-data/");
        let response = upstream.send(&mut request, AuthHeaders::Signed(&identity, signature)).await;
        status = response.map_err(probe_error)?.head.status;
        if status != StatusCode::FORBIDDEN {
            break;
        }
    }
    Ok(status)
}

fn upstream(config: UpstreamConfig, access: UpstreamAccess) -> Result<Upstream, UpstreamSetupError> {
    Upstream::new(config, access, Arc::new(Metrics::default()), TaskTracker::new())
}

/// Returns a request on behalf of no guest.
fn get(path: &'static str) -> UpstreamRequest<'static> {
    UpstreamRequest {
        has_large_buffers: false,
        method: Method::GET,
        path: PathAndQuery::from_static(path),
        body: Bytes::new(),
        content_type: None,
        forwarded_for: None,
        share: None,
        spare_headers: HeaderMap::new(),
    }
}

/// Keeps the innermost cause. The outer ones only repeat the configuration.
fn probe_error(error: UpstreamError) -> ProbeError {
    // A server that requires a client certificate says so only after the handshake, instead of a
    // response.
    if let Some(error) = tls_error(&error) {
        return ProbeError::Tls { kind: tls_error_kind(error), text: error.to_string() };
    }
    match error {
        UpstreamError::Resolve { source, .. } => ProbeError::Resolve(innermost_cause(&*source)),
        UpstreamError::Connect { source, .. } => ProbeError::Connect(innermost_cause(&*source)),
        UpstreamError::ConnectTimeout { limit, .. }
        | UpstreamError::AnswerTimeout { limit, .. }
        | UpstreamError::Busy { limit, .. } => ProbeError::Silent(limit),
        UpstreamError::Tls { source, .. } => {
            ProbeError::Tls { kind: TlsErrorKind::NotTls, text: innermost_cause(&*source) }
        }
        UpstreamError::Handshake { source, .. }
        | UpstreamError::Broken { source, .. }
        | UpstreamError::Garbled { source, .. } => ProbeError::NotHttp(innermost_cause(&source)),
        UpstreamError::Upgraded { .. } => ProbeError::NotNova(StatusCode::SWITCHING_PROTOCOLS),
    }
}

#[expect(clippy::wildcard_enum_match_arm, reason = "other errors are shown in the library's own words")]
fn tls_error_kind(error: &rustls::Error) -> TlsErrorKind {
    match error {
        rustls::Error::InvalidCertificate(certificate) => match certificate {
            // A bad signature means that the authority was replaced under its old name.
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
            // webpki's own errors, such as a CA's certificate in the place of a server's.
            CertificateError::Other(_) | CertificateError::BadEncoding => TlsErrorKind::Form,
            _ => TlsErrorKind::Other,
        },
        rustls::Error::InvalidMessage(_) => TlsErrorKind::NotTls,
        rustls::Error::AlertReceived(alert) if refuses_client_certificate(*alert) => {
            TlsErrorKind::ClientCertificate
        }
        _ => TlsErrorKind::Other,
    }
}
