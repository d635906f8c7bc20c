//! Verification of servers' certificates.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, DigitallySignedStruct, RootCertStore, SignatureScheme};
use x509_parser::parse_x509_certificate;
use x509_parser::time::ASN1Time;

/// Verifies servers by a policy. Signatures are verified under every policy.
#[derive(Debug)]
pub(crate) struct Verifier {
    pub(crate) policy: Policy,
    /// The certificates of the file of CAs.
    pub(crate) listed: Vec<CertificateDer<'static>>,
    pub(crate) algorithms: WebPkiSupportedAlgorithms,
}

#[derive(Debug)]
pub(crate) enum Policy {
    Named(Arc<WebPkiServerVerifier>),
    AnyName(RootCertStore),
    Unverified,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        match &self.policy {
            Policy::Named(_) | Policy::AnyName(_) if self.listed.contains(end_entity) => {
                self.verify_listed(end_entity, server_name, now)
            }
            Policy::Named(verifier) => verifier
                .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
                .map_err(without_time),
            Policy::AnyName(roots) => {
                let certificate = ParsedCertificate::try_from(end_entity)?;
                verify_server_cert_signed_by_trust_anchor(
                    &certificate,
                    roots,
                    intermediates,
                    now,
                    self.algorithms.all,
                )
                .map_err(without_time)?;
                Ok(ServerCertVerified::assertion())
            }
            Policy::Unverified => Ok(ServerCertVerified::assertion()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, certificate, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl Verifier {
    /// Verifies a certificate that the file lists itself, which needs no signature of a CA. OpenSSL
    /// accepts such a certificate too. webpki does not if the certificate is one of a CA, as
    /// `openssl req -x509` makes it.
    fn verify_listed(
        &self,
        certificate: &CertificateDer<'_>,
        server_name: &ServerName<'_>,
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if matches!(self.policy, Policy::Named(_)) {
            verify_server_name(&ParsedCertificate::try_from(certificate)?, server_name)?;
        }
        let unreadable = |_| rustls::Error::from(CertificateError::BadEncoding);
        let (_, parsed) = parse_x509_certificate(certificate).map_err(unreadable)?;
        let now = i64::try_from(now.as_secs()).ok().and_then(|now| ASN1Time::from_timestamp(now).ok());
        let now = now.ok_or(CertificateError::Expired)?;
        if now < parsed.validity().not_before {
            return Err(CertificateError::NotValidYet.into());
        }
        if now > parsed.validity().not_after {
            return Err(CertificateError::Expired.into());
        }
        Ok(ServerCertVerified::assertion())
    }
}

/// Removes the present time from an error, so that the errors of repeated attempts are equal.
fn without_time(error: rustls::Error) -> rustls::Error {
    let rustls::Error::InvalidCertificate(reason) = &error else { return error };
    if matches!(reason, CertificateError::ExpiredContext { .. }) {
        CertificateError::Expired.into()
    } else if matches!(reason, CertificateError::NotValidYetContext { .. }) {
        CertificateError::NotValidYet.into()
    } else {
        error
    }
}
