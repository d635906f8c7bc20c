//! The stand-in for Nova, whose responses all scenarios depend on, must behave as the real one.

use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::thread;

use metadata_tests::http_server::{Answer, Mode};
use metadata_tests::nova::{SECRET, signature};
use metadata_tests::wait::PATIENCE;
use metadata_tests::{Connection, Host, Instance, NovaStandIn, Port, Response};
use serde_json::Value;

/// Headers to send.
type Headers = Vec<(&'static str, String)>;

fn nova_on_a_host() -> (Host, NovaStandIn, Instance) {
    let host = Host::new();
    let nova = NovaStandIn::start(host.netns());
    let instance = recorded_instance();
    nova.add(instance.clone());
    (host, nova, instance)
}

fn dial(host: &Host, to: SocketAddr) -> Connection<TcpStream> {
    try_dial(host, to).expect("connect to the stand-in")
}

fn try_dial(host: &Host, to: SocketAddr) -> io::Result<Connection<TcpStream>> {
    let stream = host.netns().enter(|| TcpStream::connect_timeout(&to, PATIENCE))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(Connection::new(stream))
}

/// Returns the headers of a proxied request as Neutron's agent sends them.
fn proxied(instance: &Instance) -> Headers {
    vec![
        ("Accept", "*/*".to_owned()),
        ("X-Forwarded-For", instance.address.to_string()),
        ("X-Instance-ID", instance.id.to_string()),
        ("X-Tenant-ID", instance.project.to_string()),
        ("X-Instance-ID-Signature", signature(SECRET, &instance.id.to_string())),
    ]
}

fn ask(
    connection: &mut Connection<TcpStream>,
    method: &str,
    path: &str,
    headers: &[(&str, String)],
    body: &[u8],
) -> Response {
    let headers: Vec<(&str, &str)> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
    connection.request(method, path, &headers, body).unwrap_or_else(|e| panic!("{method} {path}: {e}"))
}

/// The instance of the recorded responses.
fn recorded_instance() -> Instance {
    let port = Port {
        id: "8bd84f03-572c-48fd-b677-fa0cb5cc5c87".parse().expect("a port id"),
        device: None,
        instance: "99b98a52-7477-4e8b-9cdd-1f2d4aafa59a".parse().expect("an instance id"),
        project: "5e1fc0deba5e4a11b0b0cafe00000001".parse().expect("a project id"),
        network: "71aa4019-943c-4df1-ad1d-460c7818897d".parse().expect("a network id"),
        mac: "fa:16:3e:01:00:00".parse().expect("a MAC address"),
        fixed_ips: vec![Ipv4Addr::new(10, 0, 0, 10).into()],
        allowed_addresses: Vec::new(),
        allowed_address_pairs: Vec::new(),
        port_security_enabled: None,
        subports: Vec::new(),
    };
    let key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPeerLabPeerLabPeerLabPeerLabPeerLabPeerLabPe peer@lab";
    let vendor_data = r##"{"region": "peerlab", "motd": "static vendor data from nova", "cloud-init": "#cloud-config\nruncmd: [ 'true' ]\n"}"##;
    Instance {
        name: "routed-0".to_owned(),
        number: 1,
        floating: Some(Ipv4Addr::new(203, 0, 113, 10)),
        dns: vec![Ipv4Addr::new(10, 0, 0, 2), Ipv4Addr::new(10, 0, 0, 3)],
        meta: vec![("role".to_owned(), "web".to_owned()), ("nr".to_owned(), "0".to_owned())],
        key: Some(("peerkey".to_owned(), key.to_owned())),
        user_data: Some(b"#cloud-config\nhostname: routed-0\n".to_vec()),
        vendor_data: vendor_data.to_owned(),
        reservation: "r-peer0000".to_owned(),
        ..Instance::from_port(&port)
    }
}

/// Recorded responses that are not from Nova.
const NOT_NOVAS: [(&str, &str); 1] =
    [("r:GET /openstack/latest/network_data.json#frag", "haproxy itself refuses a fragment")];

/// Replaces the seed, which differs in every response, by its length.
fn without_seed(body: &str) -> String {
    const KEY: &str = "\"random_seed\": \"";
    let Some((before, rest)) = body.split_once(KEY) else { return body.to_owned() };
    let (seed, after) = rest.split_once('"').expect("the end of the seed");
    format!("{before}{KEY}{} characters\"{after}", seed.len())
}

#[test]
fn the_nova_stand_in_answers_as_the_recorded_one() {
    let (host, nova, instance) = nova_on_a_host();
    let mut connection = dial(&host, nova.address());
    let mut compared = 0;
    for line in include_str!("../../fixtures/nova-get.jsonl").lines() {
        let recorded: Value = serde_json::from_str(line).expect("a recorded answer");
        let text = |key: &str| recorded[key].as_str().unwrap_or_else(|| panic!("{key} of {recorded}"));
        if NOT_NOVAS.iter().any(|(id, _)| *id == text("id")) {
            continue;
        }
        let answer = ask(&mut connection, text("method"), text("path"), &proxied(&instance), b"");
        let content_type =
            recorded["headers"].as_array().into_iter().flatten().find(|h| h[0] == "content-type");
        assert_eq!(recorded["status"], answer.status, "{}", text("id"));
        assert_eq!(content_type.and_then(|h| h[1].as_str()), answer.header("content-type"), "{}", text("id"));
        assert_eq!(without_seed(text("body")), without_seed(answer.text()), "{}", text("id"));
        compared += 1;
    }
    assert_eq!(compared, 76);
}

#[test]
fn the_nova_stand_in_verifies_the_client() {
    let (host, nova, instance) = nova_on_a_host();
    let mut connection = dial(&host, nova.address());
    let mut status = |change: &dyn Fn(&mut Headers)| {
        let mut headers = proxied(&instance);
        change(&mut headers);
        let answer = ask(&mut connection, "GET", "/latest/meta-data/instance-id", &headers, b"");
        (answer.status, answer.body.len())
    };
    let replace = |name: &'static str, value: String| {
        move |headers: &mut Headers| {
            headers.retain(|(have, _)| *have != name);
            headers.push((name, value.clone()));
        }
    };
    let without = |name: &'static str| move |headers: &mut Headers| headers.retain(|(have, _)| *have != name);
    assert_eq!(status(&|_| {}), (200, 10));
    assert_eq!(status(&without("X-Instance-ID")), (400, 171));
    assert_eq!(status(&without("X-Tenant-ID")).0, 400);
    assert_eq!(status(&without("X-Instance-ID-Signature")).0, 400);
    assert_eq!(
        status(&replace("X-Instance-ID-Signature", signature("other", &instance.id.to_string()))),
        (403, 154)
    );
    assert_eq!(status(&replace("X-Tenant-ID", "another".to_owned())), (404, 154));
    assert_eq!(status(&|headers| headers.push(("X-Metadata-Provider", "x".to_owned()))).0, 400);
    let stranger = "00000000-0000-4000-8000-000000000000";
    let strange = |headers: &mut Headers| {
        replace("X-Instance-ID", stranger.to_owned())(headers);
        replace("X-Instance-ID-Signature", signature(SECRET, stranger))(headers);
    };
    assert_eq!(status(&strange), (404, 154));
    assert_eq!(nova.requests().len(), 8);
    let provider = nova.requests().iter().filter(|r| r.header("x-metadata-provider").is_some()).count();
    assert_eq!(provider, 1);
    // Available to every client.
    assert_eq!(ask(&mut connection, "GET", "/", &[], b"").body.len(), 98);
}

#[test]
fn the_nova_stand_in_keeps_one_password() {
    let (host, nova, instance) = nova_on_a_host();
    let mut connection = dial(&host, nova.address());
    let headers = proxied(&instance);
    let mut ask = |method, body: &[u8]| {
        let answer = ask(&mut connection, method, "/openstack/2013-10-17/password", &headers, body);
        (answer.status, answer.body)
    };
    assert_eq!(ask("GET", b""), (200, Vec::new()));
    assert_eq!(ask("POST", &[b'x'; 1021]).0, 400);
    let longest = [b'\xff'; 1020];
    assert_eq!(ask("POST", &longest), (200, Vec::new()));
    assert_eq!(ask("GET", b""), (200, longest.to_vec()));
    let (status, page) = ask("POST", b"again");
    assert_eq!((status, page.len()), (409, 178));
    assert_eq!(ask("PUT", b"").0, 400);
    assert_eq!(nova.password(instance.id), Some(longest.to_vec()));
}

#[test]
fn the_nova_stand_in_crashes_without_a_length() {
    let (host, nova, instance) = nova_on_a_host();
    let headers = proxied(&instance);
    let post = |length: Option<&'static str>| {
        let length = length.map(|length| ("Content-Length", length));
        let headers = headers.iter().map(|(name, value)| (*name, value.as_str())).chain(length);
        let headers: Vec<_> = headers.collect();
        dial(&host, nova.address()).request("POST", "/openstack/2013-10-17/password", &headers, b"")
    };
    assert_eq!(post(None).expect_err("no answer").kind(), ErrorKind::UnexpectedEof);
    assert_eq!(post(Some("0")).expect("an answer").status, 200);
    assert_eq!(nova.password(instance.id), Some(Vec::new()));
}

#[test]
fn the_nova_stand_in_serves_bytes_and_files_as_they_are() {
    let (host, nova, instance) = nova_on_a_host();
    let bytes = vec![0x1f, 0x8b, 0, 0xff, b'\r', b'\n'];
    nova.add(Instance {
        user_data: Some(bytes.clone()),
        files: vec![("/etc/motd".to_owned(), b"hello".to_vec())],
        ..instance.clone()
    });
    let mut connection = dial(&host, nova.address());
    let mut get = |method, path| ask(&mut connection, method, path, &proxied(&instance), b"");
    assert_eq!(get("GET", "/openstack/latest/user_data").body, bytes);
    assert_eq!(get("GET", "/openstack/content/0000").body, b"hello");
    let document: Value =
        serde_json::from_slice(&get("GET", "/openstack/latest/meta_data.json").body).expect("a document");
    assert_eq!(document["files"][0]["content_path"], "/content/0000");
    let head = get("HEAD", "/openstack/latest/user_data");
    assert_eq!((head.status, head.header("content-length")), (200, Some("6")));
}

#[test]
fn the_nova_stand_in_fails_on_request_and_recovers() {
    let (host, nova, instance) = nova_on_a_host();
    let headers = proxied(&instance);
    let get = |connection: &mut Connection<TcpStream>| {
        let headers: Vec<(&str, &str)> =
            headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        connection.request("GET", "/latest/meta-data/hostname", &headers, b"")
    };
    let mut connection = dial(&host, nova.address());
    assert_eq!(get(&mut connection).expect("an answer").status, 200);

    nova.set_mode(Mode::Refuse);
    assert_eq!(connection.receive_rest().expect("the end of the connection"), b"");
    let refused = try_dial(&host, nova.address()).map(drop).expect_err("no listener");
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);

    nova.set_mode(Mode::ResetMidBody);
    let mut connection = dial(&host, nova.address());
    assert_eq!(get(&mut connection).expect_err("half an answer").kind(), ErrorKind::ConnectionReset);

    nova.set_mode(Mode::Fixed(Answer::redirect("http://elsewhere/")));
    let mut connection = dial(&host, nova.address());
    let answer = get(&mut connection).expect("an answer");
    assert_eq!((answer.status, answer.header("location")), (302, Some("http://elsewhere/")));

    nova.set_mode(Mode::Hold);
    nova.forget();
    thread::scope(|scope| {
        let held = scope.spawn(|| get(&mut connection));
        nova.wait_for(1, PATIENCE);
        nova.set_mode(Mode::Serve);
        let answer = held.join().expect("no panic").expect("an answer");
        assert_eq!(answer.text(), "routed-0.novalocal");
    });

    nova.set_mode(Mode::Static(vec![b'x'; 4096].into()));
    let mut connection = dial(&host, nova.address());
    for _ in 0..2 {
        assert_eq!(get(&mut connection).expect("an answer").body.len(), 4096);
    }
    assert_eq!(nova.requests().len(), 1);
}
