//! TLS as Open vSwitch and OVN speak it: both sides have certificates of authorities of their own making.
//!
//! A server is believed if one of the authorities signed its certificate and the certificate is valid now. Its name is not
//! looked at: a certificate for OVSDB need not carry one that would match (ovs-pki(8) makes it for a word of the caller's
//! choice), and Open vSwitch's own clients do not look either (lib/stream-ssl.c). Whoever holds a certificate of that
//! authority can therefore pose as the server, and the authority should sign for nobody else.
//!
//! The files are read at each connection, so that new ones need no restart.

use std::net::{IpAddr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio::net::TcpStream;
use tokio::task::spawn_blocking;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::SessionError;
use crate::config::Host;
use crate::tls::{self, ClientIdentity, TlsSetupError};

/// Where our own certificate and those of the authorities are, PEM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsFiles {
    /// Our private key.
    pub private_key: Option<PathBuf>,
    /// Our certificate.
    pub certificate: Option<PathBuf>,
    /// Certificates of the authorities to believe.
    pub authorities: Option<PathBuf>,
}

/// Makes a connection a TLS one.
pub(super) async fn handshake(
    stream: TcpStream,
    host: &Host,
    files: &TlsFiles,
) -> Result<TlsStream<TcpStream>, SessionError> {
    let files = files.clone();
    let config = spawn_blocking(move || client_config(files)).await;
    let config = config.map_err(|lost| SessionError::Connect(lost.into()))??;
    let name = match host {
        Host::Address(address) => ServerName::from(*address),
        // What is no name for a certificate is not told to the server either.
        Host::Name(name) => ServerName::try_from(name.as_str().to_owned())
            .unwrap_or_else(|_| IpAddr::V6(Ipv6Addr::UNSPECIFIED).into()),
    };
    TlsConnector::from(Arc::new(config)).connect(name, stream).await.map_err(SessionError::Handshake)
}

fn client_config(files: TlsFiles) -> Result<ClientConfig, SessionError> {
    let TlsFiles { private_key, certificate, authorities } = files;
    let authorities = authorities.ok_or(SessionError::NoAuthorities)?;
    let identity = match (certificate, private_key) {
        (Some(certificate), Some(key)) => Some(ClientIdentity { certificate, key }),
        (None, None) => None,
        (Some(_), None) | (None, Some(_)) => return Err(SessionError::HalfIdentity),
    };
    config_of(&authorities, identity.as_ref()).map_err(SessionError::TlsSetup)
}

fn config_of(authorities: &Path, identity: Option<&ClientIdentity>) -> Result<ClientConfig, TlsSetupError> {
    let provider = tls::provider();
    let builder = tls::builder(&provider)?;
    let anybody_of = AnybodyOf { authorities: tls::authorities(authorities)?, provider };
    let builder = builder.dangerous().with_custom_certificate_verifier(Arc::new(anybody_of));
    tls::with_identity(builder, identity)
}

/// Believes whoever has a certificate of these authorities, whatever name is in it.
#[derive(Debug)]
struct AnybodyOf {
    authorities: RootCertStore,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for AnybodyOf {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let certificate = ParsedCertificate::try_from(end_entity)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(
            &certificate,
            &self.authorities,
            intermediates,
            now,
            algorithms,
        )
        .map_err(timeless)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Leaves out the present time, by which each attempt would look like another fault.
fn timeless(error: rustls::Error) -> rustls::Error {
    let rustls::Error::InvalidCertificate(fault) = &error else { return error };
    if matches!(fault, CertificateError::ExpiredContext { .. }) {
        CertificateError::Expired.into()
    } else if matches!(fault, CertificateError::NotValidYetContext { .. }) {
        CertificateError::NotValidYet.into()
    } else {
        error
    }
}
