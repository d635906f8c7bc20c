//! Requests of guests, and what Nova sees of them.

use std::time::Duration;

use metadata_agent::proxy::ProxyConfig;
use tokio::io::AsyncWriteExt;

use crate::rig::*;

fn config() -> ProxyConfig {
    ProxyConfig::default()
}

#[tokio::test]
async fn upstream_request_has_exactly_these_bytes() {
    let mut nova = Nova::saying(OK).await;
    let agent = Agent::before(&nova).await;
    agent.ask("GET //latest//a%2fb%20c/?x=1&y=%41 HTTP/1.1\r\nHost: x\r\nUser-Agent: curl\r\n\r\n").await;
    let want = format!(
        "GET /latest//a%2fb%20c/?x=1&y=%41 HTTP/1.1\r\nhost: 127.0.0.1:{}\r\naccept: */*\r\n\
         x-forwarded-for: 10.0.0.5\r\nx-instance-id: {INSTANCE}\r\nx-tenant-id: acme\r\n\
         x-instance-id-signature: {SIGNATURE}\r\n\r\n",
        nova.port
    );
    assert_eq!(nova.next_text().await, want);
}

#[tokio::test]
async fn nothing_forged_reaches_nova() {
    let mut nova = Nova::saying(OK).await;
    let agent = Agent::before(&nova).await;
    let forged = [
        "X-Instance-ID",
        "x-instance-id",
        "X-Tenant-ID",
        "X-INSTANCE-ID-SIGNATURE",
        "X-Forwarded-For",
        "X-Metadata-Provider",
        "X-Metadata-Provider-Signature",
        "X-Neutron-Network-ID",
        "X-Neutron-Router-ID",
        "X-OVN-Network-ID",
        "Cookie",
        "Authorization",
        "Forwarded",
        "X-Foo",
        "Accept",
        "Accept-Encoding",
        "TE",
        "Via",
        "Upgrade",
        "Proxy-Authorization",
        "Range",
    ];
    let mut request =
        "GET / HTTP/1.1\r\nHost: x\r\nConnection: X-Foo, keep-alive, X-Instance-ID\r\n".to_owned();
    for name in forged {
        for name in [name.to_owned(), name.to_lowercase(), name.to_uppercase()] {
            request.extend([&name, ": forged\r\n"]);
        }
    }
    agent.ask(request + "\r\n").await;
    let seen = nova.next_text().await;
    assert!(!seen.to_lowercase().contains("forged"), "{seen}");
    let mut names: Vec<_> = seen.lines().skip(1).filter_map(|line| Some(line.split_once(':')?.0)).collect();
    names.sort_unstable();
    let want =
        ["accept", "host", "x-forwarded-for", "x-instance-id", "x-instance-id-signature", "x-tenant-id"];
    assert_eq!(names, want);
}

#[tokio::test]
async fn every_method_passes_but_connect() {
    let mut nova = Nova::saying("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
    let agent = Agent::before(&nova).await;
    for method in ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "BREW"] {
        assert_status(&agent.ask(format!("{method} /x HTTP/1.1\r\nHost: x\r\n\r\n")).await, 200);
        let seen = nova.next_text().await;
        assert!(seen.starts_with(&format!("{method} /x HTTP/1.1\r\n")), "{seen}");
    }
    assert_status(&agent.ask("OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n").await, 200);
    assert!(nova.next_text().await.starts_with("OPTIONS /* HTTP/1.1\r\n"));
    assert_status(&agent.ask("CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n").await, 400);
    assert!(nova.seen.is_empty());
}

#[tokio::test]
async fn odd_but_legal_requests_pass() {
    let mut nova = Nova::saying(OK).await;
    let agent = Agent::before(&nova).await;
    for request in [
        "GET /x HTTP/1.1\r\n\r\n",
        "GET /x HTTP/1.1\r\nHost: [fe80::a9fe:a9fe%25eth0]\r\n\r\n",
        "GET /x HTTP/1.1\r\nHost: [fe80::a9fe:a9fe%eth0]\r\n\r\n",
        "GET /x HTTP/1.1\r\nHost: \r\n\r\n",
        "GET http://169.254.169.254/x HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n",
        "\r\nGET /x HTTP/1.1\nHost: y\n\n",
    ] {
        assert_status(&agent.ask(request).await, 200);
        assert!(nova.next_text().await.starts_with("GET /x HTTP/1.1\r\n"), "{request}");
    }
}

#[tokio::test]
async fn malformed_requests_are_answered_and_closed() {
    let nova = Nova::saying(OK).await;
    let agent = Agent::before(&nova).await;
    for request in [
        "GET /x HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
        "GET http://evil.example/x HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n",
        "GET /x\u{1}y HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET /x y HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET x HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET /x#y HTTP/1.1\r\nHost: a\r\n\r\n",
        "garbage\r\n\r\n",
        "GET /x HTTP/1.1\r\nHost: a\r\nX\u{0}: b\r\n\r\n",
        "POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        "POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        "POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n",
    ] {
        let mut guest = agent.guest().await;
        guest.send(request).await;
        let answer = String::from_utf8(guest.rest().await.unwrap()).unwrap();
        assert_status(&answer, 400);
        assert!(answer.contains("connection: close\r\n"), "{answer}");
    }
    assert!(nova.seen.is_empty());
}

#[tokio::test]
async fn the_preface_of_http2_gets_400_however_it_arrives() {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let nova = Nova::saying(OK).await;
    let agent = Agent::before(&nova).await;
    let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    let whole = [PREFACE, &settings].concat();
    for split in 1..=whole.len() {
        let mut guest = agent.guest().await;
        let (first, second) = whole.split_at(split);
        guest.send(first).await;
        // The agent may have answered already.
        tokio::task::yield_now().await;
        guest.send(second).await;
        let answer = String::from_utf8(guest.rest().await.unwrap()).unwrap();
        assert_status(&answer, 400);
        assert!(answer.contains("connection: close\r\n"), "{split}: {answer}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{split}: {answer}");
    }
    // Byte by byte, and behind another request.
    let mut guest = agent.guest().await;
    for byte in &whole {
        guest.send([*byte]).await;
        tokio::task::yield_now().await;
    }
    assert_status(&String::from_utf8(guest.rest().await.unwrap()).unwrap(), 400);
    let mut guest = agent.guest().await;
    guest.send([GET.as_bytes(), &whole].concat()).await;
    let answers = String::from_utf8(guest.rest().await.unwrap()).unwrap();
    let (first, second) = answers.split_at(OK.len());
    assert_status(first, 200);
    assert_status(second, 400);

    let rejected = whole.len() + 2;
    agent.assert_counted(&format!("metadata_rejected_requests_total{{reason=\"malformed\"}} {rejected}"));
}

#[tokio::test]
async fn other_protocols_get_400() {
    let nova = Nova::saying(OK).await;
    let agent = Agent::before(&nova).await;
    let others: [(&str, &[u8]); 9] = [
        ("TLS ClientHello", b"\x16\x03\x01\x00\xc8\x01\x00\x00\xc4\x03\x03"),
        ("SSL 2 ClientHello", b"\x80\x2e\x01\x00\x02\x00\x15"),
        ("SOCKS 4", b"\x04\x01\x00\x50\xa9\xfe\xa9\xfe\x00"),
        ("SOCKS 5", b"\x05\x01\x00"),
        ("PROXY protocol 1", b"PROXY TCP4 10.0.0.6 169.254.169.254 1 80\r\n\r\n"),
        ("PROXY protocol 2", b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c\x0a\x00\x00\x06"),
        ("HTTP/0.9", b"GET /\r\n\r\n"),
        ("HTTP/1.2", b"GET / HTTP/1.2\r\n\r\n"),
        ("HTTP/3.0", b"GET / HTTP/3.0\r\n\r\n"),
    ];
    for (protocol, bytes) in others {
        for split in 1..=bytes.len() {
            let mut guest = agent.guest().await;
            guest.send(&bytes[..split]).await;
            tokio::task::yield_now().await;
            guest.send(&bytes[split..]).await;
            let answer = String::from_utf8(guest.rest().await.unwrap()).unwrap();
            assert!(answer.starts_with("HTTP/1.1 400 "), "{protocol}, split at {split}: {answer:?}");
        }
    }
    assert!(nova.seen.is_empty());
}

#[tokio::test]
async fn empty_lines_before_a_request_are_limited_like_a_head() {
    let mut nova = Nova::saying(OK).await;
    let agent = Agent::before(&nova).await;
    assert_status(&agent.ask(format!("{}{GET}", "\r\n".repeat(1_000))).await, 200);
    nova.next().await;
    for line in ["\r\n", "\n"] {
        let mut guest = agent.guest().await;
        guest.send(line.repeat(200_000 / line.len())).await;
        assert_status(&String::from_utf8(guest.rest().await.unwrap()).unwrap(), 431);
    }
    assert!(nova.seen.is_empty());
}

#[tokio::test]
async fn a_body_arrives_whole_however_it_is_sent() {
    let mut nova = Nova::saying(OK).await;
    let agent = Agent::before(&nova).await;
    let body: Vec<u8> = (0..=255).cycle().take(1000).collect();
    let tail = b"content-type: application/octet-stream\r\ncontent-length: 1000\r\n\r\n";
    let head = "POST /openstack/2013-10-17/password HTTP/1.1\r\nHost: x\r\nContent-Type: application/octet-stream\r\n";

    let mut guest = agent.guest().await;
    for (case, split) in [("one", 0), ("two", 1), ("late", 999)] {
        guest.send(format!("{head}Content-Length: 1000\r\n\r\n")).await;
        guest.send(&body[..split]).await;
        tokio::task::yield_now().await;
        guest.send(&body[split..]).await;
        assert_status(&guest.answer().await, 200);
        let seen = nova.next().await.1;
        assert!(seen.ends_with(&[&tail[..], &body[..]].concat()), "{case}");
    }

    guest.send(format!("{head}Transfer-Encoding: chunked\r\n\r\n")).await;
    for chunk in body.chunks(300) {
        guest.send(format!("{:x};ext=1\r\n", chunk.len())).await;
        guest.send(chunk).await;
        guest.send("\r\n").await;
    }
    guest.send("0\r\nX-Instance-ID: forged\r\n\r\n").await;
    assert_status(&guest.answer().await, 200);
    let seen = nova.next().await.1;
    assert!(seen.ends_with(&[&tail[..], &body[..]].concat()), "chunked");
    assert!(find(&seen, b"forged").is_none());
}

#[tokio::test]
async fn a_body_may_reach_its_limit_but_not_exceed_it() {
    let mut nova = Nova::saying(OK).await;
    let agent = Agent::with(
        ProxyConfig { request_body_limit: 100, ..config() },
        upstream(nova.port),
        FakeDirectory::new(known()),
    )
    .await;
    let chunked = |n: usize| {
        format!(
            "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n{n:x}\r\n{}\r\n0\r\n\r\n",
            "a".repeat(n)
        )
    };
    let sized = |n: usize| format!("POST / HTTP/1.1\r\nContent-Length: {n}\r\n\r\n{}", "a".repeat(n));
    for (at, over) in [(chunked(100), chunked(101)), (sized(100), sized(101))] {
        assert_status(&agent.ask(at).await, 200);
        assert!(nova.next().await.1.ends_with("a".repeat(100).as_bytes()));
        let mut guest = agent.guest().await;
        guest.send(over).await;
        assert_status(&String::from_utf8(guest.rest().await.unwrap()).unwrap(), 413);
    }
    assert!(nova.seen.is_empty());
    agent.assert_counted("metadata_rejected_requests_total{reason=\"body_too_large\"} 2");
}

#[tokio::test]
async fn expect_continue_is_answered_only_for_an_allowed_body() {
    let mut nova = Nova::saying(OK).await;
    let agent = Agent::before(&nova).await;
    let head =
        |length| format!("POST / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: {length}\r\n\r\n");
    let mut guest = agent.guest().await;
    guest.send(head(3)).await;
    assert_eq!(guest.answer().await, "HTTP/1.1 100 Continue\r\n\r\n");
    guest.send("abc").await;
    assert_status(&guest.answer().await, 200);
    assert!(nova.next_text().await.ends_with("content-length: 3\r\n\r\nabc"));

    let mut guest = agent.guest().await;
    guest.send(head(1_000_000)).await;
    let answer = String::from_utf8(guest.rest().await.unwrap()).unwrap();
    assert_status(&answer, 413);
    assert!(!answer.contains("100 Continue"), "{answer}");
}

#[tokio::test]
async fn a_rejected_body_does_not_hide_the_response() {
    let nova = Nova::saying(OK).await;
    let agent = Agent::before(&nova).await;
    let mut guest = agent.guest().await;
    guest.send("POST / HTTP/1.1\r\nContent-Length: 200000\r\n\r\n").await;
    guest.send(vec![b'a'; 200_000]).await;
    assert_status(&String::from_utf8(guest.rest().await.unwrap()).unwrap(), 413);
}

#[tokio::test]
async fn a_head_may_reach_its_limit_but_not_exceed_it() {
    let nova = Nova::saying(OK).await;
    let limit = 16 * 1024;
    let config = ProxyConfig { request_head_limit: limit, ..config() };
    let agent = Agent::with(config, upstream(nova.port), FakeDirectory::new(known())).await;
    let head = |size: usize| {
        let rest = "GET / HTTP/1.1\r\nX: \r\n\r\n";
        rest.replace("X: ", &format!("X: {}", "a".repeat(size - rest.len())))
    };
    assert_eq!(head(limit).len(), limit);
    assert_status(&agent.ask(head(limit)).await, 200);
    for size in [limit + 1, 10 * limit] {
        let mut guest = agent.guest().await;
        guest.send(head(size)).await;
        assert_status(&String::from_utf8(guest.rest().await.unwrap()).unwrap(), 431);
    }
    agent.assert_counted("metadata_rejected_requests_total{reason=\"head_too_large\"} 2");
}

#[tokio::test]
async fn slow_requests_get_408_and_idle_connections_close() {
    let nova = Nova::saying(OK).await;
    let config = ProxyConfig {
        request_head_timeout: Duration::from_millis(50),
        request_body_timeout: Duration::from_millis(50),
        keep_alive_timeout: Duration::from_millis(50),
        ..config()
    };
    let agent = Agent::with(config, upstream(nova.port), FakeDirectory::new(known())).await;
    for half in ["G", "GET / HTTP/1.1\r\nHost: x\r\n", "POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\na"] {
        let mut guest = agent.guest().await;
        guest.send(half).await;
        let answer = String::from_utf8(guest.rest().await.unwrap()).unwrap();
        assert_status(&answer, 408);
        assert!(answer.contains("connection: close\r\n"), "{answer}");
    }
    let mut silent = agent.guest().await;
    assert_eq!(silent.rest().await.unwrap(), b"");
    let mut idle = agent.guest().await;
    idle.send(GET).await;
    assert_status(&idle.answer().await, 200);
    assert_eq!(idle.rest().await.unwrap(), b"");
    // Half of a second request arrives together with the first.
    let mut half = agent.guest().await;
    half.send(format!("{GET}GET /")).await;
    assert_status(&half.answer().await, 200);
    assert_status(&String::from_utf8(half.rest().await.unwrap()).unwrap(), 408);
}

#[tokio::test]
async fn a_peer_without_an_identity_address_is_rejected() {
    let nova = Nova::saying(OK).await;
    let agent = Agent::before(&nova).await;
    let mut stranger = agent.stranger().await;
    assert_eq!(stranger.rest().await.unwrap(), b"");
    agent.assert_counted("metadata_rejected_connections_total{reason=\"not_an_identity\"} 1");
    agent.assert_counted("metadata_connections_total 0");
}

#[tokio::test]
async fn keep_alive_pipelining_and_half_close() {
    let mut nova = Nova::saying(OK).await;
    let agent = Agent::before(&nova).await;
    let mut guest = agent.guest().await;
    guest.send("GET /1 HTTP/1.1\r\n\r\nGET /2 HTTP/1.1\r\n\r\nGET /3 HTTP/1.1\r\n\r\n").await;
    for path in ["/1", "/2", "/3"] {
        assert_status(&guest.answer().await, 200);
        assert!(nova.next_text().await.starts_with(&format!("GET {path} ")));
    }
    guest.send("GET /4 HTTP/1.1\r\n\r\n").await;
    guest.stream.shutdown().await.unwrap();
    assert_status(&String::from_utf8(guest.rest().await.unwrap()).unwrap(), 200);
}

#[tokio::test]
async fn http_1_0_guests_are_served() {
    let nova =
        Nova::saying("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n").await;
    let agent = Agent::before(&nova).await;
    let mut guest = agent.guest().await;
    guest.send("GET / HTTP/1.0\r\n\r\n").await;
    let answer = String::from_utf8(guest.rest().await.unwrap()).unwrap();
    assert_eq!(answer, "HTTP/1.0 200 OK\r\n\r\nok");

    let nova = Nova::saying(OK).await;
    let agent = Agent::before(&nova).await;
    let mut guest = agent.guest().await;
    for _ in 0..2 {
        guest.send("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n").await;
        let answer = guest.answer().await;
        assert!(answer.starts_with("HTTP/1.0 200 OK\r\n") && answer.ends_with("\r\n\r\nok"), "{answer}");
        assert!(answer.contains("connection: keep-alive\r\n"), "{answer}");
    }
}

#[tokio::test]
async fn a_late_identity_is_waited_for() {
    let mut nova = Nova::saying(OK).await;
    let directory = FakeDirectory::new(pending());
    let agent = Agent::with(config(), upstream(nova.port), directory.clone()).await;
    let mut guest = agent.guest().await;
    guest.send(GET).await;
    directory.held().await;
    directory.set(known());
    assert_status(&guest.answer().await, 200);
    assert!(nova.next_text().await.contains(INSTANCE));
    agent.assert_counted("metadata_identity_holds_total{outcome=\"resolved\"} 1");
}

#[tokio::test]
async fn an_unknown_port_gets_503_until_its_grace_period_ends() {
    use metadata_agent::proxy::LookupState;
    let nova = Nova::saying(OK).await;
    let directory = FakeDirectory::new(pending());
    let config = ProxyConfig { identity_hold: Duration::from_millis(30), ..config() };
    let agent = Agent::with(config, upstream(nova.port), directory.clone()).await;
    let mut guest = agent.guest().await;
    guest.send(GET).await;
    let answer = guest.answer().await;
    assert_status(&answer, 503);
    assert!(answer.contains("retry-after: 1\r\n"), "{answer}");

    let long_ago = std::time::Instant::now().checked_sub(Duration::from_secs(121)).unwrap();
    for state in [LookupState::Pending { since: long_ago }, LookupState::NotAnInstance, LookupState::Gone] {
        directory.set(state);
        guest.send(GET).await;
        let answer = guest.answer().await;
        assert_status(&answer, 404);
        assert!(!answer.contains("retry-after"), "{answer}");
    }
    // The attachment is gone, so the connection is closed.
    assert_eq!(guest.rest().await.unwrap(), b"");
    assert!(nova.seen.is_empty());
}

/// It gets its identity address, also while no guest may connect.
#[tokio::test]
async fn the_agent_itself_is_answered_without_nova() {
    let nova = Nova::saying(OK).await;
    let directory = FakeDirectory::new(metadata_agent::proxy::LookupState::Agent);
    let config = ProxyConfig { connections_per_guest: 0, connections: 0, ..config() };
    let agent = Agent::with(config, upstream(nova.port), directory.clone()).await;
    let mut own = agent.guest().await;
    own.send(GET).await;
    let answer = String::from_utf8(own.rest().await.unwrap()).unwrap();
    assert_status(&answer, 200);
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(
        body.parse::<std::net::Ipv6Addr>().is_ok_and(|address| address.segments()[0] == 0xfd64),
        "{body}"
    );
    let mut long = agent.guest().await;
    long.send(&[b'x'; 1024]).await;
    long.rest().await.unwrap_err();
    assert!(nova.seen.is_empty());
    agent.assert_counted("metadata_request_duration_seconds_count 0");

    directory.set(known());
    let mut guest = agent.guest().await;
    assert_eq!(guest.rest().await.unwrap_or_default(), b"", "a guest is over its limit");
}

#[tokio::test]
async fn a_drain_finishes_requests_and_closes_idle_connections() {
    let directory = FakeDirectory::new(pending());
    let nova = Nova::saying(OK).await;
    let agent = Agent::with(config(), upstream(nova.port), directory.clone()).await;
    let mut idle = agent.guest().await;
    let mut busy = agent.guest().await;
    busy.send(GET).await;
    directory.held().await;
    agent.cancel.cancel();
    assert_eq!(idle.rest().await.unwrap(), b"");
    directory.set(known());
    let answer = String::from_utf8(busy.rest().await.unwrap()).unwrap();
    assert_status(&answer, 200);
    assert!(answer.contains("connection: close\r\n"), "{answer}");
    agent.tracker.close();
    soon("the drain", agent.tracker.wait()).await;
}

#[tokio::test]
async fn a_drain_ends_after_its_time_out() {
    let directory = FakeDirectory::new(pending());
    let nova = Nova::saying(OK).await;
    let config = ProxyConfig { drain_timeout: Duration::from_millis(30), ..config() };
    let agent = Agent::with(config, upstream(nova.port), directory.clone()).await;
    let mut busy = agent.guest().await;
    busy.send(GET).await;
    directory.held().await;
    agent.cancel.cancel();
    busy.rest().await.unwrap_err();
    agent.assert_counted("metadata_rejected_connections_total{reason=\"drain_timeout\"} 1");
}

#[tokio::test]
async fn a_guest_that_does_not_read_is_reset() {
    let mut nova = Nova::start(|_, _, _| {
        let size = 64 << 20;
        let mut answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n").into_bytes();
        answer.resize(answer.len() + size, b'x');
        Act::Say(answer)
    })
    .await;
    let config = ProxyConfig { write_timeout: Duration::from_millis(50), ..config() };
    let agent = Agent::with(config, upstream(nova.port), FakeDirectory::new(known())).await;
    let mut guest = agent.guest().await;
    guest.send(GET).await;
    nova.next().await;
    agent.tracker.close();
    soon("the reset", agent.tracker.wait()).await;
    guest.rest().await.unwrap_err();
    agent.assert_counted("metadata_rejected_connections_total{reason=\"write_timeout\"} 1");
}
