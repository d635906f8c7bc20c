//! A Nova that is down, slow or broken, or has just closed its connection.

use std::time::Duration;

use metadata_agent::proxy::{Endpoint, ProxyConfig, Scheme, UpstreamConfig};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio::sync::mpsc;

use crate::rig::*;

async fn agent(upstream: UpstreamConfig) -> Agent {
    Agent::with(ProxyConfig::default(), upstream, FakeDirectory::new(known())).await
}

#[tokio::test]
async fn an_unreachable_nova_gives_503() {
    let agent = agent(upstream(closed_port().await)).await;
    let answer = agent.ask(GET).await;
    assert_status(&answer, 503);
    assert!(answer.contains("retry-after: 1\r\n"), "{answer}");
    assert!(!answer.contains("127.0.0.1"), "{answer}");
    agent.assert_counted("metadata_upstream_errors_total{error=\"connect\"} 1");
}

#[tokio::test]
async fn an_unresolved_name_gives_503() {
    let endpoint = Endpoint::new(Scheme::Http, "nova.invalid", 8775).unwrap();
    let agent = agent(UpstreamConfig::new(vec![endpoint])).await;
    assert_status(&agent.ask(GET).await, 503);
    agent.assert_counted("metadata_upstream_errors_total{error=\"resolve\"} 1");
}

#[tokio::test]
async fn a_connection_that_is_not_accepted_times_out() {
    // Linux drops further SYNs if the backlog is full.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let full = socket.listen(1).unwrap();
    let address = full.local_addr().unwrap();
    let mut held = Vec::new();
    while let Ok(stream) =
        tokio::time::timeout(Duration::from_millis(200), tokio::net::TcpStream::connect(address)).await
    {
        held.push(stream.unwrap());
        assert!(held.len() < 100, "the backlog has a bound");
    }
    let config = UpstreamConfig { connect_timeout: Duration::from_millis(50), ..upstream(address.port()) };
    let agent = agent(config).await;
    assert_status(&agent.ask(GET).await, 503);
    agent.assert_counted("metadata_upstream_errors_total{error=\"connect_timeout\"} 1");
}

#[tokio::test]
async fn the_next_endpoint_serves_when_the_first_is_down() {
    let nova = Nova::saying(OK).await;
    let endpoints =
        [closed_port().await, nova.port].map(|port| Endpoint::new(Scheme::Http, "127.0.0.1", port).unwrap());
    let agent = agent(UpstreamConfig::new(endpoints.to_vec())).await;
    for _ in 0..2 {
        assert_status(&agent.ask(GET).await, 200);
    }
    agent.assert_counted("metadata_upstream_errors_total{error=\"connect\"} 1");
}

#[tokio::test]
async fn a_slow_nova_gives_504_and_its_connection_is_closed() {
    let mut nova = Nova::start(|connection, _, _| match connection {
        0 => Act::SayAndHang(Vec::new()),
        _ => Act::Say(OK.into()),
    })
    .await;
    let config = UpstreamConfig { answer_timeout: Duration::from_millis(50), ..upstream(nova.port) };
    let agent = agent(config).await;
    assert_status(&agent.ask(GET).await, 504);
    assert_eq!(soon("the close", nova.closed.recv()).await, Some(0));
    assert_status(&agent.ask(GET).await, 200);
    assert_eq!([nova.next().await.0, nova.next().await.0], [0, 1]);
}

#[tokio::test]
async fn broken_responses_give_502() {
    for (label, answer) in [
        ("broken", &b""[..]),
        ("broken", b"HTTP/1.1 200 OK\r\nContent-Le"),
        ("garbled", b"SSH-2.0-OpenSSH_9.2\r\n\r\n"),
        ("garbled", b"HTTP/1.1 abc\r\n\r\n"),
        ("upgraded", b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n"),
    ] {
        for reset in [false, true] {
            if reset && label != "broken" {
                continue;
            }
            let nova = Nova::start(move |_, _, _| {
                if reset { Act::SayAndReset(answer.to_vec()) } else { Act::SayAndClose(answer.to_vec()) }
            })
            .await;
            let agent = agent(upstream(nova.port)).await;
            let got = agent.ask(GET).await;
            assert_status(&got, 502);
            agent.assert_counted(&format!("metadata_upstream_errors_total{{error=\"{label}\"}} 1"));
        }
    }
}

#[tokio::test]
async fn a_truncated_response_does_not_look_complete() {
    let sized = "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf";
    let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n";
    for answer in [sized, chunked] {
        for reset in [false, true] {
            let nova = Nova::start(move |_, _, _| {
                if reset { Act::SayAndReset(answer.into()) } else { Act::SayAndClose(answer.into()) }
            })
            .await;
            let agent = agent(upstream(nova.port)).await;
            // An HTTP/1.0 guest sees the end of a chunked response only by the close.
            for request in [GET, "GET / HTTP/1.0\r\n\r\n"] {
                let mut guest = agent.guest().await;
                guest.send(request).await;
                guest.rest().await.expect_err("a reset");
            }
            agent.assert_counted("metadata_upstream_errors_total{error=\"body_broken\"} 2");
        }
    }
}

#[tokio::test]
async fn a_stalled_response_is_cut_off() {
    let mut nova =
        Nova::start(|_, _, _| Act::SayAndHang(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf".to_vec()))
            .await;
    let config = UpstreamConfig { stall_timeout: Duration::from_millis(50), ..upstream(nova.port) };
    let agent = agent(config).await;
    let mut guest = agent.guest().await;
    guest.send(GET).await;
    guest.rest().await.expect_err("a reset");
    assert_eq!(soon("the close", nova.closed.recv()).await, Some(0));
    agent.assert_counted("metadata_upstream_errors_total{error=\"body_stalled\"} 1");
}

#[tokio::test]
async fn connections_to_nova_are_reused() {
    let mut nova = Nova::saying(OK).await;
    let agent = agent(upstream(nova.port)).await;
    let mut guest = agent.guest().await;
    for _ in 0..5 {
        guest.send(GET).await;
        assert_status(&guest.answer().await, 200);
        assert_eq!(nova.next().await.0, 0);
    }
    agent.assert_counted("metadata_upstream_connections_total 1");
}

#[tokio::test]
async fn a_leaving_guest_closes_its_upstream_connection() {
    let mut nova =
        Nova::start(|_, _, _| Act::SayAndHang(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf".to_vec()))
            .await;
    let agent = agent(upstream(nova.port)).await;
    let mut guest = agent.guest().await;
    guest.send(GET).await;
    nova.next().await;
    guest.stream.set_zero_linger().unwrap();
    drop(guest);
    assert_eq!(soon("the close", nova.closed.recv()).await, Some(0));
}

#[tokio::test]
async fn an_idempotent_request_survives_a_stale_connection() {
    // Each connection serves one request and breaks at the second.
    for reset in [false, true] {
        let mut nova = Nova::start(move |_, number, _| match (number, reset) {
            (0, _) => Act::Say(OK.into()),
            (_, false) => Act::SayAndClose(Vec::new()),
            (_, true) => Act::SayAndReset(Vec::new()),
        })
        .await;
        let agent = agent(upstream(nova.port)).await;
        let mut guest = agent.guest().await;
        for method in ["GET", "OPTIONS", "PUT", "DELETE"] {
            guest.send(format!("{method} / HTTP/1.1\r\n\r\n")).await;
            assert_status(&guest.answer().await, 200);
        }
        let connections: Vec<_> =
            [nova.next().await, nova.next().await, nova.next().await].map(|s| s.0).into();
        assert_eq!(connections, [0, 0, 1]);
        agent.assert_counted("metadata_upstream_retries_total 3");
    }
}

#[tokio::test]
async fn a_post_is_sent_once_on_a_connection_of_its_own() {
    let mut nova = Nova::start(|_, _, request| {
        if request.starts_with(b"POST /lost") { Act::SayAndClose(Vec::new()) } else { Act::Say(OK.into()) }
    })
    .await;
    let agent = agent(upstream(nova.port)).await;
    let mut guest = agent.guest().await;
    let post = "POST / HTTP/1.1\r\nContent-Length: 1\r\n\r\na";
    for (request, status, connection) in [
        (GET, 200, 0),
        (post, 200, 1),
        (GET, 200, 0),
        (post, 200, 2),
        ("POST / HTTP/1.1\r\n\r\n", 200, 3),
        ("POST /lost HTTP/1.1\r\nContent-Length: 1\r\n\r\na", 502, 4),
        (GET, 200, 0),
    ] {
        guest.send(request).await;
        assert_status(&guest.answer().await, status);
        let (seen_on, seen) = nova.next().await;
        assert_eq!(seen_on, connection, "{request}");
        let closes = header(&seen, "connection").as_deref() == Some("close");
        assert_eq!(closes, connection > 0, "{request}");
        if connection > 0 {
            assert_eq!(soon("the close", nova.closed.recv()).await, Some(connection));
        }
    }
    assert!(nova.seen.is_empty());
    agent.assert_counted("metadata_upstream_retries_total 0");
}

#[tokio::test]
async fn a_body_is_forwarded_with_post_alone() {
    let mut nova = Nova::saying(OK).await;
    let agent = agent(upstream(nova.port)).await;
    let mut guest = agent.guest().await;
    let smuggled = "GET /smuggled HTTP/1.1\r\nX-Half: ";
    for method in ["GET", "PUT", "DELETE", "OPTIONS", "PATCH", "POST"] {
        let length = smuggled.len();
        let head = format!("{method} / HTTP/1.1\r\nContent-Type: a/b\r\nContent-Length: {length}\r\n\r\n");
        guest.send(head + smuggled).await;
        assert_status(&guest.answer().await, 200);
        let seen = nova.next_text().await;
        assert_eq!(seen.ends_with(smuggled), method == "POST", "{seen}");
        assert_eq!(header(seen.as_bytes(), "content-type").is_some(), method == "POST", "{seen}");
    }
}

#[tokio::test]
async fn a_server_that_answers_twice_is_not_trusted_again() {
    let twice = format!("{OK}HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nbad");
    let mut nova = Nova::start(move |connection, _, _| match connection {
        0 => Act::Say(twice.clone().into()),
        _ => Act::Say(OK.into()),
    })
    .await;
    let agent = agent(upstream(nova.port)).await;
    let mut guest = agent.guest().await;
    for connection in 0..4 {
        guest.send(GET).await;
        assert!(guest.answer().await.ends_with("\r\n\r\nok"));
        assert_eq!(nova.next().await.0, connection);
        // Later ones would be closed after a while even if they could be used again.
        if connection == 0 {
            assert_eq!(soon("the close", nova.closed.recv()).await, Some(0));
        }
    }
    agent.assert_counted("metadata_upstream_unsolicited_total 1");
}

const TIMEOUT: &str = "HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 4\r\n\r\nlate";

/// Gives up its first connection after the first answer, when it is told to. Tells when that is
/// closed.
async fn impatient_server() -> (u16, mpsc::UnboundedSender<()>, mpsc::UnboundedReceiver<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (tell, mut told) = mpsc::unbounded_channel();
    let (report, closed) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        let (mut first, _) = listener.accept().await.unwrap();
        let mut buffer = Vec::new();
        read_message(&mut first, &mut buffer).await.unwrap();
        first.write_all(OK.as_bytes()).await.unwrap();
        told.recv().await.unwrap();
        first.write_all(TIMEOUT.as_bytes()).await.unwrap();
        assert_eq!(read_message(&mut first, &mut buffer).await, None);
        report.send(()).unwrap();
        while let Ok((mut next, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut buffer = Vec::new();
                while read_message(&mut next, &mut buffer).await.is_some() {
                    next.write_all(OK.as_bytes()).await.unwrap();
                }
            });
        }
    });
    (port, tell, closed)
}

#[tokio::test]
async fn a_timeout_of_an_idle_connection_is_no_second_answer() {
    let (port, give_up, mut closed) = impatient_server().await;
    let agent = agent(upstream(port)).await;
    let mut guest = agent.guest().await;
    for number in 0..4 {
        guest.send(GET).await;
        assert!(guest.answer().await.ends_with("\r\n\r\nok"));
        if number == 0 {
            give_up.send(()).unwrap();
            assert_eq!(soon("the close", closed.recv()).await, Some(()));
        }
    }
    agent.assert_counted("metadata_upstream_unsolicited_total 0");
    agent.assert_counted("metadata_upstream_connections_total 2");
}

/// The server gives up the connection while the request is on its way.
#[tokio::test]
async fn a_timeout_that_crosses_a_request_is_tried_again() {
    let mut nova = Nova::start(|connection, number, _| match (connection, number) {
        (0, 1) | (2, _) => Act::SayAndClose(TIMEOUT.into()),
        _ => Act::Say(OK.into()),
    })
    .await;
    let agent = agent(upstream(nova.port)).await;
    let mut guest = agent.guest().await;
    let post = "POST / HTTP/1.1\r\nContent-Length: 1\r\n\r\na";
    // A new connection, and a POST on its own, are not idle before their request.
    for (request, status, connections) in [(GET, 200, &[0][..]), (GET, 200, &[0, 1]), (post, 408, &[2])] {
        guest.send(request).await;
        assert_status(&guest.answer().await, status);
        for connection in connections {
            assert_eq!(nova.next().await.0, *connection, "{request}");
        }
    }
    assert!(nova.seen.is_empty());
    agent.assert_counted("metadata_upstream_retries_total 1");
    agent.assert_counted("metadata_upstream_unsolicited_total 0");
}

/// Answers each request once, and the first once more when it is told to.
async fn late_server() -> (u16, mpsc::UnboundedSender<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (tell, mut told) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        let (mut first, _) = listener.accept().await.unwrap();
        read_message(&mut first, &mut Vec::new()).await.unwrap();
        first.write_all(OK.as_bytes()).await.unwrap();
        told.recv().await.unwrap();
        first.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nlate").await.unwrap();
        while let Ok((mut next, _)) = listener.accept().await {
            read_message(&mut next, &mut Vec::new()).await.unwrap();
            next.write_all(OK.as_bytes()).await.unwrap();
        }
    });
    (port, tell)
}

#[tokio::test]
async fn a_late_answer_is_not_taken_for_the_next_one() {
    for _ in 0..20 {
        let (port, late) = late_server().await;
        let agent = agent(upstream(port)).await;
        let mut guest = agent.guest().await;
        guest.send(GET).await;
        assert!(guest.answer().await.ends_with("\r\n\r\nok"));
        late.send(()).unwrap();
        // The late answer is written before this request is read.
        tokio::task::yield_now().await;
        guest.send(GET).await;
        assert!(guest.answer().await.ends_with("\r\n\r\nok"));
        agent.assert_counted("metadata_upstream_unsolicited_total 1");
    }
}

#[tokio::test]
async fn requests_of_one_guest_in_flight_are_bounded() {
    let mut nova = Nova::start(|connection, _, _| match connection {
        0 | 1 => Act::SayAndHang(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf".to_vec()),
        _ => Act::Say(OK.into()),
    })
    .await;
    let limits = UpstreamConfig {
        requests_per_guest: 2,
        connect_timeout: Duration::from_millis(50),
        ..upstream(nova.port)
    };
    let agent = agent(limits).await;
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut guest = agent.guest().await;
        guest.send(GET).await;
        nova.next().await;
        held.push(guest);
    }
    let refused = agent.ask(GET).await;
    assert_status(&refused, 503);
    assert!(refused.contains("retry-after: 1\r\n"), "{refused}");
    agent.assert_counted("metadata_upstream_errors_total{error=\"busy\"} 1");
    agent.assert_counted("metadata_upstream_waits_total{bound=\"guest\"} 1");
    assert!(nova.seen.is_empty());
}
