//! rustls client configurations from PEM files: trusted CAs, and the client's own certificate.
//!
//! [`TlsMaterial`] holds the content of the files, so its user need not open them.

#![warn(unreachable_pub)]

mod verifier;

use std::fmt;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::{VerifierBuilderError, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, ConfigBuilder, RootCertStore, WantsVerifier};
use rustls_native_certs::CertificateResult;
use serde::{Deserialize, Serialize};

use verifier::{Policy, Verifier};

/// Largest accepted file. The bundle of a distribution has 250 KB.
const MAX_FILE_BYTES: u64 = 4 * 1024 * 1024;

/// The client's own certificate and key, in PEM.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
pub struct ClientCertificate {
    /// The certificate, followed by intermediate ones.
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// Error while setting up TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsSetupError {
    #[error("cannot read {}", path.display())]
    Pem { path: PathBuf, source: pem::Error },
    #[error("no certificate in {}", path.display())]
    NoCertificate { path: PathBuf },
    /// The file holds certificates, but none is usable as a CA.
    #[error("no usable certificate in {}", path.display())]
    Ca { path: PathBuf, source: rustls::Error },
    #[error("cannot read the host's certificate store")]
    SystemStore { source: rustls_native_certs::Error },
    #[error("no usable certificate in the host's certificate store")]
    EmptySystemStore,
    #[error("CA certificates are not usable")]
    Verifier { source: VerifierBuilderError },
    #[error("certificate {} and key {} are not usable together", certificate.display(), key.display())]
    Identity { certificate: PathBuf, key: PathBuf, source: rustls::Error },
    #[error("TLS provider supports no protocol version")]
    Versions { source: rustls::Error },
}

/// Servers that a client accepts.
#[derive(Clone, Copy, Debug)]
pub enum ServerTrust<'a> {
    /// Certificates for the server's name, signed by a CA in this file.
    Ca(&'a Path),
    /// Certificates for any name, signed by a CA in this file.
    AnyNameOfCa(&'a Path),
    /// Certificates for the server's name, signed by a CA of the host's store.
    SystemCa,
    /// Any certificate.
    Unverified,
}

/// Certificates and keys, as read from files. [`Self::client_config`] opens no file. Another
/// process can get them in a message.
#[derive(Debug, Clone, Deserialize, Serialize)]
pub struct TlsMaterial {
    trust: TrustMaterial,
    identity: Option<OwnCertificate>,
}

#[derive(Debug, Clone, Deserialize, Serialize)]
enum TrustMaterial {
    Ca(CaFile),
    AnyNameOfCa(CaFile),
    SystemCa(Vec<Der>),
    Unverified,
}

/// All certificates of a file, of which at least one is a usable CA.
#[derive(Debug, Clone, Deserialize, Serialize)]
struct CaFile(Vec<Der>);

#[derive(Clone, Deserialize, Serialize)]
struct OwnCertificate {
    /// For errors only.
    files: ClientCertificate,
    chain: Vec<Der>,
    key: PrivateKey,
}

/// A certificate in DER.
type Der = Vec<u8>;

/// A private key in DER, in one of the usual forms.
#[derive(Clone, Deserialize, Serialize)]
enum PrivateKey {
    Pkcs1(Vec<u8>),
    Sec1(Vec<u8>),
    Pkcs8(Vec<u8>),
}

/// Without the key.
impl fmt::Debug for OwnCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnCertificate").field("files", &self.files).finish_non_exhaustive()
    }
}

impl TlsMaterial {
    /// Reads all files.
    ///
    /// # Errors
    /// A file cannot be read or used.
    pub fn read(trust: ServerTrust<'_>, identity: Option<&ClientCertificate>) -> Result<Self, TlsSetupError> {
        let trust = match trust {
            ServerTrust::Ca(path) => TrustMaterial::Ca(CaFile::read(path)?),
            ServerTrust::AnyNameOfCa(path) => TrustMaterial::AnyNameOfCa(CaFile::read(path)?),
            ServerTrust::SystemCa => {
                let certificates = system_ca_certificates(rustls_native_certs::load_native_certs())?;
                TrustMaterial::SystemCa(certificates)
            }
            ServerTrust::Unverified => TrustMaterial::Unverified,
        };
        Ok(Self { trust, identity: identity.map(OwnCertificate::read).transpose()? })
    }

    /// Creates a client configuration, with the usual protocol versions.
    ///
    /// # Errors
    /// The CAs, or certificate and key together, are not usable.
    pub fn client_config(self) -> Result<ClientConfig, TlsSetupError> {
        let provider = provider();
        let builder = builder(&provider)?;
        let (policy, listed) = match self.trust {
            TrustMaterial::Ca(file) => (Policy::Named(named(file.roots(), &provider)?), file.listed()),
            TrustMaterial::AnyNameOfCa(file) => (Policy::AnyName(file.roots()), file.listed()),
            TrustMaterial::SystemCa(usable) => (Policy::Named(named(roots(usable), &provider)?), Vec::new()),
            TrustMaterial::Unverified => (Policy::Unverified, Vec::new()),
        };
        let algorithms = provider.signature_verification_algorithms;
        let verifier = Arc::new(Verifier { policy, listed, algorithms });
        let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
        let Some(OwnCertificate { files, chain, key }) = self.identity else {
            return Ok(builder.with_no_client_auth());
        };
        let ClientCertificate { certificate, key: key_file } = files;
        let chain = chain.into_iter().map(CertificateDer::from).collect();
        builder.with_client_auth_cert(chain, key.into()).map_err(|source| TlsSetupError::Identity {
            certificate,
            key: key_file,
            source,
        })
    }
}

impl CaFile {
    fn read(path: &Path) -> Result<Self, TlsSetupError> {
        let listed = certificates(path)?;
        check_cas(path, &listed)?;
        Ok(Self(listed.iter().map(|certificate| certificate.to_vec()).collect()))
    }

    fn listed(&self) -> Vec<CertificateDer<'static>> {
        self.0.iter().cloned().map(CertificateDer::from).collect()
    }

    /// Returns the usable CAs. Others are ignored.
    fn roots(&self) -> RootCertStore {
        roots(self.0.clone())
    }
}

impl OwnCertificate {
    fn read(files: &ClientCertificate) -> Result<Self, TlsSetupError> {
        let chain = certificates(&files.certificate)?;
        let key = read(&files.key)
            .map_err(pem::Error::Io)
            .and_then(|text| PrivateKeyDer::from_pem_slice(&text))
            .map_err(|source| TlsSetupError::Pem { path: files.key.clone(), source })?;
        let chain = chain.iter().map(|certificate| certificate.to_vec()).collect();
        Ok(Self { files: files.clone(), chain, key: PrivateKey::from(key) })
    }
}

impl From<PrivateKeyDer<'_>> for PrivateKey {
    fn from(key: PrivateKeyDer<'_>) -> Self {
        match key {
            PrivateKeyDer::Pkcs1(key) => Self::Pkcs1(key.secret_pkcs1_der().to_vec()),
            PrivateKeyDer::Sec1(key) => Self::Sec1(key.secret_sec1_der().to_vec()),
            PrivateKeyDer::Pkcs8(key) => Self::Pkcs8(key.secret_pkcs8_der().to_vec()),
            // rustls may learn of other forms.
            other => Self::Pkcs8(other.secret_der().to_vec()),
        }
    }
}

impl From<PrivateKey> for PrivateKeyDer<'static> {
    fn from(key: PrivateKey) -> Self {
        match key {
            PrivateKey::Pkcs1(key) => Self::Pkcs1(key.into()),
            PrivateKey::Sec1(key) => Self::Sec1(key.into()),
            PrivateKey::Pkcs8(key) => Self::Pkcs8(key.into()),
        }
    }
}

/// Creates a client configuration, with the usual protocol versions. Reads all files.
///
/// # Errors
/// A file cannot be read or used.
pub fn client_config(
    trust: ServerTrust<'_>,
    identity: Option<&ClientCertificate>,
) -> Result<ClientConfig, TlsSetupError> {
    TlsMaterial::read(trust, identity)?.client_config()
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn builder(
    provider: &Arc<CryptoProvider>,
) -> Result<ConfigBuilder<ClientConfig, WantsVerifier>, TlsSetupError> {
    ClientConfig::builder_with_provider(Arc::clone(provider))
        .with_safe_default_protocol_versions()
        .map_err(|source| TlsSetupError::Versions { source })
}

fn named(
    roots: RootCertStore,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<WebPkiServerVerifier>, TlsSetupError> {
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider)).build();
    verifier.map_err(|source| TlsSetupError::Verifier { source })
}

/// Returns the certificates of the host's store, of which at least one is usable.
fn system_ca_certificates(store: CertificateResult) -> Result<Vec<Der>, TlsSetupError> {
    let CertificateResult { certs, errors, .. } = store;
    for error in &errors {
        tracing::debug!(%error, "unusable certificate in the host's store");
    }
    let certificates: Vec<Der> = certs.iter().map(|certificate| certificate.to_vec()).collect();
    match errors.into_iter().next() {
        _ if !roots(certificates.clone()).is_empty() => Ok(certificates),
        Some(source) => Err(TlsSetupError::SystemStore { source }),
        None => Err(TlsSetupError::EmptySystemStore),
    }
}

/// Returns the usable CAs among certificates.
fn roots(certificates: Vec<Der>) -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(certificates.into_iter().map(CertificateDer::from));
    roots
}

/// Checks that a file has a usable CA.
fn check_cas(path: &Path, listed: &[CertificateDer<'static>]) -> Result<(), TlsSetupError> {
    let mut roots = RootCertStore::empty();
    let mut error = None;
    for certificate in listed {
        error = roots.add(certificate.clone()).err().or(error);
    }
    match error {
        Some(source) if roots.is_empty() => Err(TlsSetupError::Ca { path: path.to_owned(), source }),
        Some(_) | None => Ok(()),
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsSetupError> {
    let cannot_read = |source| TlsSetupError::Pem { path: path.to_owned(), source };
    let text = read(path).map_err(pem::Error::Io).map_err(cannot_read)?;
    let found = CertificateDer::pem_slice_iter(&text).collect::<Result<Vec<_>, _>>().map_err(cannot_read)?;
    if found.is_empty() {
        return Err(TlsSetupError::NoCertificate { path: path.to_owned() });
    }
    Ok(found)
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    File::open(path)?.take(MAX_FILE_BYTES + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "it is longer than 4 MiB"));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::error::Error;

    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, date_time_ymd};
    use rustls::client::danger::ServerCertVerifier;
    use rustls::pki_types::{ServerName, UnixTime};
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

    /// CA in a file, and a server certificate of it that is valid in 2024 and 2025.
    struct TestCa {
        ca: PathBuf,
        server: CertificateDer<'static>,
        folder: tempfile::TempDir,
    }

    impl TestCa {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
            let ca = folder.path().join("ca.pem");
            std::fs::write(&ca, issuer.pem()).unwrap();
            let mut params = CertificateParams::new(vec![SERVER.to_owned()]).unwrap();
            params.not_before = date_time_ymd(2024, 1, 1);
            params.not_after = date_time_ymd(2025, 12, 31);
            let server = params.signed_by(&KeyPair::generate().unwrap(), &issuer).unwrap();
            Self { ca, server: server.der().clone(), folder }
        }

        fn cas(&self) -> RootCertStore {
            CaFile::read(&self.ca).unwrap().roots()
        }

        fn store(&self) -> CertificateResult {
            load_certs_from_paths(Some(&self.ca), None)
        }

        /// Verifies the certificate at this time (seconds since 1970).
        fn verify(&self, policy: Policy, name: &'static str, seconds: u64) -> Result<(), String> {
            let algorithms = provider().signature_verification_algorithms;
            let verifier = Verifier { policy, listed: Vec::new(), algorithms };
            let now = UnixTime::since_unix_epoch(std::time::Duration::from_secs(seconds));
            let name = ServerName::try_from(name).unwrap();
            let verdict = verifier.verify_server_cert(&self.server, &[], &name, &[], now);
            verdict.map(drop).map_err(|error| error.to_string())
        }

        /// All policies that accept this CA, from a file and from the host's store.
        fn policies(&self) -> [Policy; 3] {
            let named = |roots| Policy::Named(named(roots, &provider()).unwrap());
            [
                named(self.cas()),
                named(roots(system_ca_certificates(self.store()).unwrap())),
                Policy::AnyName(self.cas()),
            ]
        }
    }

    #[test]
    fn an_expired_certificate_yields_the_same_error_each_time() {
        let ca = TestCa::new();
        let again = |attempts: [u64; 2], expected: &str| {
            for seconds in attempts {
                for policy in ca.policies() {
                    let error = ca.verify(policy, SERVER, seconds).unwrap_err();
                    assert_eq!(error, format!("invalid peer certificate: {expected}"));
                }
            }
        };
        again([LATE, LATE + DAY], "Expired");
        again([EARLY, EARLY + DAY], "NotValidYet");
        for policy in ca.policies() {
            assert_eq!(ca.verify(policy, SERVER, GOOD), Ok(()));
        }
    }

    #[test]
    fn a_file_beyond_its_limit_is_rejected() {
        let ca = TestCa::new();
        let mut text = std::fs::read_to_string(&ca.ca).unwrap();
        let limit = usize::try_from(MAX_FILE_BYTES).unwrap();
        text.push_str(&"#".repeat(limit - text.len()));
        std::fs::write(&ca.ca, &text).unwrap();
        assert_eq!(certificates(&ca.ca).unwrap().len(), 1);
        std::fs::write(&ca.ca, text + "#").unwrap();
        let error = certificates(&ca.ca).unwrap_err();
        assert!(error.source().unwrap().to_string().contains("longer than 4 MiB"), "{error:?}");
    }

    /// As `openssl req -x509` makes it: a CA for the server's name.
    #[test]
    fn a_listed_certificate_is_accepted_for_its_name_and_time() {
        let folder = tempfile::tempdir().unwrap();
        let self_signed = |file: &str| {
            let mut params = CertificateParams::new(vec![SERVER.to_owned()]).unwrap();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.not_before = date_time_ymd(2024, 1, 1);
            params.not_after = date_time_ymd(2025, 12, 31);
            let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
            let path = folder.path().join(file);
            std::fs::write(&path, certificate.pem()).unwrap();
            (path, certificate.der().clone())
        };
        let ((path, own), (_, stranger)) = (self_signed("own.pem"), self_signed("stranger.pem"));
        let listed = certificates(&path).unwrap();
        let named = || Policy::Named(named(CaFile::read(&path).unwrap().roots(), &provider()).unwrap());
        let any_name = || Policy::AnyName(CaFile::read(&path).unwrap().roots());
        for (policy, certificate, name, seconds, expected) in [
            (named(), &own, SERVER, GOOD, None),
            (named(), &own, "another", GOOD, Some("not valid for name")),
            (named(), &own, SERVER, LATE, Some("Expired")),
            (named(), &own, SERVER, EARLY, Some("NotValidYet")),
            (named(), &stranger, SERVER, GOOD, Some("invalid peer certificate")),
            (any_name(), &own, "another", GOOD, None),
            (any_name(), &own, "another", LATE, Some("Expired")),
            (any_name(), &stranger, SERVER, GOOD, Some("invalid peer certificate")),
        ] {
            let algorithms = provider().signature_verification_algorithms;
            let verifier = Verifier { policy, listed: listed.clone(), algorithms };
            let now = UnixTime::since_unix_epoch(std::time::Duration::from_secs(seconds));
            let name = ServerName::try_from(name).unwrap();
            let verdict = verifier.verify_server_cert(certificate, &[], &name, &[], now);
            match (verdict.map_err(|error| error.to_string()), expected) {
                (Ok(_), None) => {}
                (Err(error), Some(expected)) => assert!(error.contains(expected), "{error}"),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn the_hosts_cas_are_trusted_for_the_servers_name_only() {
        let ca = TestCa::new();
        let [_, host, _] = ca.policies();
        let error = ca.verify(host, "another", GOOD).unwrap_err();
        assert!(error.contains("not valid for name"), "{error}");
        let [_, host, _] = TestCa::new().policies();
        let error = ca.verify(host, SERVER, GOOD).unwrap_err();
        // Both CAs have the default name of rcgen.
        assert!(error.contains("BadSignature"), "{error}");
    }

    #[test]
    fn other_entries_of_the_hosts_store_are_ignored() {
        let ca = TestCa::new();
        let beside = |store: CertificateResult| {
            let mut mixed = load_certs_from_paths(Some(&ca.folder.path().join("missing.pem")), None);
            mixed.certs = store.certs;
            mixed.certs.push(CertificateDer::from_slice(b"no certificate"));
            mixed
        };
        assert_eq!(roots(system_ca_certificates(beside(ca.store())).unwrap()).len(), 1);
        let error = system_ca_certificates(beside(CertificateResult::default())).unwrap_err();
        assert!(error.to_string().contains("cannot read the host's"), "{error}");
        let cause = error.source().unwrap().to_string();
        assert!(cause.ends_with("missing.pem'"), "{cause}");
        let error = system_ca_certificates(CertificateResult::default()).unwrap_err();
        assert!(matches!(error, TlsSetupError::EmptySystemStore), "{error}");
    }
}
