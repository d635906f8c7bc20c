//! The rig itself, whose properties all scenarios depend on.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt as _;
use std::panic::{self, AssertUnwindSafe};
use std::thread;

use metadata_tests::agent::NotReady;
use metadata_tests::wait::PATIENCE;
use metadata_tests::{
    Agent, AgentProcess, Guest, Host, HostState, Netns, NextHop, NovaStandIn, legacy, netns, wait,
};
use serde_json::Value;

const ADDRESS: [u8; 4] = [10, 0, 0, 5];

#[test]
fn guests_with_one_address_reach_their_own_legacy_path() {
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
fn a_host_leaves_nothing_behind_even_after_a_panic() {
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
fn a_host_state_has_filters_routes_neighbours_and_pins() {
    let host = Host::new();
    host.tap("tap0");
    let before = HostState::capture(&host);
    host.netns().run(&["tc", "qdisc", "add", "dev", "tap0", "clsact"]);
    host.netns().run(&["tc", "filter", "add", "dev", "tap0", "ingress", "bpf", "bytecode", "1,6 0 0 0"]);
    host.netns().ip("address add 192.0.2.1/24 dev tap0\n\
         neighbour add 192.0.2.2 lladdr fa:16:3e:00:00:02 nud permanent dev tap0\n\
         route add fd00::/64 dev tap0");
    fs::create_dir(host.bpffs().join("pinned")).expect("create a folder on the BPF file system");
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

/// Writes a program that replaces the agent. It records its arguments and, for `run`, stays until
/// it is killed.
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
fn an_agent_is_configured_started_queried_and_detached() {
    let host = Host::new();
    let nova = NovaStandIn::start(host.netns());
    let guest: Guest = host.network().guest(ADDRESS);
    let agent = Agent::on(&host, &nova)
        .binary(placeholder(&host))
        .set("metadata_agent", "identity_hold", "0.5")
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

    // This test serves the admin socket.
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
    let host = Host::new();
    let nova = NovaStandIn::start(host.netns());
    let agent = Agent::on(&host, &nova).binary("/bin/false").install();
    let process = agent.spawn(&[]);
    let reason = process.ready_within(PATIENCE).expect_err("never ready");
    assert!(matches!(reason, NotReady::Exited { status } if status.code() == Some(1)), "{reason}");
}
