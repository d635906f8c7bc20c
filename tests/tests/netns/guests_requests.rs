//! The HTTP of guests through the real path: every method, framing and status arrives as sent.

use metadata_tests::ServedTenants;
use metadata_tests::http_server::{Answer, Mode};
use metadata_tests::two_tenants::HOSTNAME;

const PASSWORD: &str = "/openstack/2013-10-17/password";
/// The default of `request_body_limit`.
const BODY_LIMIT: usize = 64 * 1024;

fn posted(framing: &str) -> String {
    format!("POST {PASSWORD} HTTP/1.1\r\nHost: 169.254.169.254\r\n{framing}\r\n\r\n")
}

#[test]
fn a_password_in_several_segments_arrives_whole_and_only_once() {
    let tenants = ServedTenants::new();
    let ServedTenants { nova, red, blue, .. } = &tenants;
    let mut connection = red.connect();
    let head = posted("Content-Length: 9");
    let (begin, end) = head.split_at(20);
    for segment in [begin.as_bytes(), end.as_bytes(), b"p\xff\0", b"\r\nw", b"ord"] {
        connection.send(segment).expect("a segment");
    }
    let answer = connection.receive().expect("an answer");
    assert_eq!((answer.status, answer.body.len()), (200, 0));
    assert_eq!(nova.password(red.port.instance).as_deref(), Some(&b"p\xff\0\r\nword"[..]));

    assert_eq!(red.get(PASSWORD).body, b"p\xff\0\r\nword");
    assert_eq!(red.post(PASSWORD, b"another").status, 409);
    assert_eq!(red.get(PASSWORD).body, b"p\xff\0\r\nword");
    // The neighbour with the same address does not have one.
    let none = blue.get(PASSWORD);
    assert_eq!((none.status, none.body.len()), (200, 0));
}

/// Nova crashes at a posted password without a length.
#[test]
fn an_empty_body_reaches_nova_with_its_length() {
    let tenants = ServedTenants::new();
    let ServedTenants { nova, red, .. } = &tenants;
    // The status of each method without a body, and the length that Nova was told.
    let wanted = [
        ("POST", 200, Some("0")),
        ("PUT", 400, Some("0")),
        ("PATCH", 400, Some("0")),
        ("DELETE", 400, Some("0")),
        ("OPTIONS", 400, Some("0")),
        ("GET", 200, None),
        ("HEAD", 400, None),
    ];
    for framing in [&[][..], &[("Content-Length", "0")]] {
        for (method, status, length) in wanted {
            nova.forget();
            let answer = red.connect().request(method, PASSWORD, framing, b"").expect("an answer");
            let told = nova.requests()[0].header("content-length");
            assert_eq!((answer.status, told.as_deref()), (status, length), "{method} {framing:?}");
        }
    }
    let mut chunked = red.connect();
    chunked.send(posted("Transfer-Encoding: chunked") + "0\r\n\r\n").expect("an empty body");
    assert_eq!(chunked.receive().expect("an answer").status, 200);
    assert_eq!(nova.password(red.port.instance), Some(Vec::new()));
}

#[test]
fn a_chunked_password_reaches_nova_without_its_chunks() {
    let tenants = ServedTenants::new();
    let ServedTenants { nova, red, blue, .. } = &tenants;
    let mut connection = blue.connect();
    for segment in [&posted("Transfer-Encoding: chunked"), "4\r\npass", "\r\n4;x=y\r\nword\r\n", "0\r\n\r\n"]
    {
        connection.send(segment).expect("a segment");
    }
    assert_eq!(connection.receive().expect("an answer").status, 200);
    assert_eq!(nova.password(blue.port.instance).as_deref(), Some(&b"password"[..]));
    assert_eq!(nova.password(red.port.instance), None);
    assert_eq!(&nova.requests()[0].body[..], b"password");
    assert_eq!(nova.requests()[0].header("transfer-encoding"), None);
}

#[test]
fn expect_100_continue_is_answered() {
    let tenants = ServedTenants::new();
    let ServedTenants { nova, red, .. } = &tenants;
    let mut connection = red.connect();
    connection.send(posted("Content-Length: 8\r\nExpect: 100-continue")).expect("a head");
    assert_eq!(connection.receive_head().expect("an interim answer").status, 100);
    connection.send("password").expect("a body");
    assert_eq!(connection.receive().expect("an answer").status, 200);
    assert_eq!(nova.password(red.port.instance).as_deref(), Some(&b"password"[..]));

    // A request whose body would be refused gets the refusal instead.
    nova.forget();
    let mut connection = red.connect();
    let length = BODY_LIMIT + 1;
    connection.send(posted(&format!("Content-Length: {length}\r\nExpect: 100-continue"))).expect("a head");
    assert_eq!(connection.receive().expect("an answer").status, 413);
    assert_eq!(nova.requests().len(), 0);
}

#[test]
fn a_body_at_the_limit_passes_and_one_byte_more_does_not() {
    let tenants = ServedTenants::new();
    let ServedTenants { process, nova, red, blue, .. } = &tenants;
    let body = vec![b'x'; BODY_LIMIT + 1];
    // Nova's own limit is far lower, so it refuses what the agent passes on.
    assert_eq!(red.post(PASSWORD, &body[1..]).status, 400);
    assert_eq!(nova.requests()[0].body.len(), BODY_LIMIT);

    assert_eq!(red.post(PASSWORD, &body).status, 413);
    let mut chunked = red.connect();
    let chunk = format!("{}{:x}\r\n", posted("Transfer-Encoding: chunked"), body.len());
    chunked.send([chunk.as_bytes(), &body, b"\r\n0\r\n\r\n"].concat()).expect("a request");
    assert_eq!(chunked.receive().expect("an answer").status, 413);
    assert_eq!(process.count("metadata_rejected_requests_total{reason=\"body_too_large\"}"), 2);
    assert_eq!(nova.requests().len(), 1);
    blue.assert_hostname_served();
}

#[test]
fn http_1_0_gets_an_answer_and_a_closed_connection() {
    let tenants = ServedTenants::new();
    for guest in [&tenants.red, &tenants.blue] {
        let mut connection = guest.connect();
        connection.send(format!("GET {HOSTNAME} HTTP/1.0\r\n\r\n")).expect("a request");
        assert_eq!(connection.receive().expect("an answer").text(), guest.hostname());
        assert_eq!(connection.receive_rest().expect("the end"), b"");
    }
}

#[test]
fn one_connection_carries_many_and_pipelined_requests() {
    let tenants = ServedTenants::new();
    let ServedTenants { process, nova, red, blue, .. } = &tenants;
    let get = |path| format!("GET {path} HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n");
    for guest in [red, blue] {
        nova.forget();
        let mut connection = guest.connect();
        for _ in 0..3 {
            let answer = connection.request("GET", HOSTNAME, &[], b"").expect("an answer");
            assert_eq!(answer.text(), guest.hostname());
        }
        connection.send([get(HOSTNAME), get("/latest/nope"), get(HOSTNAME)].concat()).expect("three at once");
        let answers = [(); 3].map(|()| connection.receive().expect("an answer"));
        assert_eq!(answers.each_ref().map(|answer| answer.status), [200, 404, 200]);
        assert_eq!(answers[2].text(), guest.hostname());
        let own = guest.port.instance.to_string();
        assert!(nova.requests().iter().all(|r| r.header("x-instance-id").as_ref() == Some(&own)));
        assert_eq!(nova.requests().len(), 6);
    }
    assert_eq!(process.count("metadata_connections_total"), 2);
}

#[test]
fn head_reports_the_length_and_sends_no_body() {
    let tenants = ServedTenants::new();
    for guest in [&tenants.red, &tenants.blue] {
        let mut connection = guest.connect();
        let head = connection.request("HEAD", HOSTNAME, &[], b"").expect("a head");
        assert_eq!(head.header("content-length"), Some(guest.hostname().len().to_string().as_str()));
        // If there had been a body, the next response would begin with it.
        let answer = connection.request("GET", HOSTNAME, &[], b"").expect("an answer");
        assert_eq!(answer.text(), guest.hostname());
    }
}

#[test]
fn every_status_passes_with_and_without_a_body() {
    let tenants = ServedTenants::new();
    let ServedTenants { nova, red, blue, .. } = &tenants;
    let mut connections = [red.connect(), blue.connect()];
    for status in [
        200, 201, 202, 204, 300, 302, 304, 400, 401, 403, 404, 405, 409, 410, 413, 418, 429, 500, 501, 502,
        503, 504, 511,
    ] {
        for body in ["", "what Nova has to say"] {
            let mut answer = Answer::text(status, body);
            answer.headers.push(("retry-after".to_owned(), "7".to_owned()));
            answer.headers.push(("location".to_owned(), "http://elsewhere/".to_owned()));
            nova.set_mode(Mode::Fixed(answer));
            for connection in &mut connections {
                let answer = connection.request("GET", "/x", &[], b"").expect("an answer");
                let has_body = status != 204 && status != 304;
                assert_eq!((answer.status, answer.text()), (status, if has_body { body } else { "" }));
                assert_eq!(answer.header("retry-after"), Some("7"), "{status}");
                assert_eq!(answer.header("location"), Some("http://elsewhere/"), "{status}");
            }
        }
    }
}

#[test]
fn every_method_reaches_nova_unchanged() {
    let tenants = ServedTenants::new();
    let ServedTenants { nova, red, blue, .. } = &tenants;
    for guest in [red, blue] {
        for method in ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "PROPFIND"] {
            let answer = guest.connect().request(method, HOSTNAME, &[], b"").expect("an answer");
            assert_eq!(answer.status, 200, "{method}");
            let asked = nova.requests().pop().expect("a request");
            assert_eq!((asked.method.as_str(), asked.path.as_str()), (method, HOSTNAME));
            assert_eq!(asked.header("x-instance-id"), Some(guest.port.instance.to_string()));
        }
    }
}
