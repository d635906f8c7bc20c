//! Neutron's metadata agent in Nova's place. It gets the headers that its haproxies would send, and
//! no more requests at once than it can handle.

use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use metadata_agent::proxy::{
    ClientIdentity, ForwardedAddresses, LookupState, NetworkHeader, ProxyConfig, UpstreamConfig,
};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;
use tokio::sync::mpsc;

use crate::rig::*;

const NETWORK: &str = "11111111-1111-4111-8111-111111111111";
/// As in `socketserver.TCPServer`.
const LEGACY_BACKLOG: u32 = 5;

struct Site {
    _dir: TempDir,
    socket: PathBuf,
}

impl Site {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { socket: dir.path().join("metadata_proxy"), _dir: dir }
    }

    fn legacy(&self, act: impl Fn(usize, usize, &[u8]) -> Act + Send + Sync + 'static) -> Nova {
        Nova::on_socket(&self.socket, act)
    }

    async fn agent(&self, change: impl FnOnce(UpstreamConfig) -> UpstreamConfig) -> Agent {
        let directory = FakeDirectory::new(on_network(&["10.0.0.5"], NetworkHeader::Neutron));
        let upstream = change(UpstreamConfig::neutron_agent(&self.socket, 6));
        Agent::with(ProxyConfig::default(), upstream, directory).await
    }
}

fn on_network(fixed_ips: &[&str], header: NetworkHeader) -> LookupState {
    let fixed_ips: Vec<_> = fixed_ips.iter().map(|ip| ip.parse().unwrap()).collect();
    let addresses = ForwardedAddresses::new(header, &fixed_ips, Some("fa:16:3e:00:00:01".parse().unwrap()));
    let network = NETWORK.parse().unwrap();
    LookupState::Known(Arc::new(ClientIdentity::on_network(network, header, addresses.unwrap(), None)))
}

/// Returns the headers of a request, sorted by name.
fn headers(request: &str) -> Vec<String> {
    let head = request.split("\r\n\r\n").next().unwrap();
    let mut lines: Vec<_> = head.lines().skip(1).map(str::to_lowercase).collect();
    lines.sort_unstable();
    lines
}

#[tokio::test]
async fn neutron_agent_gets_only_network_and_address() {
    let site = Site::new();
    let mut legacy = site.legacy(|_, _, _| Act::SayAndClose(OK.into()));
    let agent = site.agent(|config| config).await;
    let answer = agent
        .ask(
            "POST /openstack/2013-10-17/password?x=%41 HTTP/1.1\r\nHost: evil\r\nX-Forwarded-For: 10.0.0.66\r\n\
             X-Neutron-Network-ID: 22222222-2222-4222-8222-222222222222\r\n\
             X-Neutron-Router-ID: 22222222-2222-4222-8222-222222222222\r\nX-OVN-Network-ID: x\r\n\
             X-Instance-ID: x\r\nX-Metadata-Provider: x\r\nContent-Type: a/b\r\nContent-Length: 2\r\n\r\npw",
        )
        .await;
    assert_status(&answer, 200);
    let asked = legacy.next_text().await;
    assert!(asked.starts_with("POST /openstack/2013-10-17/password?x=%41 HTTP/1.1\r\n"), "{asked}");
    assert!(asked.ends_with("\r\n\r\npw"), "{asked}");
    let wanted = [
        "accept: */*",
        "connection: close",
        "content-length: 2",
        "content-type: a/b",
        "host: 169.254.169.254",
        "x-forwarded-for: 10.0.0.5",
        &format!("x-neutron-network-id: {NETWORK}"),
    ];
    assert_eq!(headers(&asked), wanted);
}

#[tokio::test]
async fn neutron_agent_is_told_the_length_of_an_empty_body() {
    let site = Site::new();
    let mut legacy = site.legacy(|_, _, _| Act::SayAndClose(OK.into()));
    let agent = site.agent(|config| config).await;
    for (method, is_told) in [("POST", true), ("PUT", true), ("DELETE", true), ("GET", false)] {
        assert_status(&agent.ask(&format!("{method} / HTTP/1.1\r\nHost: x\r\n\r\n")).await, 200);
        let asked = headers(&legacy.next_text().await);
        assert_eq!(asked.contains(&"content-length: 0".to_owned()), is_told, "{method}: {asked:?}");
    }
}

#[tokio::test]
async fn ovn_agent_gets_its_own_header() {
    let site = Site::new();
    let mut legacy = site.legacy(|_, _, _| Act::SayAndClose(OK.into()));
    let directory = FakeDirectory::new(on_network(&[], NetworkHeader::Ovn));
    let agent =
        Agent::with(ProxyConfig::default(), UpstreamConfig::neutron_agent(&site.socket, 6), directory).await;
    assert_status(&agent.ask(GET).await, 200);
    let asked = headers(&legacy.next_text().await);
    assert!(asked.contains(&format!("x-ovn-network-id: {NETWORK}")), "{asked:?}");
    let derived = "x-forwarded-for: fe80::f816:3eff:fe00:1".to_owned();
    assert!(asked.contains(&derived), "not the address that the guest chose: {asked:?}");
}

#[tokio::test]
async fn every_request_has_a_connection_of_its_own() {
    let site = Site::new();
    let mut legacy = site.legacy(|_, _, _| Act::Say(OK.into()));
    let agent = site.agent(|config| config).await;
    let mut guest = agent.guest().await;
    for connection in 0..3 {
        guest.send(GET).await;
        assert_status(&guest.answer().await, 200);
        assert_eq!(legacy.next().await.0, connection);
        assert_eq!(soon("the close", legacy.closed.recv()).await, Some(connection));
    }
}

#[tokio::test]
async fn responses_of_the_agent_pass_unchanged() {
    for status in [200, 204, 302, 400, 403, 404, 409, 429, 500, 503, 504] {
        let site = Site::new();
        let body = if status == 204 { "" } else { "x" };
        let length = body.len();
        let answer =
            format!("HTTP/1.0 {status} X\r\nRetry-After: 7\r\nContent-Length: {length}\r\n\r\n{body}");
        let mut legacy = site.legacy(move |_, _, _| Act::SayAndClose(answer.clone().into()));
        let agent = site.agent(|config| config).await;
        let mut guest = agent.guest().await;
        guest.send("GET / HTTP/1.1\r\nConnection: close\r\n\r\n").await;
        let got = String::from_utf8(guest.rest().await.unwrap()).unwrap();
        assert_status(&got, status);
        assert!(got.contains("retry-after: 7\r\n") && got.ends_with(&format!("\r\n\r\n{body}")), "{got}");
        legacy.next().await;
        assert!(legacy.seen.is_empty(), "a 403 has no other signature to be tried");
    }
}

#[tokio::test]
async fn an_agent_that_is_down_gives_503() {
    let site = Site::new();
    let agent = site.agent(|config| config).await;
    // First there is no file, then a file without a listener.
    for leftover in [false, true] {
        if leftover {
            drop(UnixListener::bind(&site.socket).unwrap());
        }
        let answer = agent.ask(GET).await;
        assert_status(&answer, 503);
        assert!(answer.contains("retry-after: 1\r\n"), "{answer}");
    }
    agent.assert_counted("metadata_upstream_errors_total{error=\"connect\"} 2");
}

#[tokio::test]
async fn a_hung_agent_gives_504() {
    let site = Site::new();
    let mut legacy = site.legacy(|_, _, _| Act::SayAndHang(Vec::new()));
    let agent =
        site.agent(|config| UpstreamConfig { answer_timeout: Duration::from_millis(50), ..config }).await;
    assert_status(&agent.ask(GET).await, 504);
    assert_eq!(soon("the close", legacy.closed.recv()).await, Some(0));
    agent.assert_counted("metadata_upstream_errors_total{error=\"answer_timeout\"} 1");
}

/// An agent that answers a connection on demand.
struct Serial {
    arrived: mpsc::UnboundedReceiver<tokio::net::UnixStream>,
}

impl Serial {
    fn start(site: &Site) -> Self {
        let listener = UnixListener::bind(&site.socket).unwrap();
        let (arrive, arrived) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let _ = arrive.send(stream);
            }
        });
        Self { arrived }
    }

    async fn next(&mut self) -> tokio::net::UnixStream {
        soon("a connection", self.arrived.recv()).await.unwrap()
    }
}

async fn answer(mut stream: tokio::net::UnixStream) {
    read_message(&mut stream, &mut Vec::new()).await.unwrap();
    stream.write_all(OK.as_bytes()).await.unwrap();
}

#[tokio::test]
async fn excess_requests_wait_for_their_turn() {
    let site = Site::new();
    let mut legacy = Serial::start(&site);
    let agent = site.agent(|config| UpstreamConfig { waiting_requests: 2, ..config }).await;
    let mut guests = Vec::new();
    for _ in 0..4 {
        let mut guest = agent.guest().await;
        guest.send(GET).await;
        guests.push(guest);
    }
    let held = [legacy.next().await, legacy.next().await];
    // Only the response to one lets the third request through, which proves the limit.
    assert!(legacy.arrived.is_empty());
    for stream in held {
        assert!(legacy.arrived.is_empty(), "a third request came before there was room");
        answer(stream).await;
        let third = legacy.next().await;
        answer(third).await;
    }
    for guest in &mut guests {
        assert_status(&guest.answer().await, 200);
    }
}

#[tokio::test]
async fn a_request_that_waits_too_long_gets_503() {
    let site = Site::new();
    let mut legacy = Serial::start(&site);
    let limits =
        |config| UpstreamConfig { waiting_requests: 1, connect_timeout: Duration::from_millis(50), ..config };
    let agent = site.agent(limits).await;
    let mut first = agent.guest().await;
    first.send(GET).await;
    let held = legacy.next().await;
    let refused = agent.ask(GET).await;
    assert_status(&refused, 503);
    assert!(refused.contains("retry-after: 1\r\n"), "{refused}");
    agent.assert_counted("metadata_upstream_errors_total{error=\"busy\"} 1");
    answer(held).await;
    assert_status(&first.answer().await, 200);
}

#[tokio::test]
async fn a_slow_reader_holds_no_request_slot() {
    let site = Site::new();
    let _legacy = site.legacy(|connection, _, _| match connection {
        0 => Act::SayAndHang(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf".to_vec()),
        _ => Act::SayAndClose(OK.into()),
    });
    let agent = site.agent(|config| UpstreamConfig { waiting_requests: 1, ..config }).await;
    let mut slow = agent.guest().await;
    slow.send(GET).await;
    let mut begun = [0; 12];
    soon("the head", slow.stream.read_exact(&mut begun)).await.unwrap();
    assert_eq!(&begun, b"HTTP/1.1 200");
    assert_status(&agent.ask(GET).await, 200);
}

#[tokio::test]
async fn a_full_accept_queue_is_waited_for() {
    let site = Site::new();
    let socket = tokio::net::UnixSocket::new_stream().unwrap();
    socket.bind(&site.socket).unwrap();
    let listener = socket.listen(LEGACY_BACKLOG).unwrap();
    // Connections of haproxies fill the queue.
    let mut others = Vec::new();
    let full = loop {
        match tokio::net::UnixStream::connect(&site.socket).await {
            Ok(stream) => others.push(stream),
            Err(error) => break error,
        }
        assert!(others.len() < 100, "the backlog has a bound");
    };
    assert_eq!((full.kind(), others.len()), (ErrorKind::WouldBlock, 6));

    let impatient = site.agent(|c| UpstreamConfig { connect_timeout: Duration::from_millis(50), ..c }).await;
    assert_status(&impatient.ask(GET).await, 503);
    impatient.assert_counted("metadata_upstream_errors_total{error=\"connect_timeout\"} 1");

    let patient = site.agent(|config| config).await;
    let serve = async {
        for _ in &others {
            drop(listener.accept().await.unwrap());
        }
        answer(listener.accept().await.unwrap().0).await;
    };
    let (got, ()) = tokio::join!(patient.ask(GET), serve);
    assert_status(&got, 200);
}
