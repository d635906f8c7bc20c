//! Nova behind TLS: our own authority, our own certificate, and believing anybody.

use std::path::PathBuf;
use std::sync::Arc;

use metadata_agent::metrics::Metrics;
use metadata_agent::proxy::{
    ClientIdentity, Endpoint, ProxyConfig, Scheme, TlsConfig, Upstream, UpstreamConfig,
};
use prometheus_client::registry::Registry;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_util::task::TaskTracker;

use crate::rig::*;

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

    pub fn issue(&self, name: &str) -> (rcgen::Certificate, KeyPair) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        (params.signed_by(&key, &self.issuer).unwrap(), key)
    }
}

/// A Nova that speaks TLS in a thread-free way: one request, one answer, close.
pub async fn tls_nova(authority: &Authority, name: &str, clients: Option<&Authority>) -> u16 {
    let (certificate, key) = authority.issue(name);
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
    let config = Arc::new(builder.with_single_cert(vec![certificate.der().clone()], key).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut tls = ServerConnection::new(Arc::clone(&config)).unwrap();
            tokio::spawn(async move {
                let mut request = Vec::new();
                let mut answered = false;
                loop {
                    let mut out = Vec::new();
                    while tls.wants_write() {
                        tls.write_tls(&mut out).unwrap();
                    }
                    if stream.write_all(&out).await.is_err() {
                        return;
                    }
                    if find(&request, b"\r\n\r\n").is_some() && !answered {
                        answered = true;
                        std::io::Write::write_all(&mut tls.writer(), OK.as_bytes()).unwrap();
                        continue;
                    }
                    let mut piece = [0; 4096];
                    let Ok(read @ 1..) = stream.read(&mut piece).await else { return };
                    let mut piece = &piece[..read];
                    while !piece.is_empty() {
                        tls.read_tls(&mut piece).unwrap();
                        let failed = tls.process_new_packets().is_err();
                        let _ = std::io::Read::read_to_end(&mut tls.reader(), &mut request);
                        if failed {
                            let mut alert = Vec::new();
                            let _ = tls.write_tls(&mut alert);
                            let _ = stream.write_all(&alert).await;
                            return;
                        }
                    }
                }
            });
        }
    });
    port
}

pub struct Files(pub TempDir);

impl Files {
    pub fn put(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }
}

async fn ask(port: u16, tls: TlsConfig) -> (String, Agent) {
    let endpoint = Endpoint::new(Scheme::Https, "localhost", port).unwrap();
    let config = UpstreamConfig { tls, ..UpstreamConfig::new(vec![endpoint]) };
    let agent = Agent::with(ProxyConfig::default(), config, Desk::with(known())).await;
    (agent.ask(GET).await, agent)
}

#[tokio::test]
async fn nova_is_believed_by_our_authority_and_believes_our_certificate() {
    let files = Files(TempDir::new().unwrap());
    let (authority, clients) = (Authority::new(), Authority::new());
    let authorities = Some(files.put("ca.pem", &authority.pem));
    let (certificate, key) = clients.issue("agent");
    let identity = Some(ClientIdentity {
        certificate: files.put("agent.pem", &certificate.pem()),
        key: files.put("agent.key", &key.serialize_pem()),
    });

    let open = tls_nova(&authority, "localhost", None).await;
    let closed = tls_nova(&authority, "localhost", Some(&clients)).await;
    let (answer, _) = ask(open, TlsConfig { authorities: authorities.clone(), ..TlsConfig::default() }).await;
    assert_status(&answer, 200);
    let (answer, _) =
        ask(closed, TlsConfig { authorities: authorities.clone(), identity, insecure: false }).await;
    assert_status(&answer, 200);
    // In TLS 1.3 a client learns that its certificate is missing only after its first request.
    let (answer, _) = ask(closed, TlsConfig { authorities, ..TlsConfig::default() }).await;
    assert_status(&answer, 502);
}

#[tokio::test]
async fn a_stranger_is_not_nova_unless_anybody_is() {
    let files = Files(TempDir::new().unwrap());
    let (authority, stranger) = (Authority::new(), Authority::new());
    let authorities = Some(files.put("ca.pem", &authority.pem));
    for port in
        [tls_nova(&stranger, "localhost", None).await, tls_nova(&authority, "other.example", None).await]
    {
        let (answer, agent) =
            ask(port, TlsConfig { authorities: authorities.clone(), ..TlsConfig::default() }).await;
        assert_status(&answer, 503);
        agent.assert_counted("metadata_upstream_errors_total{error=\"tls\"} 1");
        let insecure = TlsConfig { authorities: authorities.clone(), insecure: true, identity: None };
        assert_status(&ask(port, insecure).await.0, 200);
    }
}

#[test]
fn certificates_are_read_only_where_tls_is_spoken() {
    let metrics = Arc::new(Metrics::register(&mut Registry::default()));
    let missing = TlsConfig { authorities: Some("/nonexistent/ca.pem".into()), ..TlsConfig::default() };
    for (scheme, usable) in [(Scheme::Http, true), (Scheme::Https, false)] {
        let endpoint = Endpoint::new(scheme, "localhost", 8775).unwrap();
        let config = UpstreamConfig { tls: missing.clone(), ..UpstreamConfig::new(vec![endpoint]) };
        let upstream = Upstream::new(config, Arc::clone(&metrics), TaskTracker::new());
        assert_eq!(upstream.is_ok(), usable, "{scheme:?}");
    }
}
