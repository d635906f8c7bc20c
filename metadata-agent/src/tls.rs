//! What every client of TLS needs: protocol versions, certificates and keys from PEM files, and whom to believe.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;

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
use rustls_native_certs::CertificateResult;

/// Our own certificate and its key, in PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientCertificate {
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
        source: rustls_native_certs::Error,
    },
    /// The host's certificate store has no usable certificate.
    #[error("there is no usable certificate in the host's certificate store")]
    NoHostAuthority,
    /// The TLS library refused certificates that it has read.
    #[error("the authorities' certificates are not usable")]
    Verifier {
        /// Why.
        source: VerifierBuilderError,
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
    /// What it says, and what its causes add.
    pub(crate) fn with_causes(&self) -> String {
        let mut text = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            let more = error.to_string();
            if !text.contains(&more) {
                text = format!("{text}: {more}");
            }
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
        Trust::Authorities(path) => Whom::Named(named(authorities(path)?, &provider)?),
        Trust::HostAuthorities => {
            let store = rustls_native_certs::load_native_certs();
            Whom::Named(named(host_authorities(store)?, &provider)?)
        }
        Trust::AnybodyOf(path) => Whom::AnybodyOf(authorities(path)?),
        Trust::Anybody => Whom::Anybody,
    };
    let verifier = Verifier { whom, algorithms: provider.signature_verification_algorithms };
    Ok(builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier)))
}

fn named(
    authorities: RootCertStore,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<WebPkiServerVerifier>, TlsSetupError> {
    let verifier =
        WebPkiServerVerifier::builder_with_provider(Arc::new(authorities), Arc::clone(provider)).build();
    verifier.map_err(|source| TlsSetupError::Verifier { source })
}

/// Those of the host that are usable. What else is in its store is no fault as long as there are some.
fn host_authorities(store: CertificateResult) -> Result<RootCertStore, TlsSetupError> {
    let CertificateResult { certs, errors, .. } = store;
    for error in &errors {
        tracing::debug!("the host's certificate store: {error}");
    }
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(certs);
    match errors.into_iter().next() {
        _ if !roots.is_empty() => Ok(roots),
        Some(source) => Err(TlsSetupError::HostAuthorities { source }),
        None => Err(TlsSetupError::NoHostAuthority),
    }
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
    identity: Option<&ClientCertificate>,
) -> Result<ClientConfig, TlsSetupError> {
    let Some(ClientCertificate { certificate, key }) = identity else {
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

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, date_time_ymd};
    use rustls_native_certs::load_certs_from_paths;

    use super::*;

    const SERVER: &str = "server";
    const DAY: u64 = 24 * 60 * 60;
    /// 1 January 2020.
    const EARLY: u64 = 18_262 * DAY;
    /// 1 January 2025.
    const GOOD: u64 = 20_089 * DAY;
    /// 1 January 2030.
    const LATE: u64 = 21_915 * DAY;

    /// An authority in a file, and a server's certificate of it that is good in 2024 and 2025.
    struct Site {
        authority: PathBuf,
        server: CertificateDer<'static>,
        folder: tempfile::TempDir,
    }

    impl Site {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
            let authority = folder.path().join("ca.pem");
            std::fs::write(&authority, issuer.pem()).unwrap();
            let mut params = CertificateParams::new(vec![SERVER.to_owned()]).unwrap();
            params.not_before = date_time_ymd(2024, 1, 1);
            params.not_after = date_time_ymd(2025, 12, 31);
            let server = params.signed_by(&KeyPair::generate().unwrap(), &issuer).unwrap();
            Self { authority, server: server.der().clone(), folder }
        }

        fn store(&self) -> CertificateResult {
            load_certs_from_paths(Some(&self.authority), None)
        }

        /// What is said of the certificate at this time (seconds since 1970).
        fn said(&self, whom: Whom, name: &'static str, seconds: u64) -> Result<(), String> {
            let verifier = Verifier { whom, algorithms: provider().signature_verification_algorithms };
            let now = UnixTime::since_unix_epoch(std::time::Duration::from_secs(seconds));
            let name = ServerName::try_from(name).unwrap();
            let verdict = verifier.verify_server_cert(&self.server, &[], &name, &[], now);
            verdict.map(drop).map_err(|error| error.to_string())
        }

        /// Everybody who has a certificate of this authority, from a file and from the host's store.
        fn all_of_it(&self) -> [Whom; 3] {
            let named = |roots| Whom::Named(named(roots, &provider()).unwrap());
            [
                named(authorities(&self.authority).unwrap()),
                named(host_authorities(self.store()).unwrap()),
                Whom::AnybodyOf(authorities(&self.authority).unwrap()),
            ]
        }
    }

    #[test]
    fn a_certificate_out_of_date_is_told_alike_at_each_attempt_whoever_is_believed() {
        let site = Site::new();
        let again = |attempts: [u64; 2], expected: &str| {
            for seconds in attempts {
                for whom in site.all_of_it() {
                    let told = site.said(whom, SERVER, seconds).unwrap_err();
                    assert_eq!(told, format!("invalid peer certificate: {expected}"));
                }
            }
        };
        again([LATE, LATE + DAY], "Expired");
        again([EARLY, EARLY + DAY], "NotValidYet");
        for whom in site.all_of_it() {
            assert_eq!(site.said(whom, SERVER, GOOD), Ok(()));
        }
    }

    #[test]
    fn the_hosts_authorities_are_believed_for_the_servers_name_alone() {
        let site = Site::new();
        let [_, host, _] = site.all_of_it();
        let told = site.said(host, "another", GOOD).unwrap_err();
        assert!(told.contains("not valid for name"), "{told}");
        let [_, host, _] = Site::new().all_of_it();
        let told = site.said(host, SERVER, GOOD).unwrap_err();
        // Both authorities bear the name that rcgen gives.
        assert!(told.contains("BadSignature"), "{told}");
    }

    #[test]
    fn what_else_is_in_the_hosts_store_is_a_fault_only_if_no_certificate_is_usable() {
        let site = Site::new();
        let beside = |store: CertificateResult| {
            let mut mixed = load_certs_from_paths(Some(&site.folder.path().join("missing.pem")), None);
            mixed.certs = store.certs;
            mixed.certs.push(CertificateDer::from_slice(b"no certificate"));
            mixed
        };
        assert_eq!(host_authorities(beside(site.store())).unwrap().len(), 1);
        let fault = host_authorities(beside(CertificateResult::default())).unwrap_err().with_causes();
        assert!(fault.contains("cannot read the host's") && fault.ends_with("missing.pem'"), "{fault}");
        let fault = host_authorities(CertificateResult::default()).unwrap_err();
        assert!(matches!(fault, TlsSetupError::NoHostAuthority), "{fault}");
    }
}
