//! The probe of `check`: it recognises Nova, or shows which option is wrong.

use std::time::Duration;

use metadata_agent::nova_access::{self, ClientCertificate, NovaTls};
use metadata_agent::proxy::{
    Endpoint, ProbeError, Scheme, TlsErrorKind, UpstreamConfig, probe, probe_secrets,
};
use metadata_agent::secrets::Signer;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::rig::*;
use crate::tls_nova::{Authority, Files, PAST, TlsNova, tls_nova};

const VERSIONS: &str = "HTTP/1.1 200 OK\r\nContent-Length: 18\r\n\r\n1.0\n2007\nlatest\n\n\n";

async fn fault_of(config: UpstreamConfig) -> ProbeError {
    let access = access(&config);
    soon("the probe", probe(config, access)).await.unwrap_err()
}

#[tokio::test]
async fn the_probe_accepts_a_list_of_versions() {
    let mut nova = Nova::saying(VERSIONS).await;
    let upstream = upstream(nova.port);
    let access = access(&upstream);
    probe(upstream, access).await.unwrap();
    let asked = nova.next_text().await;
    assert_eq!(asked, format!("GET / HTTP/1.1\r\nhost: 127.0.0.1:{}\r\n\r\n", nova.port));
}

#[tokio::test]
async fn each_secret_is_tried_until_nova_accepts_one() {
    let refused = "HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n";
    let unknown = "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n";
    for (accepted_after, status) in [(0, 404), (1, 404), (2, 403)] {
        let nova = Nova::start(move |connection, _, _| {
            Act::Say(if connection < accepted_after { refused } else { unknown }.into())
        })
        .await;
        let signer = Signer::new("first".into());
        signer.replace(vec!["first".into(), "second".into()]);
        let upstream = upstream(nova.port);
        let access = access(&upstream);
        let probe = probe_secrets(upstream, access, |instance| signer.sign(instance));
        let found = soon("the probe", probe).await.unwrap();
        assert_eq!(found, status, "{accepted_after}");
    }
}

#[tokio::test]
async fn the_probe_rejects_other_servers() {
    let other = Nova::saying(OK).await;
    assert!(matches!(fault_of(upstream(other.port)).await, ProbeError::NotNova(status) if status == 200));
    let refusing = Nova::saying("HTTP/1.1 404 Not LookupOutcome\r\nContent-Length: 7\r\n\r\nlatest\n").await;
    assert!(matches!(fault_of(upstream(refusing.port)).await, ProbeError::NotNova(status) if status == 404));
    let mute = Nova::saying("SSH-2.0-OpenSSH_9.2\r\n\r\n").await;
    assert!(matches!(fault_of(upstream(mute.port)).await, ProbeError::NotHttp(_)));
    assert!(matches!(fault_of(upstream(closed_port().await)).await, ProbeError::Connect(_)));
    let silent = Nova::start(|_, _, _| Act::SayAndHang(Vec::new())).await;
    let limit = Duration::from_millis(50);
    let config = UpstreamConfig { answer_timeout: limit, ..upstream(silent.port) };
    assert!(matches!(fault_of(config).await, ProbeError::Silent(after) if after == limit));
    let half = Nova::start(|_, _, _| Act::SayAndHang(VERSIONS.as_bytes()[..50].to_vec())).await;
    let config = UpstreamConfig { answer_timeout: limit, ..upstream(half.port) };
    assert!(matches!(fault_of(config).await, ProbeError::Silent(after) if after == limit));
    let nowhere = Endpoint::new(Scheme::Http, "nova.invalid", 8775).unwrap();
    assert!(matches!(fault_of(UpstreamConfig::new(vec![nowhere])).await, ProbeError::Resolve(_)));
}

/// Starts a server that answers a TLS handshake as servers without TLS do.
async fn plain_server() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.read_u8().await.unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n").await.unwrap();
        let _ = stream.read_to_end(&mut Vec::new()).await;
    });
    port
}

#[tokio::test]
async fn each_tls_error_has_its_kind() {
    let files = Files(TempDir::new().unwrap());
    let (authority, stranger) = (Authority::new(), Authority::new());
    let ours = NovaTls { authorities: Some(files.put("ca.pem", &authority.pem)), ..NovaTls::default() };
    let (certificate, key) = stranger.issue("agent");
    let identity = Some(ClientCertificate {
        certificate: files.put("agent.pem", &certificate.pem()),
        key: files.put("agent.key", &key.serialize_pem()),
    });
    let of = async |port, tls: &NovaTls| {
        let endpoint = Endpoint::new(Scheme::Https, "localhost", port).unwrap();
        let upstream = UpstreamConfig::new(vec![endpoint]);
        let (access, _) = nova_access::open(&upstream, tls.clone()).unwrap();
        let fault = soon("the probe", probe(upstream, access)).await.unwrap_err();
        let ProbeError::Tls { kind, .. } = fault else { panic!("no fault of TLS: {fault}") };
        kind
    };
    assert_eq!(of(plain_server().await, &ours).await, TlsErrorKind::NotTls);
    let unknown = tls_nova(&stranger, "localhost", None).await;
    assert_eq!(of(unknown, &ours).await, TlsErrorKind::UnknownAuthority);
    let misnamed = tls_nova(&authority, "other.example", None).await;
    assert_eq!(of(misnamed, &ours).await, TlsErrorKind::OtherName);
    let expired = TlsNova::start(authority.server("localhost", PAST, None)).await;
    assert_eq!(of(expired.nova.port, &ours).await, TlsErrorKind::OutOfDate);
    let of_a_ca = TlsNova::start(authority.server_with_ca("localhost")).await;
    assert_eq!(of(of_a_ca.nova.port, &ours).await, TlsErrorKind::Form);
    let asking = tls_nova(&authority, "localhost", Some(&authority)).await;
    assert_eq!(of(asking, &ours).await, TlsErrorKind::ClientCertificate);
    assert_eq!(of(asking, &NovaTls { identity, ..ours.clone() }).await, TlsErrorKind::ClientCertificate);
    // The other way round: the server uses TLS and the agent does not.
    let endpoint = Endpoint::new(Scheme::Http, "localhost", unknown).unwrap();
    let fault = fault_of(UpstreamConfig::new(vec![endpoint])).await;
    assert!(matches!(fault, ProbeError::NotHttp(_)), "{fault}");
}
