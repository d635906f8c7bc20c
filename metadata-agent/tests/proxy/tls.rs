//! Nova behind TLS: a private authority, the agent's certificate, and no verification.

use std::sync::Arc;
use std::time::Duration;

use metadata_agent::nova_access::{self, ClientCertificate, NovaTls};
use metadata_agent::proxy::metrics::Metrics;
use metadata_agent::proxy::{Endpoint, ProxyConfig, Scheme, Upstream, UpstreamConfig, UpstreamSetupError};
use tempfile::TempDir;
use tokio_util::task::TaskTracker;

use crate::rig::*;
use crate::tls_nova::{Authority, FUTURE, Files, PAST, TlsNova, tls_nova};

async fn agent(port: u16, tls: NovaTls) -> Agent {
    let endpoint = Endpoint::new(Scheme::Https, "localhost", port).unwrap();
    let upstream = UpstreamConfig::new(vec![endpoint]);
    Agent::with_tls(ProxyConfig::default(), upstream, tls, FakeDirectory::new(known())).await
}

async fn ask(port: u16, tls: NovaTls) -> (String, Agent) {
    let agent = agent(port, tls).await;
    (agent.ask(GET).await, agent)
}

/// Writes a certificate and its key, in place of earlier ones.
fn put_identity(files: &Files, issuer: &Authority) -> ClientCertificate {
    let (certificate, key) = issuer.issue("agent");
    ClientCertificate {
        certificate: files.put("agent.pem", &certificate.pem()),
        key: files.put("agent.key", &key.serialize_pem()),
    }
}

#[tokio::test]
async fn nova_and_agent_verify_each_others_certificates() {
    let files = Files(TempDir::new().unwrap());
    let (authority, clients) = (Authority::new(), Authority::new());
    let authorities = Some(files.put("ca.pem", &authority.pem));
    let identity = Some(put_identity(&files, &clients));

    let open = tls_nova(&authority, "localhost", None).await;
    let closed = tls_nova(&authority, "localhost", Some(&clients)).await;
    let (answer, _) = ask(open, NovaTls { authorities: authorities.clone(), ..NovaTls::default() }).await;
    assert_status(&answer, 200);
    let (answer, _) =
        ask(closed, NovaTls { authorities: authorities.clone(), identity, insecure: false }).await;
    assert_status(&answer, 200);
    // In TLS 1.3 a client learns that its certificate is missing only after its first request.
    let (answer, _) = ask(closed, NovaTls { authorities, ..NovaTls::default() }).await;
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
            ask(port, NovaTls { authorities: authorities.clone(), ..NovaTls::default() }).await;
        assert_status(&answer, 503);
        agent.assert_counted("metadata_upstream_errors_total{error=\"tls\"} 1");
        let insecure = NovaTls { authorities: authorities.clone(), insecure: true, identity: None };
        assert_status(&ask(port, insecure).await.0, 200);
    }
}

#[tokio::test]
async fn an_expired_certificate_gives_503_until_renewed() {
    let files = Files(TempDir::new().unwrap());
    let authority = Authority::new();
    let good = authority.server("localhost", FUTURE, None);
    let mut nova = TlsNova::start(good.clone()).await;
    let tls = NovaTls { authorities: Some(files.put("ca.pem", &authority.pem)), ..NovaTls::default() };
    let agent = agent(nova.nova.port, tls).await;
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
    let authorities = Some(files.put("ca.pem", &old.pem));
    let tls = NovaTls { authorities, identity: Some(put_identity(&files, &old)), insecure: false };
    let mut nova = TlsNova::start(old.server("localhost", FUTURE, None)).await;
    let agent = agent(nova.nova.port, tls).await;
    assert_status(&agent.ask(GET).await, 200);

    // Half a file, as while it is being written, changes nothing.
    files.put("ca.pem", "-----BEGIN CERTIFICATE-----\n");
    assert_status(&agent.ask(GET).await, 200);

    nova.renew(new.server("localhost", FUTURE, Some(&clients)));
    assert_status(&agent.ask(GET).await, 503);
    files.put("ca.pem", &new.pem);
    // Nova refuses the old certificate.
    assert_status(&agent.ask(GET).await, 502);
    put_identity(&files, &clients);
    assert_status(&agent.ask(GET).await, 200);

    // So it is with a request that is not sent twice otherwise.
    let others = Authority::new();
    nova.renew(new.server("localhost", FUTURE, Some(&others)));
    put_identity(&files, &others);
    while nova.nova.seen.try_recv().is_ok() {}
    let post = "POST /openstack/2013-04-04/password HTTP/1.1\r\nHost: 169.254.169.254\r\n\
                Content-Length: 3\r\n\r\nabc";
    assert_status(&agent.ask(post).await, 200);
    assert!(nova.nova.next_text().await.ends_with("abc"));
    assert!(nova.nova.seen.try_recv().is_err(), "Nova handled it once");
}

#[tokio::test]
async fn a_faulty_replacement_keeps_the_old_files() {
    let files = Files(TempDir::new().unwrap());
    let [authority, clients, stranger] = [Authority::new(), Authority::new(), Authority::new()];
    let authorities = Some(files.put("ca.pem", &authority.pem));
    let tls = NovaTls { authorities, identity: Some(put_identity(&files, &clients)), insecure: false };
    let good = authority.server("localhost", FUTURE, Some(&clients));
    let nova = TlsNova::start(good.clone()).await;
    let agent = agent(nova.nova.port, tls).await;

    let (_, other_key) = clients.issue("agent");
    for (file, text) in [
        ("ca.pem", String::new()),
        ("ca.pem", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n".to_owned()),
        ("agent.pem", "no certificate".to_owned()),
        ("agent.key", other_key.serialize_pem()),
    ] {
        let former = std::fs::read_to_string(files.0.path().join(file)).unwrap();
        files.put(file, &text);
        // A refusal has the files checked before the answer.
        nova.renew(stranger.server("localhost", FUTURE, None));
        assert_status(&agent.ask(GET).await, 503);
        nova.renew(good.clone());
        assert_status(&agent.ask(GET).await, 200);
        files.put(file, &former);
    }
}

#[tokio::test]
async fn a_tls_file_that_hangs_delays_no_request() {
    let files = Files(TempDir::new().unwrap());
    let [authority, stranger] = [Authority::new(), Authority::new()];
    let ca = files.put("ca.pem", &authority.pem);
    let good = authority.server("localhost", FUTURE, None);
    let nova = TlsNova::start(good.clone()).await;
    let agent = agent(nova.nova.port, NovaTls { authorities: Some(ca.clone()), ..NovaTls::default() }).await;
    assert_status(&agent.ask(GET).await, 200);

    // Opening and reading a pipe waits for a writer.
    let pipe = files.0.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    std::fs::rename(&pipe, &ca).unwrap();
    let writer = soon("the agent opens the pipe", async {
        loop {
            // Fails while there is no reader.
            match tokio::net::unix::pipe::OpenOptions::new().open_sender(&ca) {
                Ok(writer) => break writer,
                Err(error) => assert_eq!(error.raw_os_error(), Some(nix::libc::ENXIO)),
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    assert_status(&agent.ask(GET).await, 200);
    // This one waits for the check in vain.
    nova.renew(stranger.server("localhost", FUTURE, None));
    assert_status(&agent.ask(GET).await, 503);
    nova.renew(good);
    assert_status(&agent.ask(GET).await, 200);

    // The stop does not wait for the file either.
    agent.cancel.cancel();
    agent.tracker.close();
    soon("the stop", agent.tracker.wait()).await;
    drop(writer);
}

#[test]
fn certificates_are_read_only_if_tls_is_used() {
    let missing = NovaTls { authorities: Some("/nonexistent/ca.pem".into()), ..NovaTls::default() };
    for (scheme, usable) in [(Scheme::Http, true), (Scheme::Https, false)] {
        let endpoint = Endpoint::new(scheme, "localhost", 8775).unwrap();
        let opened = nova_access::open(&UpstreamConfig::new(vec![endpoint]), missing.clone());
        assert_eq!(opened.is_ok(), usable, "{scheme:?}");
    }
}

#[test]
fn https_without_certificates_is_an_error() {
    let [http, https] = [Scheme::Http, Scheme::Https]
        .map(|scheme| UpstreamConfig::new(vec![Endpoint::new(scheme, "localhost", 8775).unwrap()]));
    let metrics = Arc::new(Metrics::default());
    let upstream = Upstream::new(https, access(&http), metrics, TaskTracker::new());
    assert!(matches!(upstream, Err(UpstreamSetupError::NoTls)));
}
