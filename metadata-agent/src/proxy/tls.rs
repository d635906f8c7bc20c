//! TLS towards Nova: whom to believe and who we are. Files are read once, when the upstream is built.

use std::path::PathBuf;
use std::sync::Arc;

use hyper_rustls::ConfigBuilderExt;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

use crate::tls;
pub use crate::tls::{ClientIdentity, TlsSetupError};

/// How to speak TLS to Nova.
#[derive(Debug, Clone, Default)]
pub struct TlsConfig {
    /// Certificates of the authorities to believe (`auth_ca_cert`); without it, the host's.
    pub authorities: Option<PathBuf>,
    /// Our own certificate, if Nova asks for one.
    pub identity: Option<ClientIdentity>,
    /// Believe anybody (`nova_metadata_insecure`).
    pub insecure: bool,
}

/// Reads the files and makes the client's configuration.
pub(super) fn client_config(config: &TlsConfig) -> Result<ClientConfig, TlsSetupError> {
    let provider = tls::provider();
    let builder = tls::builder(&provider)?;
    let builder = if config.insecure {
        tracing::warn!("the certificate of Nova's metadata API is not verified (nova_metadata_insecure)");
        builder.dangerous().with_custom_certificate_verifier(Arc::new(Anybody(provider)))
    } else {
        match &config.authorities {
            Some(path) => builder.with_root_certificates(tls::authorities(path)?),
            None => {
                builder.with_native_roots().map_err(|source| TlsSetupError::HostAuthorities { source })?
            }
        }
    };
    tls::with_identity(builder, config.identity.as_ref())
}

/// Believes nobody and reads no file: for a Nova without TLS, on a host that may have no certificates at all.
pub(super) fn unused() -> Result<ClientConfig, TlsSetupError> {
    let builder = tls::builder(&tls::provider())?;
    Ok(builder.with_root_certificates(RootCertStore::empty()).with_no_client_auth())
}

/// Believes that anybody is Nova, but not that a broken signature is one.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
