//! TLS towards Nova: whom to believe and who we are. Files are read once, when the upstream is built.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hyper_rustls::ConfigBuilderExt;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{
    ClientConfig, ConfigBuilder, DigitallySignedStruct, RootCertStore, SignatureScheme, WantsVerifier,
};

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

/// Our own certificate and its key, in PEM.
#[derive(Debug, Clone)]
pub struct ClientIdentity {
    /// `nova_client_cert`.
    pub certificate: PathBuf,
    /// `nova_client_priv_key`.
    pub key: PathBuf,
}

/// Why TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsSetupError {
    /// A PEM file cannot be read.
    #[error("cannot read {}", path.display())]
    Pem {
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: pem::Error,
    },
    /// A PEM file holds no certificate.
    #[error("there is no certificate in {}", path.display())]
    NoCertificate {
        /// Which file.
        path: PathBuf,
    },
    /// A certificate of an authority is not usable.
    #[error("a certificate in {} is not usable", path.display())]
    Authority {
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: rustls::Error,
    },
    /// The host's certificate store cannot be read.
    #[error("cannot read the host's certificate store")]
    HostAuthorities {
        /// Why not.
        source: io::Error,
    },
    /// Certificate and key are not usable together.
    #[error("{} and {} are not usable together", certificate.display(), key.display())]
    Identity {
        /// The certificate.
        certificate: PathBuf,
        /// The key.
        key: PathBuf,
        /// Why not.
        source: rustls::Error,
    },
    /// The TLS library refused its own defaults.
    #[error("the TLS provider supports no protocol version")]
    Versions {
        /// Why.
        source: rustls::Error,
    },
}

/// Reads the files and makes the client's configuration.
pub(super) fn client_config(config: &TlsConfig) -> Result<ClientConfig, TlsSetupError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = builder(&provider)?;
    let builder = if config.insecure {
        tracing::warn!("the certificate of Nova's metadata API is not verified (nova_metadata_insecure)");
        builder.dangerous().with_custom_certificate_verifier(Arc::new(Anybody(provider)))
    } else {
        match &config.authorities {
            Some(path) => builder.with_root_certificates(authorities(path)?),
            None => {
                builder.with_native_roots().map_err(|source| TlsSetupError::HostAuthorities { source })?
            }
        }
    };
    match &config.identity {
        None => Ok(builder.with_no_client_auth()),
        Some(ClientIdentity { certificate, key }) => {
            let chain = certificates(certificate)?;
            let private = PrivateKeyDer::from_pem_file(key)
                .map_err(|source| TlsSetupError::Pem { path: key.clone(), source })?;
            builder.with_client_auth_cert(chain, private).map_err(|source| TlsSetupError::Identity {
                certificate: certificate.clone(),
                key: key.clone(),
                source,
            })
        }
    }
}

/// Believes nobody and reads no file: for a Nova without TLS, on a host that may have no certificates at all.
pub(super) fn unused() -> Result<ClientConfig, TlsSetupError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    Ok(builder(&provider)?.with_root_certificates(RootCertStore::empty()).with_no_client_auth())
}

fn builder(
    provider: &Arc<CryptoProvider>,
) -> Result<ConfigBuilder<ClientConfig, WantsVerifier>, TlsSetupError> {
    ClientConfig::builder_with_provider(Arc::clone(provider))
        .with_safe_default_protocol_versions()
        .map_err(|source| TlsSetupError::Versions { source })
}

fn authorities(path: &Path) -> Result<RootCertStore, TlsSetupError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots
            .add(certificate)
            .map_err(|source| TlsSetupError::Authority { path: path.to_owned(), source })?;
    }
    Ok(roots)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsSetupError> {
    let fault = |source| TlsSetupError::Pem { path: path.to_owned(), source };
    let found =
        CertificateDer::pem_file_iter(path).map_err(fault)?.collect::<Result<Vec<_>, _>>().map_err(fault)?;
    if found.is_empty() {
        return Err(TlsSetupError::NoCertificate { path: path.to_owned() });
    }
    Ok(found)
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
