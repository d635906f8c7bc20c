//! Nova's responses, and what the guest sees of them.

use std::io::Write;

use tokio::io::AsyncReadExt;

use crate::rig::*;

/// Sends the request twice on one connection, which shows that the response ended where it should.
async fn relayed(nova: Vec<u8>, request: &str, size: usize) -> Vec<u8> {
    let nova = Nova::saying(nova).await;
    let agent = Agent::before(&nova).await;
    let mut guest = agent.guest().await;
    let mut answers = Vec::new();
    for _ in 0..2 {
        guest.send(request).await;
        let mut answer = vec![0; size];
        soon("the answer", guest.stream.read_exact(&mut answer)).await.unwrap();
        answers.push(answer);
    }
    assert_eq!(answers[0], answers[1]);
    answers.remove(0)
}

#[track_caller]
fn lower_names(answer: &str) -> String {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let head: Vec<_> = head
        .split("\r\n")
        .map(|line| match line.split_once(": ") {
            Some((name, value)) => format!("{}: {value}", name.to_lowercase()),
            None => line.to_owned(),
        })
        .collect();
    head.join("\r\n") + "\r\n\r\n" + body
}

#[tokio::test]
async fn every_status_passes_unchanged_with_and_without_body() {
    for line in [
        "200 OK",
        "201 Created",
        "202 Accepted",
        "301 Moved Permanently",
        "302 LookupOutcome",
        "400 Bad Request",
        "401 Unauthorized",
        "403 Forbidden",
        "404 Not LookupOutcome",
        "405 Method Not Allowed",
        "409 Conflict",
        "413 Request Entity Too Large",
        "429 Enough Of You",
        "500 Internal Server Error",
        "501 Not Implemented",
        "502 Bad Gateway",
        "503 Service Unavailable",
        "504 Gateway Timeout",
        "599 Whatever",
    ] {
        for body in ["", "because"] {
            let answer = format!(
                "HTTP/1.1 {line}\r\nContent-Type: text/html; charset=UTF-8\r\nRetry-After: 7\r\n\
                 Location: http://evil.example/\r\nSet-Cookie: a\r\nSet-Cookie: b\r\n\
                 Date: Mon, 23 Nov 2026 00:00:00 GMT\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            );
            let got = relayed(answer.clone().into_bytes(), GET, answer.len()).await;
            assert_eq!(String::from_utf8(got).unwrap(), lower_names(&answer));
        }
    }
}

#[tokio::test]
async fn responses_without_a_body_have_none() {
    for (request, answer) in [
        ("HEAD / HTTP/1.1\r\n\r\n", "HTTP/1.1 200 OK\r\ncontent-length: 1234\r\n\r\n"),
        (GET, "HTTP/1.1 204 No Content\r\nx: y\r\n\r\n"),
        (GET, "HTTP/1.1 304 Not Modified\r\netag: y\r\n\r\n"),
    ] {
        let got = relayed(answer.into(), request, answer.len()).await;
        assert_eq!(String::from_utf8(got).unwrap(), answer);
    }
}

#[tokio::test]
async fn binary_and_compressed_bodies_pass_byte_for_byte() {
    let noise: Vec<u8> = (0..65536u32).map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    gzip.write_all(&vec![b'#'; 100_000]).unwrap();
    for (encoding, body) in [("identity", noise), ("gzip", gzip.finish().unwrap())] {
        let head = format!(
            "HTTP/1.1 200 OK\r\ncontent-encoding: {encoding}\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        let answer = [head.as_bytes(), &body].concat();
        assert!(relayed(answer.clone(), GET, answer.len()).await == answer, "{encoding}");
    }
}

#[tokio::test]
async fn chunked_responses_pass_without_hop_by_hop_headers() {
    let nova = Nova::saying(
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: keep-alive, X-Hop\r\nX-Hop: 1\r\n\
         Keep-Alive: timeout=5\r\nTrailer: X-Sum\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\nX-Sum: 1\r\n\r\n",
    )
    .await;
    let agent = Agent::before(&nova).await;
    let mut guest = agent.guest().await;
    guest.send("GET / HTTP/1.1\r\nConnection: close\r\nTE: trailers\r\n\r\n").await;
    let answer = String::from_utf8(guest.rest().await.unwrap()).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    for gone in ["x-hop", "timeout=5", "trailer", "x-sum"] {
        assert!(!answer.to_lowercase().contains(gone), "{gone} in {answer}");
    }
    assert!(head.contains("transfer-encoding: chunked"), "{head}");
    let data: String = body.split("\r\n").skip(1).step_by(2).collect();
    assert_eq!(data, "abcde");
    assert!(body.ends_with("0\r\n\r\n"), "{body}");
}

#[tokio::test]
async fn a_response_that_ends_with_its_connection_is_relayed() {
    let nova =
        Nova::start(|_, _, _| Act::SayAndClose(b"HTTP/1.0 200 OK\r\n\r\nuntil the end".to_vec())).await;
    let agent = Agent::before(&nova).await;
    let mut guest = agent.guest().await;
    guest.send("GET / HTTP/1.0\r\n\r\n").await;
    let answer = String::from_utf8(guest.rest().await.unwrap()).unwrap();
    assert_eq!(answer, "HTTP/1.0 200 OK\r\n\r\nuntil the end");
}

#[tokio::test]
async fn a_403_of_nova_passes_and_is_counted() {
    let nova = Nova::saying("HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n").await;
    let agent = Agent::before(&nova).await;
    assert_status(&agent.ask(GET).await, 403);
    agent.assert_counted("metadata_upstream_forbidden_total 1");
    agent.assert_counted("metadata_requests_total{code=\"403\"} 1");
}
