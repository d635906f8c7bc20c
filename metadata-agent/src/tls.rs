//! What every client of TLS needs: protocol versions, certificates and keys from PEM files, and whom to believe.

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hyper_rustls::ConfigBuilderExt;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{
    VerifierBuilderError, WantsClientCert, WebPkiServerVerifier, verify_server_cert_signed_by_trust_anchor,
};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{
    CertificateError, ClientConfig, ConfigBuilder, DigitallySignedStruct, RootCertStore, SignatureScheme,
    WantsVerifier,
};

/// Our own certificate and its key, in PEM.
#[derive(Debug, Clone)]
pub struct ClientIdentity {
    /// The certificate, and those between it and an authority's.
    pub certificate: PathBuf,
    /// Its private key.
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
    /// No certificate of an authority is usable.
    #[error("there is no usable certificate in {}", path.display())]
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

impl TlsSetupError {
    /// What it says, and what its cause adds.
    pub(crate) fn with_causes(&self) -> String {
        let mut text = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        text
    }
}

/// The cryptography.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// A client of the usual protocol versions.
pub(crate) fn builder(
    provider: &Arc<CryptoProvider>,
) -> Result<ConfigBuilder<ClientConfig, WantsVerifier>, TlsSetupError> {
    ClientConfig::builder_with_provider(Arc::clone(provider))
        .with_safe_default_protocol_versions()
        .map_err(|source| TlsSetupError::Versions { source })
}

/// Whom to believe to be a server.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Trust<'a> {
    /// Whoever has a certificate of one of the authorities in this file, for its name.
    Authorities(&'a Path),
    /// The same, whatever name is in it.
    AnybodyOf(&'a Path),
    /// The same with the host's authorities.
    HostAuthorities,
    /// Anybody.
    Anybody,
}

/// A client that believes these.
pub(crate) fn believing(
    trust: Trust<'_>,
) -> Result<ConfigBuilder<ClientConfig, WantsClientCert>, TlsSetupError> {
    let provider = provider();
    let builder = builder(&provider)?;
    let whom = match trust {
        Trust::Authorities(path) => Whom::Named(named(path, &provider)?),
        Trust::AnybodyOf(path) => Whom::AnybodyOf(authorities(path)?),
        Trust::Anybody => Whom::Anybody,
        Trust::HostAuthorities => {
            return builder.with_native_roots().map_err(|source| TlsSetupError::HostAuthorities { source });
        }
    };
    let verifier = Verifier { whom, algorithms: provider.signature_verification_algorithms };
    Ok(builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier)))
}

fn named(path: &Path, provider: &Arc<CryptoProvider>) -> Result<Arc<WebPkiServerVerifier>, TlsSetupError> {
    let authorities = Arc::new(authorities(path)?);
    let verifier = WebPkiServerVerifier::builder_with_provider(authorities, Arc::clone(provider)).build();
    let fault = |error: VerifierBuilderError| rustls::Error::General(error.to_string());
    verifier.map_err(|error| TlsSetupError::Authority { path: path.to_owned(), source: fault(error) })
}

/// Reads the certificates of authorities. Of a collection, some may be of a kind that is not usable here.
fn authorities(path: &Path) -> Result<RootCertStore, TlsSetupError> {
    let mut roots = RootCertStore::empty();
    let mut fault = None;
    for certificate in certificates(path)? {
        fault = roots.add(certificate).err().or(fault);
    }
    match fault {
        Some(source) if roots.is_empty() => Err(TlsSetupError::Authority { path: path.to_owned(), source }),
        Some(_) | None => Ok(roots),
    }
}

/// Reads our own certificate, if we have one.
pub(crate) fn with_identity(
    builder: ConfigBuilder<ClientConfig, WantsClientCert>,
    identity: Option<&ClientIdentity>,
) -> Result<ClientConfig, TlsSetupError> {
    let Some(ClientIdentity { certificate, key }) = identity else {
        return Ok(builder.with_no_client_auth());
    };
    let chain = certificates(certificate)?;
    let private = PrivateKeyDer::from_pem_file(key)
        .map_err(|source| TlsSetupError::Pem { path: key.clone(), source })?;
    builder.with_client_auth_cert(chain, private).map_err(|source| TlsSetupError::Identity {
        certificate: certificate.clone(),
        key: key.clone(),
        source,
    })
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

/// Who is believed to be the server. Whoever it is, a broken signature is none.
#[derive(Debug)]
struct Verifier {
    whom: Whom,
    algorithms: WebPkiSupportedAlgorithms,
}

#[derive(Debug)]
enum Whom {
    Named(Arc<WebPkiServerVerifier>),
    AnybodyOf(RootCertStore),
    Anybody,
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
        match &self.whom {
            Whom::Named(verifier) => verifier
                .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
                .map_err(timeless),
            Whom::AnybodyOf(authorities) => {
                let certificate = ParsedCertificate::try_from(end_entity)?;
                verify_server_cert_signed_by_trust_anchor(
                    &certificate,
                    authorities,
                    intermediates,
                    now,
                    self.algorithms.all,
                )
                .map_err(timeless)?;
                Ok(ServerCertVerified::assertion())
            }
            Whom::Anybody => Ok(ServerCertVerified::assertion()),
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
