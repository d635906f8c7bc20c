//! Requests that Neutron's haproxies forward. Each request names its client.

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use metadata_agent::ids::NetworkOrRouter;
use metadata_agent::proxy::metrics::Metrics;
use metadata_agent::proxy::{
    ClientIdentity, ClientLookup, ClientQuery, HaproxyUsers, LookupFuture, LookupOutcome, Proxy, ProxyConfig,
    Upstream, serve_haproxies,
};
use metadata_agent::secrets::Signer;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::rig::*;

const RED: &str = "11111111-1111-4111-8111-111111111111";
const BLUE: &str = "22222222-2222-4222-8222-222222222222";
const ROUTER: &str = "33333333-3333-4333-8333-333333333333";
const BLUE_INSTANCE: &str = "00000000-9a1f-4d0a-8f0b-1c2d3e4f5a6b";

/// Finds clients by network or router and by address.
#[derive(Debug)]
struct Book(HashMap<(String, IpAddr), LookupOutcome>);

impl ClientLookup for Book {
    fn find<'a>(&'a self, query: &'a ClientQuery) -> LookupFuture<'a> {
        let scope = match query.scope {
            NetworkOrRouter::Network(network) => network.to_string(),
            NetworkOrRouter::Router(router) => router.to_string(),
        };
        let found = self.0.get(&(scope, query.address)).cloned();
        Box::pin(std::future::ready(found.unwrap_or(LookupOutcome::NotFound)))
    }
}

struct Site {
    _dir: TempDir,
    socket: PathBuf,
    cancel: CancellationToken,
    tracker: TaskTracker,
}

fn instance(id: &str, address: &str) -> LookupOutcome {
    let (id, fixed_ips) = (id.parse().unwrap(), vec![address.parse().unwrap()]);
    let signatures = Signer::new("secret".into()).sign(&id);
    let identity = ClientIdentity::new(id, &"acme".parse().unwrap(), fixed_ips, signatures);
    LookupOutcome::Identified(Arc::new(identity))
}

impl Site {
    fn before(nova: &Nova) -> Self {
        Self::with(nova, ProxyConfig::default())
    }

    fn with(nova: &Nova, config: ProxyConfig) -> Self {
        let book = [
            (RED, "10.0.0.5", instance(INSTANCE, "10.0.0.5")),
            (BLUE, "10.0.0.5", instance(BLUE_INSTANCE, "10.0.0.5")),
            (ROUTER, "10.0.0.9", instance(BLUE_INSTANCE, "10.0.0.9")),
            (RED, "10.0.0.6", LookupOutcome::Ambiguous),
            (RED, "10.0.0.7", LookupOutcome::NotAnInstance),
            (RED, "10.0.0.8", LookupOutcome::Unavailable),
        ];
        let book = book.map(|(scope, address, found)| ((scope.to_owned(), address.parse().unwrap()), found));
        let metrics = Arc::new(Metrics::default());
        let upstream = upstream(nova.port);
        let access = access(&upstream);
        let upstream = Upstream::new(upstream, access, Arc::clone(&metrics), TaskTracker::new()).unwrap();
        let (directory, lookup) = (FakeDirectory::new(pending()), Arc::new(Book(book.into())));
        let proxy = Proxy::new(directory, lookup, Arc::new(upstream), config, metrics);
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("metadata_proxy");
        let listener = UnixListener::bind(&socket).unwrap();
        let (cancel, tracker) = (CancellationToken::new(), TaskTracker::new());
        tokio::spawn(serve_haproxies(listener, HaproxyUsers::Any, proxy, cancel.clone(), tracker.clone()));
        Self { _dir: dir, socket, cancel, tracker }
    }

    async fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.socket).await.unwrap()
    }

    /// Sends one request with these headers.
    async fn ask(&self, headers: &[(&str, &str)]) -> String {
        request(&mut self.connect().await, headers).await
    }
}

async fn request(stream: &mut UnixStream, headers: &[(&str, &str)]) -> String {
    let mut text = "GET /latest HTTP/1.1\r\n".to_owned();
    for (name, value) in headers {
        text.extend([name, ": ", value, "\r\n"]);
    }
    text.push_str("\r\n");
    stream.write_all(text.as_bytes()).await.unwrap();
    let answer = soon("an answer", read_message(stream, &mut Vec::new())).await.expect("an answer");
    String::from_utf8(answer).unwrap()
}

#[tokio::test]
async fn each_request_of_a_haproxy_names_its_client() {
    let mut nova = Nova::saying(OK).await;
    let site = Site::before(&nova);
    let mut haproxy = site.connect().await;
    for (name, scope, address, instance) in [
        ("X-Neutron-Network-ID", RED, "10.0.0.5", INSTANCE),
        ("X-Neutron-Network-ID", BLUE, "10.0.0.5", BLUE_INSTANCE),
        ("X-Neutron-Router-ID", ROUTER, "10.0.0.9", BLUE_INSTANCE),
        ("X-OVN-Network-ID", RED, "::ffff:10.0.0.5", INSTANCE),
    ] {
        assert_status(&request(&mut haproxy, &[(name, scope), ("X-Forwarded-For", address)]).await, 200);
        let asked = nova.next().await.1;
        assert_eq!(header(&asked, "x-instance-id").as_deref(), Some(instance), "{name} {scope} {address}");
        let canonical = address.trim_start_matches("::ffff:");
        assert_eq!(header(&asked, "x-forwarded-for").as_deref(), Some(canonical));
        assert_eq!(header(&asked, "x-neutron-network-id").or(header(&asked, "x-ovn-network-id")), None);
    }
}

#[tokio::test]
async fn headers_that_the_guest_sent_are_not_trusted() {
    let mut nova = Nova::saying(OK).await;
    let site = Site::before(&nova);
    let answer = site
        .ask(&[
            ("X-Forwarded-For", "10.0.0.9, 10.0.0.6"),
            ("X-Instance-ID", BLUE_INSTANCE),
            ("X-Metadata-Provider", BLUE),
            ("X-Neutron-Network-ID", RED),
            ("X-Forwarded-For", "10.0.0.5"),
        ])
        .await;
    assert_status(&answer, 200);
    let asked = String::from_utf8(nova.next().await.1).unwrap();
    assert!(asked.contains(INSTANCE) && asked.contains("x-forwarded-for: 10.0.0.5\r\n"), "{asked}");
    assert!(!asked.contains("provider") && !asked.contains(BLUE_INSTANCE), "{asked}");
}

#[tokio::test]
async fn an_unidentified_client_gets_no_metadata() {
    let nova = Nova::saying(OK).await;
    let site = Site::before(&nova);
    let from = |address| [("X-Neutron-Network-ID", RED), ("X-Forwarded-For", address)];
    for (headers, status) in [
        (&from("10.0.0.6")[..], 404),
        (&from("10.0.0.7"), 404),
        (&from("10.0.0.10"), 404),
        (&from("fe80::1"), 404),
        (&from("10.0.0.8"), 503),
        (&from("rubbish"), 400),
        (&[("X-Neutron-Network-ID", RED)], 400),
        (&[("X-Forwarded-For", "10.0.0.5")], 400),
        (&[&from("10.0.0.5")[..], &[("X-Neutron-Router-ID", ROUTER)]].concat(), 400),
        (&[&from("10.0.0.5")[..], &[("X-OVN-Network-ID", RED)]].concat(), 400),
        (&[("X-Neutron-Network-ID", "x"), ("X-Forwarded-For", "10.0.0.5")], 400),
    ] {
        let answer = site.ask(headers).await;
        assert_status(&answer, status);
        assert_eq!(answer.contains("retry-after"), status == 503, "{answer}");
    }
    assert!(nova.seen.is_empty());
}

#[tokio::test]
async fn a_password_in_two_pieces_arrives_whole() {
    let mut nova = Nova::saying(OK).await;
    let site = Site::before(&nova);
    let mut haproxy = site.connect().await;
    let head = format!(
        "POST /p HTTP/1.1\r\nX-Neutron-Network-ID: {RED}\r\nX-Forwarded-For: 10.0.0.5\r\nContent-Length: 4\r\n\r\n"
    );
    for piece in [head.as_str(), "pa", "ss"] {
        haproxy.write_all(piece.as_bytes()).await.unwrap();
        tokio::task::yield_now().await;
    }
    assert!(nova.next_text().await.ends_with("\r\n\r\npass"));
}

#[tokio::test]
async fn haproxy_connections_are_drained() {
    let nova = Nova::saying(OK).await;
    let site = Site::with(&nova, ProxyConfig::default());
    let known = [("X-Neutron-Network-ID", RED), ("X-Forwarded-For", "10.0.0.5")];
    let mut open = [site.connect().await, site.connect().await];
    for haproxy in &mut open {
        assert_status(&request(haproxy, &known).await, 200);
    }

    site.cancel.cancel();
    site.tracker.close();
    soon("the end", site.tracker.wait()).await;
    for haproxy in &mut open {
        assert_eq!(soon("the close", read_message(haproxy, &mut Vec::new())).await, None);
    }
}

/// Sends the head of a POST request and leaves its body open.
async fn slow_post(site: &Site, network: &str) -> UnixStream {
    let mut haproxy = site.connect().await;
    let head = format!(
        "POST /openstack/latest/password HTTP/1.1\r\nX-Neutron-Network-ID: {network}\r\n\
         X-Forwarded-For: 10.0.0.5\r\nExpect: 100-continue\r\nContent-Length: 8\r\n\r\n"
    );
    haproxy.write_all(head.as_bytes()).await.unwrap();
    haproxy
}

/// Reads the first line of a response, such as 100 Continue.
async fn status_line(haproxy: &mut UnixStream) -> String {
    let mut line = Vec::new();
    while !line.ends_with(b"\r\n") {
        line.push(soon("a status line", haproxy.read_u8()).await.unwrap());
    }
    String::from_utf8(line).unwrap()
}

#[tokio::test]
async fn slow_bodies_of_one_network_leave_the_others_room() {
    let nova = Nova::saying(OK).await;
    let site = Site::with(&nova, ProxyConfig { connections: 4, ..ProxyConfig::default() });
    let mut held = Vec::new();
    let refused = loop {
        let mut haproxy = slow_post(&site, RED).await;
        let line = status_line(&mut haproxy).await;
        if line != "HTTP/1.1 100 Continue\r\n" {
            break line;
        }
        held.push(haproxy);
    };
    assert_eq!((refused.as_str(), held.len()), ("HTTP/1.1 503 Service Unavailable\r\n", 5));
    let blue = [("X-Neutron-Network-ID", BLUE), ("X-Forwarded-For", "10.0.0.5")];
    for _ in 0..10 {
        assert_status(&site.ask(&blue).await, 200);
    }
    drop(held);
}

#[tokio::test]
async fn one_client_behind_a_haproxy_has_a_limit() {
    let nova = Nova::saying(OK).await;
    let site = Site::with(&nova, ProxyConfig { connections_per_guest: 2, ..ProxyConfig::default() });
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut haproxy = slow_post(&site, RED).await;
        assert_eq!(status_line(&mut haproxy).await, "HTTP/1.1 100 Continue\r\n");
        held.push(haproxy);
    }
    let red = [("X-Neutron-Network-ID", RED), ("X-Forwarded-For", "10.0.0.5")];
    let refused = site.ask(&red).await;
    assert_status(&refused, 503);
    assert_eq!(header(refused.as_bytes(), "retry-after").as_deref(), Some("1"));
    // Another client of the same network is not affected.
    let other = [("X-Neutron-Network-ID", RED), ("X-Forwarded-For", "10.0.0.9")];
    assert_status(&site.ask(&other).await, 404);
    drop(held);
}
