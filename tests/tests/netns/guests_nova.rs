//! Nova's responses reach the guest unchanged, and a failure of Nova reaches it as a failure.

use std::io::{ErrorKind, Write as _};
use std::net::TcpStream;

use flate2::Compression;
use flate2::write::GzEncoder;
use metadata_tests::http_server::{Answer, Mode};
use metadata_tests::nova::{SECRET, signature};
use metadata_tests::two_tenants::HOSTNAME;
use metadata_tests::wait::PATIENCE;
use metadata_tests::{Connection, Instance, Response, ServedTenants, Tenant};
use serde_json::Value;

/// They are served as soon as Nova is up.
#[test]
fn guests_get_retry_later_while_nova_is_down() {
    let tenants = ServedTenants::new();
    let ServedTenants { process, nova, red, blue, .. } = &tenants;
    let mut kept = red.connect();
    let get = |connection: &mut Connection<TcpStream>| {
        connection.request("GET", HOSTNAME, &[], b"").expect("an answer")
    };
    assert_eq!(get(&mut kept).status, 200);
    nova.set_mode(Mode::Refuse);
    for answer in [get(&mut kept), red.get(HOSTNAME), blue.get(HOSTNAME)] {
        assert_eq!((answer.status, answer.header("retry-after")), (503, Some("1")), "{answer:?}");
    }
    assert_eq!(process.count("metadata_upstream_errors_total{error=\"connect\"}"), 3);
    nova.set_mode(Mode::Serve);
    assert_eq!(get(&mut kept).text(), red.hostname());
    red.assert_hostname_served();
    blue.assert_hostname_served();
}

#[test]
fn a_request_that_nova_never_answers_delays_no_other() {
    let tenants = ServedTenants::new();
    let ServedTenants { nova, red, blue, .. } = &tenants;
    nova.set_mode(Mode::HoldPath("/latest/user-data"));
    let mut held = red.connect();
    held.send("GET /latest/user-data HTTP/1.1\r\nHost: x\r\n\r\n").expect("a request");
    nova.wait_for(1, PATIENCE);
    for _ in 0..10 {
        blue.assert_hostname_served();
        red.assert_hostname_served();
    }
    held.stream().set_nonblocking(true).expect("look without waiting");
    let looked = held.stream().peek(&mut [0]).expect_err("no answer yet");
    assert_eq!(looked.kind(), ErrorKind::WouldBlock);
    held.stream().set_nonblocking(false).expect("wait again");
    nova.set_mode(Mode::Serve);
    let answer = held.receive().expect("an answer");
    assert_eq!(answer.body, Instance::from_port(&red.port).user_data.expect("user data"));
}

#[test]
fn a_truncated_answer_of_nova_is_not_passed_as_complete() {
    let tenants = ServedTenants::new();
    let ServedTenants { nova, red, blue, .. } = &tenants;
    nova.set_mode(Mode::ResetMidBody);
    let error = red.try_get(HOSTNAME).expect_err("half an answer");
    assert!(matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof), "{error}");
    nova.set_mode(Mode::Serve);
    red.assert_hostname_served();
    blue.assert_hostname_served();
}

/// Returns bytes without a pattern that could hide a lost segment, the same in every run.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_u32;
    let next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state.to_be_bytes()[0]
    };
    std::iter::repeat_with(next).take(length).collect()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).expect("compress");
    encoder.finish().expect("compress")
}

#[test]
fn user_data_arrives_byte_for_byte() {
    let tenants = ServedTenants::new();
    let ServedTenants { nova, red, blue, .. } = &tenants;
    let script = b"#cloud-config\n".repeat(1000);
    for (guest, bytes) in [(red, noise(64 * 1024)), (blue, gzip(&script))] {
        nova.add(Instance { user_data: Some(bytes.clone()), ..Instance::from_port(&guest.port) });
        for path in ["/openstack/latest/user_data", "/latest/user-data"] {
            let accepting = [("Accept-Encoding", "gzip, deflate")];
            let answer = guest.connect().request("GET", path, &accepting, b"").expect("an answer");
            assert_eq!(answer.header("content-length"), Some(bytes.len().to_string().as_str()));
            assert_eq!(answer.header("content-encoding"), None);
            assert!(answer.body == bytes, "{path}: the body differs from the body of Nova");
        }
    }
}

#[test]
fn a_mebibyte_arrives_byte_for_byte() {
    let tenants = ServedTenants::new();
    let ServedTenants { nova, red, blue, .. } = &tenants;
    let bytes = noise(1024 * 1024);
    nova.set_mode(Mode::Fixed(Answer::new(200, "application/octet-stream", bytes.clone())));
    for guest in [red, blue] {
        assert!(
            guest.get("/openstack/latest/user_data").body == bytes,
            "the body differs from the body of Nova"
        );
    }
}

/// Recorded requests that the agent answers itself, with the status.
const NOT_FOR_NOVA: [(&str, u16); 1] = [("r:GET /openstack/latest/network_data.json#frag", 400)];

/// Status, headers without those that depend on the time, body.
type Comparable = (u16, Vec<(String, String)>, Vec<u8>);

fn comparable(response: Response) -> Comparable {
    let Response { status, mut headers, mut body, .. } = response;
    headers.retain(|(name, _)| !name.eq_ignore_ascii_case("date"));
    headers.sort();
    blank_seed(&mut body);
    (status, headers, body)
}

/// Nova generates a new seed for every request. It is blanked at its full length.
fn blank_seed(body: &mut [u8]) {
    const KEY: &[u8] = b"\"random_seed\": \"";
    let Some(at) = body.windows(KEY.len()).position(|window| window == KEY) else { return };
    let seed = body[at + KEY.len()..].iter_mut().take_while(|byte| **byte != b'"');
    seed.for_each(|byte| *byte = b'x');
}

#[test]
fn every_recorded_get_is_answered_as_by_nova() {
    let tenants = ServedTenants::new();
    let ServedTenants { nova, red, blue, host, .. } = &tenants;
    let instance = Instance::from_port(&red.port);
    nova.add(Instance { dns: vec![[10, 0, 0, 2].into()], ..instance.clone() });
    let id = instance.id.to_string();
    let (signed, project) = (signature(SECRET, &id), instance.project.to_string());
    let proxied = [
        ("Accept", "*/*"),
        ("X-Forwarded-For", "10.0.0.5"),
        ("X-Instance-ID", &id),
        ("X-Tenant-ID", &project),
        ("X-Instance-ID-Signature", &signed),
    ];
    let direct = host.netns().enter(|| TcpStream::connect(nova.address())).expect("connect to Nova");
    direct.set_read_timeout(Some(PATIENCE)).expect("be patient");
    let mut direct = Connection::new(direct);
    let (mut guest, mut neighbour) = (red.connect(), blue.connect());
    let mut compared = 0;
    for line in include_str!("../../fixtures/nova-get.jsonl").lines() {
        let recorded: Value = serde_json::from_str(line).expect("a recorded answer");
        let text = |key: &str| recorded[key].as_str().unwrap_or_else(|| panic!("{key} of {recorded}"));
        let path = text("path");
        let get = |headers: &[(&str, &str)], from: &mut Connection<TcpStream>| {
            from.request("GET", path, headers, b"").unwrap_or_else(|e| panic!("GET {path}: {e}"))
        };
        if let Some((_, status)) = NOT_FOR_NOVA.iter().find(|(id, _)| *id == text("id")) {
            assert_eq!(get(&[], &mut red.connect()).status, *status, "{}", text("id"));
            continue;
        }
        let relayed = comparable(get(&[], &mut guest));
        assert_eq!(relayed, comparable(get(&proxied, &mut direct)), "{}", text("id"));
        assert_eq!(get(&[], &mut neighbour).status, relayed.0, "{}", text("id"));
        compared += 1;
    }
    assert_eq!(compared, 76);
    assert_own(red);
    assert_own(blue);
}

fn assert_own(guest: &Tenant) {
    let document: Value =
        serde_json::from_slice(&guest.get("/openstack/latest/meta_data.json").body).expect("a document");
    assert_eq!(document["uuid"], guest.port.instance.to_string());
}
