//! The log never has the shared secret, at any level, and shows why a request to Nova failed.
//!
//! A separate program: tracing caches per process whether there is a subscriber, so tests without
//! one would silence this one.
#![expect(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "test code outside test functions"
)]

#[expect(dead_code, reason = "one of its Novas and guests is enough here")]
#[path = "proxy/rig.rs"]
mod rig;
#[expect(dead_code, reason = "one Nova is enough here")]
#[path = "proxy/tls_nova.rs"]
mod tls_nova;

use std::io;
use std::sync::{Arc, Mutex};

use tracing_subscriber::fmt::MakeWriter;

use metadata_agent::nova_access::NovaTls;
use metadata_agent::proxy::{Endpoint, ProxyConfig, Scheme, UpstreamConfig};
use rig::*;
use tempfile::TempDir;
use tls_nova::{Authority, Files, PAST, TlsNova};
use tracing::subscriber::DefaultGuard;

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

impl Log {
    /// Captures the log until the guard is dropped.
    fn begin() -> (Self, DefaultGuard) {
        let log = Self::default();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::TRACE)
            .with_ansi(false)
            .with_writer(log.clone())
            .finish();
        (log, tracing::subscriber::set_default(subscriber))
    }

    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

#[tokio::test]
async fn a_trace_log_holds_the_access_line_and_no_secret() {
    let (log, _here) = Log::begin();

    let nova = Nova::saying(OK).await;
    let agent = Agent::before(&nova).await;
    assert_status(&agent.ask("GET /latest/\u{85}?a HTTP/1.1\r\nX-Injected: x\r\n\r\n").await, 200);
    let agent =
        Agent::with(ProxyConfig::default(), upstream(closed_port().await), FakeDirectory::new(known())).await;
    assert_status(&agent.ask(GET).await, 503);

    let text = log.text();
    let access = text.lines().find(|line| line.contains(" access: ")).expect("an access line");
    for field in [
        "method=GET",
        r#"path="/latest/\u{85}?a""#,
        "status=200",
        "bytes=2",
        "duration=",
        "attachment=7",
        &format!("instance={INSTANCE}"),
    ] {
        assert!(access.contains(field), "{field} in {access}");
    }
    // Neither the secret, which is this word, nor the signature, which is as valuable.
    assert!(!text.contains("secret") && !text.contains(SIGNATURE), "{text}");
}

#[tokio::test]
async fn an_expired_nova_certificate_is_logged() {
    let (log, _here) = Log::begin();
    let files = Files(TempDir::new().unwrap());
    let authority = Authority::new();
    let nova = TlsNova::start(authority.server("localhost", PAST, None)).await;
    let endpoint = Endpoint::new(Scheme::Https, "localhost", nova.nova.port).unwrap();
    let tls = NovaTls { authorities: Some(files.put("ca.pem", &authority.pem)), ..NovaTls::default() };
    let upstream = UpstreamConfig::new(vec![endpoint]);
    let agent = Agent::with_tls(ProxyConfig::default(), upstream, tls, FakeDirectory::new(known())).await;
    for _ in 0..3 {
        assert_status(&agent.ask(GET).await, 503);
    }
    let text = log.text();
    let warnings: Vec<_> = text.lines().filter(|line| line.contains(" WARN ")).collect();
    let [warning] = &warnings[..] else { panic!("one warning: {warnings:?}") };
    assert!(warning.contains("invalid peer certificate: Expired"), "{warning}");
}
