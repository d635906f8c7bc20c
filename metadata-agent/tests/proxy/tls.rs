//! Nova behind TLS: a private authority, the agent's certificate, and no verification.

use std::sync::Arc;

use metadata_agent::proxy::metrics::Metrics;
use metadata_agent::proxy::{
    ClientCertificate, Endpoint, ProxyConfig, Scheme, TlsConfig, Upstream, UpstreamConfig,
};
use tempfile::TempDir;
use tokio_util::task::TaskTracker;

use crate::rig::*;
use crate::tls_nova::{Authority, FUTURE, Files, PAST, TlsNova, tls_nova};

async fn ask(port: u16, tls: TlsConfig) -> (String, Agent) {
    let endpoint = Endpoint::new(Scheme::Https, "localhost", port).unwrap();
    let config = UpstreamConfig { tls, ..UpstreamConfig::new(vec![endpoint]) };
    let agent = Agent::with(ProxyConfig::default(), config, FakeDirectory::new(known())).await;
    (agent.ask(GET).await, agent)
}

#[tokio::test]
async fn nova_and_agent_verify_each_others_certificates() {
    let files = Files(TempDir::new().unwrap());
    let (authority, clients) = (Authority::new(), Authority::new());
    let authorities = Some(files.put("ca.pem", &authority.pem));
    let (certificate, key) = clients.issue("agent");
    let identity = Some(ClientCertificate {
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
async fn an_untrusted_certificate_fails_unless_insecure() {
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

#[tokio::test]
async fn an_expired_certificate_gives_503_until_renewed() {
    let files = Files(TempDir::new().unwrap());
    let authority = Authority::new();
    let good = authority.server("localhost", FUTURE, None);
    let mut nova = TlsNova::start(good.clone()).await;
    let endpoint = Endpoint::new(Scheme::Https, "localhost", nova.nova.port).unwrap();
    let tls = TlsConfig { authorities: Some(files.put("ca.pem", &authority.pem)), ..TlsConfig::default() };
    let upstream = UpstreamConfig { tls, ..UpstreamConfig::new(vec![endpoint]) };
    let agent = Agent::with(ProxyConfig::default(), upstream, FakeDirectory::new(known())).await;
    assert_status(&agent.ask(GET).await, 200);
    nova.nova.next().await;

    nova.renew(authority.server("localhost", PAST, None));
    for _ in 0..3 {
        let answer = agent.ask(GET).await;
        assert_status(&answer, 503);
        assert!(answer.contains("retry-after: 1\r\n"), "{answer}");
        assert!(answer.ends_with("\r\n\r\nThe metadata service is not available.\n"), "{answer}");
    }
    assert!(nova.nova.seen.try_recv().is_err(), "nothing is sent to a server that is not authenticated");
    agent.assert_counted("metadata_upstream_errors_total{error=\"tls\"} 3");

    nova.renew(good);
    assert_status(&agent.ask(GET).await, 200);
}

#[tokio::test]
async fn replaced_files_count_for_the_next_connection() {
    let files = Files(TempDir::new().unwrap());
    let [old, new, clients] = [Authority::new(), Authority::new(), Authority::new()];
    let put_identity = |issuer: &Authority| {
        let (certificate, key) = issuer.issue("agent");
        let certificate = files.put("agent.pem", &certificate.pem());
        ClientCertificate { certificate, key: files.put("agent.key", &key.serialize_pem()) }
    };
    let authorities = Some(files.put("ca.pem", &old.pem));
    let tls = TlsConfig { authorities, identity: Some(put_identity(&old)), insecure: false };
    let nova = TlsNova::start(old.server("localhost", FUTURE, None)).await;
    let endpoint = Endpoint::new(Scheme::Https, "localhost", nova.nova.port).unwrap();
    let upstream = UpstreamConfig { tls, ..UpstreamConfig::new(vec![endpoint]) };
    let agent = Agent::with(ProxyConfig::default(), upstream, FakeDirectory::new(known())).await;
    assert_status(&agent.ask(GET).await, 200);

    // Half a file, as while it is being written, changes nothing.
    files.put("ca.pem", "-----BEGIN CERTIFICATE-----\n");
    assert_status(&agent.ask(GET).await, 200);

    nova.renew(new.server("localhost", FUTURE, Some(&clients)));
    assert_status(&agent.ask(GET).await, 503);
    files.put("ca.pem", &new.pem);
    // Nova refuses the old certificate.
    assert_status(&agent.ask(GET).await, 502);
    put_identity(&clients);
    assert_status(&agent.ask(GET).await, 200);
}

#[test]
fn certificates_are_read_only_if_tls_is_used() {
    let metrics = Arc::new(Metrics::default());
    let missing = TlsConfig { authorities: Some("/nonexistent/ca.pem".into()), ..TlsConfig::default() };
    for (scheme, usable) in [(Scheme::Http, true), (Scheme::Https, false)] {
        let endpoint = Endpoint::new(scheme, "localhost", 8775).unwrap();
        let config = UpstreamConfig { tls: missing.clone(), ..UpstreamConfig::new(vec![endpoint]) };
        let upstream = Upstream::new(config, Arc::clone(&metrics), TaskTracker::new());
        assert_eq!(upstream.is_ok(), usable, "{scheme:?}");
    }
}
