//! Readiness through the datapath: the agent sends requests to itself, and names the step at which
//! they fail. They are no guest's, and no guest can pass for them.

use std::io::ErrorKind;
use std::process::Command;

use metadata_tests::packet_socket::PacketSocket;
use metadata_tests::two_tenants::assert_served;
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{
    Agent, AgentProcess, GuestSpec, Host, HostState, Instance, NextHop, NovaStandIn, TwoTenants,
};
use nix::net::if_::if_nametoindex;
use nix::sys::signal::Signal;

/// The guest end of the agent's own pair.
const PROBE_MAC: [u8; 6] = [0x02, 0x6d, 0x64, 0x70, 0x72, 0x01];
const PROBE_ADDRESS: [u8; 4] = [169, 254, 169, 253];

const SUCCESS: &str = "metadata_data_path_success_timestamp_seconds";

fn failing(step: &str) -> String {
    format!("metadata_data_path_failing{{step=\"{step}\"}}")
}

fn has_probe(host: &Host) -> bool {
    host.netns().enter(|| if_nametoindex("md-probe")).is_ok()
}

/// Waits for two more answers to probes that are sent every second.
fn wait_for_probes(process: &AgentProcess) {
    let before = process.count(SUCCESS);
    wait::until("probes are answered", PATIENCE, || (process.count(SUCCESS) >= before + 2).then_some(()));
}

/// Does damage, and waits until the step is named in `/ready`, `status` and the metrics. Undoes it,
/// and waits until the agent is ready.
fn assert_named<T>(
    (agent, process): (&Agent, &AgentProcess),
    (step, found): (&str, &str),
    damage: impl FnOnce() -> T,
    undo: impl FnOnce(T),
) {
    wait_for_probes(process);
    let done = damage();
    let line = format!("data path: {step}: {found}\n");
    let is_named = || process.admin("/ready").text().contains(&line).then_some(());
    wait::poll(PATIENCE, is_named)
        .unwrap_or_else(|| panic!("{line} {} {}", process.admin("/ready").text(), process.output()));
    assert_eq!(process.count(&failing(step)), 1, "{step}");
    let others = ["link", "program", "heartbeat", "listener", "accept", "answer"];
    for other in others.into_iter().filter(|other| *other != step) {
        assert_eq!(process.count(&failing(other)), 0, "{step}: {other}");
    }
    let state = process.state();
    assert_eq!(state["data_path"]["failing_step"], step, "{state}");
    assert!(state["data_path"]["failures"].as_u64() >= Some(3), "{state}");
    let page = agent.query("status", &[]);
    let page = String::from_utf8_lossy(&page.stdout).into_owned();
    assert!(page.contains(&format!("failed since: {step}: {found}")), "{page}");
    undo(done);
    process.wait_ready();
    assert_eq!(process.count(&failing(step)), 0, "{step}");
    wait_for_probes(process);
    let output = process.output();
    for text in ["data path probes fail; not ready", "data path probes are answered again"] {
        assert!(output.contains(text), "{step}: {text}\n{output}");
    }
}

fn in_portal(tenants: &TwoTenants, agent: &Agent, command: &str) {
    tenants.host.netns().run(&["ip", "netns", "exec", agent.portal(), "sh", "-c", command]);
}

#[test]
fn probes_are_answered_and_leave_nothing_behind() {
    for mode in ["tcx", "clsact"] {
        let tenants = TwoTenants::new();
        let agent = tenants.agent().set("metadata_agent", "attach_mode", mode);
        let agent = agent.set("metadata_agent", "data_path_interval", "1").install();
        let before = HostState::capture(&tenants.host);
        let process = agent.start();
        wait_for_probes(&process);
        // Nothing shows them as a guest's, and Nova gets none of them.
        let taps: Vec<&str> = tenants.guests.iter().map(|guest| guest.tap.as_str()).collect();
        process.wait_for_attachments(taps.iter().copied());
        assert_eq!(process.count("metadata_attachments"), 2);
        for series in ["connections_total", "connections_open", "request_duration_seconds_count"] {
            assert_eq!(process.count(&format!("metadata_{series}")), 0, "{mode}: {series}");
        }
        assert_eq!(process.count("metadata_upstream_connections_total"), 0, "{mode}");
        assert!(!process.output().contains("md-probe"), "{}", process.output());
        tenants.assert_served();

        // After a crash, the kernel removes the pair, and the next agent makes its own.
        let attachments = process.attachments();
        process.kill9();
        wait::until("the pair is gone", PATIENCE, || (!has_probe(&tenants.host)).then_some(()));
        let process = agent.start();
        assert!(has_probe(&tenants.host));
        assert_eq!(process.attachments(), attachments, "{mode}");
        tenants.assert_served();
        process.kill9();
        agent.detach();
        before.assert_same(&HostState::capture(&tenants.host));
        let process = agent.start();
        assert_eq!(process.stop().code(), Some(0), "{mode}");
        before.assert_same(&HostState::capture(&tenants.host));
    }
}

#[test]
fn an_agent_without_probes_is_ready() {
    let tenants = TwoTenants::new();
    let process = tenants.agent().set("metadata_agent", "data_path_interval", "0").install().start();
    assert!(!has_probe(&tenants.host) && process.state()["data_path"].is_null());
    assert!(!process.metrics().contains("metadata_data_path"));
    tenants.assert_served();
    assert_eq!(process.stop().code(), Some(0));
}

#[test]
fn each_step_that_fails_is_named() {
    let tenants = TwoTenants::new();
    let agent = tenants.agent().set("metadata_agent", "data_path_interval", "1").install();
    let process = agent.start();
    let (both, host) = ((&agent, &process), tenants.host.netns());

    // A pair that is damaged is made again, unless its name is in use.
    let damage = || {
        process.freeze();
        host.ip("link del md-probe\nlink add md-probe type bridge");
        process.signal(Signal::SIGCONT);
    };
    let taken = "another interface has the name md-probe";
    assert_named(both, ("link", taken), damage, |()| host.ip("link del md-probe"));

    // A program cannot be attached again while there is no file system for its pin.
    let damage = || {
        let index = host.enter(|| if_nametoindex("md-probe")).expect("the pair");
        let pin = agent.pins().join(format!("guest-{index}"));
        process.freeze();
        let detached = Command::new("bpftool").args(["link", "detach", "pinned"]).arg(pin).status();
        assert!(detached.expect("run bpftool").success());
        let mounted = Command::new("mount").args(["-t", "tmpfs", "tmpfs"]).arg(tenants.host.bpffs()).status();
        assert!(mounted.expect("run mount").success());
        process.signal(Signal::SIGCONT);
    };
    let undo = |()| {
        assert!(Command::new("umount").arg(tenants.host.bpffs()).status().expect("run umount").success());
    };
    assert_named(both, ("program", "detached externally"), damage, undo);

    let freeze = || process.freeze_threads("md-data");
    assert_named(both, ("heartbeat", "stale"), freeze, drop);

    // No guard looks for packet filters.
    let damage = || in_portal(&tenants, &agent, "ip6tables -A INPUT -p tcp --syn -j DROP");
    let undo = |()| in_portal(&tenants, &agent, "ip6tables -F INPUT");
    assert_named(both, ("listener", "no connection"), damage, undo);

    tenants.assert_served();
    assert_eq!(process.stop().code(), Some(0));
}

/// The listener's queue still accepts, because the heartbeat counts as recent for a minute.
#[test]
fn a_proxy_that_does_not_respond_is_named() {
    let tenants = TwoTenants::new();
    let agent = tenants.agent().set("metadata_agent", "data_path_interval", "1");
    let agent = agent.set("metadata_agent", "heartbeat_stale_after", "60").install();
    let process = agent.start();
    let freeze = || process.freeze_threads("md-data");
    assert_named((&agent, &process), ("accept", "no response"), freeze, drop);
    assert_eq!(process.stop().code(), Some(0));
}

#[test]
fn a_damaged_pair_is_made_again() {
    let tenants = TwoTenants::new();
    let agent = tenants.agent().set("metadata_agent", "data_path_interval", "1").install();
    let before = HostState::capture(&tenants.host);
    let process = agent.start();
    let host = tenants.host.netns();
    let elsewhere = format!("link set md-probe netns {}", tenants.guests[0].netns().name());
    for command in
        ["link del md-probe", "link set md-probe down", "link set md-probe down name lost", &elsewhere]
    {
        let index = || host.enter(|| if_nametoindex("md-probe")).ok();
        let former = index();
        host.ip(command);
        let again = || index().filter(|now| Some(*now) != former);
        wait::until(&format!("the pair is there again after {command}"), PATIENCE, again);
        wait_for_probes(&process);
        process.wait_ready();
    }
    tenants.assert_served();
    assert_eq!(process.stop().code(), Some(0));
    before.assert_same(&HostState::capture(&tenants.host));
}

/// Guests fill every limit. Their connections are refused, and probes are not.
#[test]
fn guests_at_their_limits_leave_probes_alone() {
    let tenants = TwoTenants::new();
    let agent = tenants.agent().set("metadata_agent", "data_path_interval", "1");
    let agent = agent.set("metadata_agent", "connections", "0").install();
    let process = agent.start();
    let mut open = Vec::new();
    for guest in &tenants.guests {
        for _ in 0..4 {
            let mut connection = guest.connect();
            assert_eq!(connection.request("GET", "/openstack", &[], b"").expect("an answer").status, 200);
            open.push(connection);
        }
        let refused = guest.connect().request("GET", "/openstack", &[], b"");
        let refused = refused.expect_err("a fifth connection").kind();
        assert!(matches!(refused, ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset), "{refused}");
    }
    wait_for_probes(&process);
    process.wait_ready();
    assert_eq!(process.count("metadata_connections_open"), 8, "the probes do not count");
    drop(open);
    assert_eq!(process.stop().code(), Some(0));
}

/// A guest with the addresses of the agent's own interface is itself, and gets none of its packets.
#[test]
fn a_guest_with_the_probes_addresses_is_itself() {
    let host = Host::new();
    let nova = NovaStandIn::start(host.netns());
    let tenants = TwoTenants::on(host, nova, |spec| GuestSpec { next_hop: NextHop::OnLink, ..spec });
    let agent = tenants.agent().set("metadata_agent", "data_path_interval", "1");
    let agent = agent.set("metadata_agent", "source_check", "off").install();
    let process = agent.start();
    let [guest, other] = &tenants.guests;
    guest.netns().ip("link set eth0 address 02:6d:64:70:72:01\naddress add 169.254.169.253/30 dev eth0");
    let seen = PacketSocket::open(other.netns(), "eth0");
    wait_for_probes(&process);
    let mut own = guest.connect_from((PROBE_ADDRESS, 40_000).into());
    let answer = own.request("GET", "/openstack/latest/meta_data.json", &[], b"").expect("an answer");
    let document: serde_json::Value = serde_json::from_slice(&answer.body).expect("JSON");
    assert_eq!(document["uuid"], guest.port.instance.to_string());
    assert_served(other);
    wait_for_probes(&process);
    // The other guest has sent at least its own request meanwhile.
    let (mut frames, mut finished) = (0, false);
    seen.wait_for("its own answer", |frame| {
        assert_ne!(frame[..6], PROBE_MAC, "a frame for the agent's own interface");
        assert_ne!(frame[6..12], PROBE_MAC, "a frame from the agent's own interface");
        frames += 1;
        finished |= frame.windows(5).any(|bytes| bytes == b"uuid\"");
        finished.then_some(())
    });
    eprintln!("{frames} frames");
    assert_eq!(process.stop().code(), Some(0));
}

/// The agent leaves a guest's interface alone that has the name of its own, and serves it.
#[test]
fn a_guest_interface_with_the_probes_name_is_a_guests() {
    let tenants = TwoTenants::new();
    let TwoTenants { guests: [first, second], networks, nova, host } = tenants;
    let mut port = networks[0].spec([10, 0, 0, 7]).port;
    port.device = Some("md-probe".to_owned());
    nova.add(Instance::from_port(&port));
    let guest = networks[0].plug(GuestSpec { port, next_hop: NextHop::Gateway, namespace: None });
    assert_eq!(guest.tap, "md-probe");
    let agent = [&first, &second, &guest]
        .into_iter()
        .fold(Agent::on(&host, &nova), |agent, guest| agent.port(&guest.port))
        .set("metadata_agent", "guest_interfaces", "tap*,md-p*")
        .set("metadata_agent", "data_path_interval", "1")
        .install();
    let process = agent.spawn(&[]);
    let waiting = "data path: link: another interface has the name md-probe\n";
    wait::until("the name is in use", PATIENCE, || {
        process.try_admin("/ready").is_ok_and(|answer| answer.text() == waiting).then_some(())
    });
    assert!(process.attachments().contains_key("md-probe"));
    [&first, &second, &guest].into_iter().for_each(assert_served);
    drop(guest);
    process.wait_ready();
    assert!(has_probe(&host) && !process.attachments().contains_key("md-probe"));
    [&first, &second].into_iter().for_each(assert_served);
    assert_eq!(process.stop().code(), Some(0));
}
