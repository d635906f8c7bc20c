//! Certificates of Keystone and Neutron.

use super::*;

/// CA that issues certificates for `localhost`.
struct TestCa(rcgen::CertifiedIssuer<'static, rcgen::KeyPair>);

impl TestCa {
    fn new() -> Self {
        let mut params = rcgen::CertificateParams::new(Vec::<String>::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        Self(rcgen::CertifiedIssuer::self_signed(params, rcgen::KeyPair::generate().unwrap()).unwrap())
    }

    /// Returns a server whose certificate is valid until the end of this year.
    fn server(&self, year: i32) -> Arc<rustls::ServerConfig> {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.not_before = rcgen::date_time_ymd(2019, 1, 1);
        params.not_after = rcgen::date_time_ymd(year, 12, 31);
        let certificate = params.signed_by(&key, &self.0).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let key = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)
            .unwrap();
        Arc::new(config)
    }

    /// Writes the certificate of the CA to a file.
    fn file(&self, folder: &std::path::Path) -> std::path::PathBuf {
        let file = folder.join("ca.pem");
        std::fs::write(&file, self.0.pem()).unwrap();
        file
    }
}

const PAST: i32 = 2020;
const FUTURE: i32 = 4000;

#[tokio::test]
async fn an_expired_certificate_blocks_new_requests_until_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let ca = TestCa::new();
    let (good, expired) = (ca.server(FUTURE), ca.server(PAST));
    let cloud = Cloud::start_tls(Arc::clone(&good)).await;
    cloud.set(|state| state.ports = vec![guests_port(1)]);
    let access =
        NeutronAccess { ca_certificates: Some(ca.file(folder.path())), insecure: false, ..cloud.access() };
    let mut source = NeutronHarness::with_access(cloud, access);
    source.show([interface(1)]);
    assert_eq!(source.next().await, reported(1));
    source.recovered().await;

    source.cloud.set(|state| {
        state.tls = Some(expired);
        state.ports = vec![guests_port(1), guests_port(2)];
    });
    source.show([interface(1), interface(2)]);
    source.fault("invalid peer certificate: Expired").await;
    let errors = source.state.borrow().faults.clone();
    assert!(
        errors.values().all(|fault| !fault.contains("verified at")),
        "the errors of all attempts are equal: {errors:?}"
    );
    assert!(source.events.try_recv().is_err(), "ports stay valid, and nothing new is sent");

    source.cloud.set(|state| state.tls = Some(good));
    assert_eq!(source.next().await, reported(2));
    source.recovered().await;
    source.stop().await;
}

#[tokio::test]
async fn an_expired_certificate_is_reported() {
    let folder = tempfile::tempdir().unwrap();
    let ca = TestCa::new();
    let file = ca.file(folder.path());
    let cloud = Cloud::start_tls(ca.server(PAST)).await;
    let access = NeutronAccess { ca_certificates: Some(file.clone()), insecure: false, ..cloud.access() };
    let mut settings = NeutronSettings { access, host: HOST.to_owned(), tasks: TaskTracker::new() };
    let error = probe(&settings).await.unwrap_err().to_string();
    assert!(error.contains("certificate") && error.contains("xpired"), "{error}");
    std::fs::write(&file, "").unwrap();
    let error = probe(&settings).await.unwrap_err().to_string();
    assert!(error.contains("no certificate in"), "{error}");
    settings.access.ca_certificates = Some("/nowhere".into());
    let error = probe(&settings).await.unwrap_err().to_string();
    assert!(error.contains("/nowhere"), "{error}");
}
