//! A Nova that uses TLS with a replaceable certificate, and the authority that signs it.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, date_time_ymd};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::rig::{Act, Nova, OK, Stream};

/// A year in the past.
pub const PAST: i32 = 2020;
/// A year in the future.
pub const FUTURE: i32 = 4000;

pub struct Authority {
    pub pem: String,
    der: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        Self { pem: certificate.pem(), der: certificate.der().clone(), issuer: Issuer::new(params, key) }
    }

    /// Returns a server whose certificate, of a CA, is signed by this authority.
    pub fn server_with_ca(&self, name: &str) -> TlsAcceptor {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth();
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        Arc::new(builder.with_single_cert(vec![certificate.der().clone()], key).unwrap()).into()
    }

    pub fn issue(&self, name: &str) -> (rcgen::Certificate, KeyPair) {
        self.issue_until(name, FUTURE)
    }

    /// Issues a certificate that is valid until this year.
    fn issue_until(&self, name: &str, year: i32) -> (rcgen::Certificate, KeyPair) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.not_before = date_time_ymd(2019, 1, 1);
        params.not_after = date_time_ymd(year, 12, 31);
        (params.signed_by(&key, &self.issuer).unwrap(), key)
    }

    /// Returns a server with such a certificate. It accepts only client certificates of `clients`,
    /// if given.
    pub fn server(&self, name: &str, year: i32, clients: Option<&Self>) -> TlsAcceptor {
        let (certificate, key) = self.issue_until(name, year);
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .unwrap();
        let builder = match clients {
            None => builder.with_no_client_auth(),
            Some(clients) => {
                let mut roots = RootCertStore::empty();
                roots.add(clients.der.clone()).unwrap();
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap();
                builder.with_client_cert_verifier(verifier)
            }
        };
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        Arc::new(builder.with_single_cert(vec![certificate.der().clone()], key).unwrap()).into()
    }
}

impl Stream for TlsStream<TcpStream> {
    fn reset(self) {
        self.get_ref().0.set_zero_linger().unwrap();
    }
}

/// A Nova that closes after each response, so that each request needs a handshake.
pub struct TlsNova {
    pub nova: Nova,
    server: Arc<Mutex<TlsAcceptor>>,
}

impl TlsNova {
    pub async fn start(server: TlsAcceptor) -> Self {
        let server = Arc::new(Mutex::new(server));
        let own = Arc::clone(&server);
        let wrap = move |stream| {
            let accepted = own.lock().unwrap().accept(stream);
            async { accepted.await.ok() }
        };
        Self { nova: Nova::start_with(|_, _, _| Act::SayAndClose(OK.into()), wrap).await, server }
    }

    /// Replaces the server without an interruption.
    pub fn renew(&self, server: TlsAcceptor) {
        *self.server.lock().unwrap() = server;
    }
}

/// Starts a Nova with a fixed certificate, and returns its port.
pub async fn tls_nova(authority: &Authority, name: &str, clients: Option<&Authority>) -> u16 {
    TlsNova::start(authority.server(name, FUTURE, clients)).await.nova.port
}

pub struct Files(pub TempDir);

impl Files {
    pub fn put(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }
}
