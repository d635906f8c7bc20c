//! The rig itself: what scenarios lean on must hold before they mean anything.

use std::fs;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt as _;
use std::panic::{self, AssertUnwindSafe};
use std::process::{Command, Stdio};
use std::thread;

use metadata_tests::agent::NotReady;
use metadata_tests::http_server::{Answer, Mode};
use metadata_tests::nova::{SECRET, signature};
use metadata_tests::wait::PATIENCE;
use metadata_tests::{
    Agent, AgentProcess, Connection, Guest, Host, HostState, Instance, Netns, NextHop, NovaStandIn, Response,
    legacy, netns, privileged, wait,
};
use serde_json::Value;

const ADDRESS: [u8; 4] = [10, 0, 0, 5];

#[test]
fn guests_with_one_address_reach_the_legacy_path_of_their_own_network() {
    if !privileged() {
        return;
    }
    let host = Host::new();
    let (red, blue) = (host.network(), host.network());
    let legacies = [red.legacy(), blue.legacy()];
    for (network, legacy) in [red, blue].iter().zip(&legacies) {
        let mut on_link = network.spec([10, 0, 0, 6]);
        on_link.next_hop = NextHop::OnLink;
        let guests = [network.guest(ADDRESS), network.plug(on_link)];
        let expected = format!("{}{}", legacy::GREETING, network.id);
        for guest in &guests {
            assert_eq!(guest.get("/").text(), expected);
            assert_eq!(guest.get_v6("/").text(), expected);
        }
        assert_eq!(legacy.requests().len(), 4);
    }
}

#[test]
fn a_guest_chooses_its_source_port_and_its_segments() {
    if !privileged() {
        return;
    }
    let host = Host::new();
    let network = host.network();
    let legacy = network.legacy();
    let guest = network.guest(ADDRESS);
    let mut connection = guest.connect_from((ADDRESS, 40_000).into());
    connection.send("GET /half").expect("first segment");
    connection.send("-way HTTP/1.0\r\n\r\n").expect("second segment");
    let response = connection.receive().expect("an answer");
    assert!(response.status_line.starts_with("HTTP/1.0 200"), "{}", response.status_line);
    let requests = legacy.requests();
    assert_eq!(requests[0].path, "/half-way");
    assert_eq!(requests[0].peer.port(), 40_000);
}

#[test]
fn a_host_and_its_networks_leave_nothing_behind_even_after_a_panic() {
    if !privileged() {
        return;
    }
    let ours = |name: &str| name.starts_with(&format!("mt{}-", std::process::id()));
    let kept = Netns::new("kept");
    let host = Host::new();
    let before = HostState::capture(&host);
    {
        let network = host.network();
        let _legacy = network.legacy();
        let guest = network.guest(ADDRESS);
        let diff = before.diff(&HostState::capture(&host));
        for fact in [format!("+ link {} ", guest.tap), format!("+ link {} ", network.bridge)] {
            assert!(diff.contains(&fact), "{fact:?} is missing in\n{diff}");
        }
        host.netns().ip(&format!("link del {}", network.bridge));
    }
    before.assert_same(&HostState::capture(&host));

    let (name, folder) = (host.netns().name().to_owned(), host.folder().to_owned());
    let panicked = panic::catch_unwind(AssertUnwindSafe(|| {
        let host = host;
        host.tap("tap0");
        host.netns().run(&["false"]);
    }));
    assert!(panicked.is_err());
    assert!(!netns::names().contains(&name));
    assert!(!folder.exists());
    assert!(ours(kept.name()) && netns::names().contains(&kept.name().to_owned()));
}

#[test]
fn a_host_state_tells_filters_routes_neighbours_and_pins() {
    if !privileged() {
        return;
    }
    let host = Host::new();
    host.tap("tap0");
    let before = HostState::capture(&host);
    host.netns().run(&["tc", "qdisc", "add", "dev", "tap0", "clsact"]);
    host.netns().run(&["tc", "filter", "add", "dev", "tap0", "ingress", "bpf", "bytecode", "1,6 0 0 0"]);
    host.netns().ip("address add 192.0.2.1/24 dev tap0\n\
         neighbour add 192.0.2.2 lladdr fa:16:3e:00:00:02 nud permanent dev tap0\n\
         route add fd00::/64 dev tap0");
    fs::create_dir(host.bpffs().join("pinned")).expect("make a folder on the BPF file system");
    let diff = before.diff(&HostState::capture(&host));
    for fact in [
        "qdisc",
        "filter tap0 ingress",
        "route 192.0.2.0/24",
        "route fd00::/64",
        "neighbour 192.0.2.2",
        "pin",
    ] {
        assert!(diff.lines().any(|line| line.starts_with(&format!("+ {fact}"))), "no {fact} in\n{diff}");
    }
    assert_eq!(before.diff(&before), "");
}

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

fn try_dial(host: &Host, to: SocketAddr) -> std::io::Result<Connection<TcpStream>> {
    let stream = host.netns().enter(|| TcpStream::connect_timeout(&to, PATIENCE))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(Connection::new(stream))
}

/// The headers of a proxied request, as the old agent sends them.
fn proxied(instance: &Instance) -> Vec<(&'static str, String)> {
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

/// The instance whose answers were recorded.
fn recorded_instance() -> Instance {
    let port = metadata_tests::Port {
        id: "8bd84f03-572c-48fd-b677-fa0cb5cc5c87".parse().expect("a port id"),
        device: None,
        instance: "99b98a52-7477-4e8b-9cdd-1f2d4aafa59a".parse().expect("an instance id"),
        project: "5e1fc0deba5e4a11b0b0cafe00000001".parse().expect("a project id"),
        network: "71aa4019-943c-4df1-ad1d-460c7818897d".parse().expect("a network id"),
        mac: "fa:16:3e:01:00:00".parse().expect("a MAC address"),
        fixed_ips: vec![Ipv4Addr::new(10, 0, 0, 10).into()],
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
        ..Instance::of(&port)
    }
}

/// Lines that Nova had no part in.
const NOT_NOVAS: [(&str, &str); 1] =
    [("r:GET /openstack/latest/network_data.json#frag", "haproxy itself refuses a fragment")];

/// Replaces the one thing that is another in every answer by its length.
fn without_seed(body: &str) -> String {
    const KEY: &str = "\"random_seed\": \"";
    let Some((before, rest)) = body.split_once(KEY) else { return body.to_owned() };
    let (seed, after) = rest.split_once('"').expect("the end of the seed");
    format!("{before}{KEY}{} characters\"{after}", seed.len())
}

#[test]
fn the_nova_stand_in_answers_as_the_recorded_one() {
    if !privileged() {
        return;
    }
    let (host, nova, instance) = nova_on_a_host();
    let mut connection = dial(&host, nova.address());
    let mut compared = 0;
    for line in include_str!("../fixtures/nova-get.jsonl").lines() {
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
fn the_nova_stand_in_checks_who_asks() {
    if !privileged() {
        return;
    }
    let (host, nova, instance) = nova_on_a_host();
    let mut connection = dial(&host, nova.address());
    let mut status = |change: &dyn Fn(&mut Vec<(&'static str, String)>)| {
        let mut headers = proxied(&instance);
        change(&mut headers);
        let answer = ask(&mut connection, "GET", "/latest/meta-data/instance-id", &headers, b"");
        (answer.status, answer.body.len())
    };
    let replace = |name: &'static str, value: String| {
        move |headers: &mut Vec<(&'static str, String)>| {
            headers.retain(|(have, _)| *have != name);
            headers.push((name, value.clone()));
        }
    };
    let without = |name: &'static str| {
        move |headers: &mut Vec<(&'static str, String)>| headers.retain(|(have, _)| *have != name)
    };
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
    let strange = |headers: &mut Vec<(&'static str, String)>| {
        replace("X-Instance-ID", stranger.to_owned())(headers);
        replace("X-Instance-ID-Signature", signature(SECRET, stranger))(headers);
    };
    assert_eq!(status(&strange), (404, 154));
    assert_eq!(nova.requests().len(), 8);
    let provider = nova.requests().iter().filter(|r| r.header("x-metadata-provider").is_some()).count();
    assert_eq!(provider, 1);
    // What everybody may know.
    assert_eq!(ask(&mut connection, "GET", "/", &[], b"").body.len(), 98);
}

#[test]
fn the_nova_stand_in_keeps_one_password() {
    if !privileged() {
        return;
    }
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
fn the_nova_stand_in_serves_bytes_and_files_as_they_are() {
    if !privileged() {
        return;
    }
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
fn the_nova_stand_in_fails_as_told_and_recovers() {
    if !privileged() {
        return;
    }
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
    let refused = try_dial(&host, nova.address()).map(drop).expect_err("nobody listens");
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

/// A program in the agent's place that notes how it was called and, for `run`, stays until it is killed.
fn placeholder(host: &Host) -> std::path::PathBuf {
    let path = host.folder().join("placeholder");
    let script = "#!/bin/sh\n\
                  echo \"$*\" >> \"$(dirname \"$0\")/calls\"\n\
                  echo \"called with $1\" >&2\n\
                  [ \"$1\" = run ] && exec tail -f /dev/null\n\
                  exit 0\n";
    fs::write(&path, script).expect("write the placeholder");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("make the placeholder executable");
    path
}

#[test]
fn an_agent_is_configured_started_asked_and_detached() {
    if !privileged() {
        return;
    }
    let (host, nova, _) = nova_on_a_host();
    let guest: Guest = host.network().guest(ADDRESS);
    let agent = Agent::on(&host, &nova)
        .binary(placeholder(&host))
        .set("metadata_agent", "identity_hold", 0.5)
        .port(&guest.port)
        .install();
    let config = fs::read_to_string(agent.config_file()).expect("the configuration");
    assert!(config.contains(&format!("nova_metadata_port = {}\n", nova.address().port())), "{config}");
    assert!(config.contains("[metadata_agent]\nidentity_hold = 0.5\n"), "{config}");
    let inventory = agent.config_file().with_file_name("inventory.json");
    let inventory: Value =
        serde_json::from_slice(&fs::read(inventory).expect("the inventory")).expect("JSON");
    assert_eq!(inventory["ports"][0]["mac"], guest.port.mac.to_string());
    assert_eq!(inventory["ports"][0]["fixed_ips"][0], "10.0.0.5");

    // The admin socket is played by this test.
    let listener = UnixListener::bind(agent.admin_socket()).expect("bind the admin socket");
    let admin = thread::spawn(move || {
        for body in ["starting", "ready", "{\"ports\": 1}", "metadata_x{a=\"b\"} 2\n# EOF\n"] {
            let (mut stream, _) = listener.accept().expect("an admin request");
            assert!(stream.read(&mut [0; 4096]).expect("its head") > 0);
            let status = if body == "starting" { "503 Service Unavailable" } else { "200 OK" };
            write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{body}", body.len())
                .expect("answer the admin request");
        }
    });
    let runs = |process: &AgentProcess| {
        wait::until("the placeholder runs", PATIENCE, || {
            process.output().contains("called with run").then_some(())
        });
    };
    let process = agent.start();
    assert_eq!(process.state()["ports"], 1);
    assert!((process.metric("metadata_x{a=\"b\"}") - 2.0).abs() < f64::EPSILON);
    admin.join().expect("all admin requests were asked");
    runs(&process);
    assert_eq!(process.stop().signal(), Some(15));

    let process = agent.spawn(&["--extra".to_owned()]);
    runs(&process);
    process.kill9();
    let path = agent.config_file();
    drop(agent);
    let path = path.display();
    assert_eq!(
        fs::read_to_string(host.folder().join("calls")).expect("the calls"),
        format!("run --config-file {path}\nrun --config-file {path} --extra\ndetach --config-file {path}\n")
    );
}

#[test]
fn an_agent_that_ends_at_once_is_not_waited_for() {
    if !privileged() {
        return;
    }
    let (host, nova, _) = nova_on_a_host();
    let agent = Agent::on(&host, &nova).binary("/bin/false").install();
    let process = agent.spawn(&[]);
    let reason = process.ready_within(PATIENCE).expect_err("never ready");
    assert!(matches!(reason, NotReady::Exited { status } if status.code() == Some(1)), "{reason}");
}

#[test]
fn a_lab_whose_agent_fails_says_so_and_leaves_no_trace() {
    if !privileged() {
        return;
    }
    let ours = |name: &str| name.starts_with("metadata-lab") || name.starts_with("lab-");
    let before = HostState::machine(ours);
    let lab = Command::new(env!("CARGO_BIN_EXE_lab"))
        .args(["--agent", "/bin/false"])
        .stdin(Stdio::null())
        .output()
        .expect("run the lab");
    let told = String::from_utf8_lossy(&lab.stderr);
    assert_eq!(lab.status.code(), Some(1), "{told}");
    assert!(told.contains("the agent ended before it was ready: exit status: 1"), "{told}");
    before.assert_same(&HostState::machine(ours));
    assert!(!fs::exists("/run/metadata-lab").expect("look for the lab's folder"));
}
