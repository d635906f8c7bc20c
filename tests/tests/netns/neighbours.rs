//! Other users of the guests' interfaces: Open vSwitch, libvirt and Neutron set bandwidth limits,
//! foreign programs inspect packets, and others detach our program. Our program is back within a
//! second, and theirs are never harmed.

use std::fs;
use std::net::SocketAddr;
use std::process::Command;
use std::time::{Duration, Instant};

use aya::programs::{SchedClassifier, TcAttachType};
use metadata_ebpf::abi::names;
use metadata_tests::tiny_program::{Place, Verdict};
use metadata_tests::two_tenants::assert_served;
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{Agent, Guest, Host, HostState, TinyProgram, TwoTenants, Vswitch};
use nix::net::if_::if_nametoindex;

const PORTAL_LINK: &str = "md-portal";
/// The agent promises one second. The rest is for slow machines.
const PROMISE: Duration = Duration::from_secs(10);
/// Time to wait for a packet that is dropped.
const SOON: Duration = Duration::from_millis(400);

fn programs(host: &Host, interface: &str) -> Vec<String> {
    let query = || SchedClassifier::query_tcx(interface, TcAttachType::Ingress);
    let (_, tcx) = host.netns().enter(query).expect("programs by TCX");
    tcx.iter().map(|program| program.name_as_str().unwrap_or_default().to_owned()).collect()
}

fn filters(host: &Host, interface: &str) -> String {
    host.netns().run(&["tc", "filter", "show", "dev", interface, "ingress"])
}

/// Returns true if our program is on an interface, by whatever mechanism.
fn is_on(host: &Host, interface: &str) -> bool {
    let name = if interface == PORTAL_LINK { names::TO_GUEST } else { names::FROM_GUEST };
    programs(host, interface).iter().any(|program| program == name) || filters(host, interface).contains(name)
}

/// Runs commands of `tc`, one per line, which must all succeed.
fn tc(host: &Host, batch: &str) {
    for line in batch.lines() {
        let words: Vec<&str> = std::iter::once("tc").chain(line.split_whitespace()).collect();
        host.netns().run(&words);
    }
}

fn succeeds(command: &mut Command) {
    let output = command.output().expect("run a command");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn pin(host: &Host, agent: &Agent, interface: &str) -> std::path::PathBuf {
    let index = host.netns().enter(|| if_nametoindex(interface)).expect("the interface's index");
    let name = if interface == PORTAL_LINK { "portal".to_owned() } else { format!("guest-{index}") };
    agent.pins().join(name)
}

/// Panics unless a guest's connection succeeds or fails as expected.
fn assert_reaches(guest: &Guest, to: SocketAddr, expected: bool, case: &str) {
    let connected = guest.dial(to, None, if expected { PATIENCE } else { SOON });
    assert_eq!(connected.is_ok(), expected, "{case}: {to}: {connected:?}");
}

/// A way in which others detach our program from an interface.
#[derive(Clone, Copy, Debug)]
enum Removal {
    DetachLink,
    RemovePin,
    DeleteQdisc,
    DeleteFilters,
    DeleteFilter,
}

impl Removal {
    fn inflict(self, host: &Host, agent: &Agent, interface: &str) {
        match self {
            Self::DetachLink => {
                let pin = pin(host, agent, interface);
                succeeds(Command::new("bpftool").args(["link", "detach", "pinned"]).arg(pin));
            }
            Self::RemovePin => fs::remove_file(pin(host, agent, interface)).expect("remove a pin"),
            Self::DeleteQdisc => tc(host, &format!("qdisc del dev {interface} ingress")),
            Self::DeleteFilters => tc(host, &format!("filter del dev {interface} ingress")),
            Self::DeleteFilter => {
                tc(host, &format!("filter del dev {interface} ingress prio 7 handle 1 bpf"));
            }
        }
    }
}

#[test]
fn a_detached_program_is_reattached_as_the_same_attachment() {
    use Removal::{DeleteFilter, DeleteFilters, DeleteQdisc, DetachLink, RemovePin};
    for (mode, removals) in
        [("tcx", &[DetachLink, RemovePin][..]), ("clsact", &[DeleteQdisc, DeleteFilters, DeleteFilter][..])]
    {
        let tenants = TwoTenants::new();
        let agent = tenants.agent().set("metadata_agent", "attach_mode", mode).install();
        let before = HostState::capture(&tenants.host);
        let process = agent.start();
        tenants.assert_served();
        let attachments = process.attachments();
        for removal in removals {
            let guest = &tenants.guests[0];
            for interface in [&guest.tap, PORTAL_LINK] {
                let mut open = guest.connect();
                let ask = |open: &mut metadata_tests::Connection<_>| {
                    open.request("GET", "/openstack", &[], b"").expect("an answer").status
                };
                assert_eq!(ask(&mut open), 200);
                let began = Instant::now();
                let pin = (mode == "tcx").then(|| pin(&tenants.host, &agent, interface));
                removal.inflict(&tenants.host, &agent, interface);
                wait::until("the program is back", PATIENCE, || {
                    // A link vanishes some time after its pin.
                    let is_pinned = pin.as_ref().is_none_or(|pin| pin.exists());
                    (is_pinned && is_on(&tenants.host, interface)).then_some(())
                });
                let back = began.elapsed();
                eprintln!("{mode}: {removal:?} on {interface}: back after {back:?}");
                assert!(back < PROMISE, "{mode}: {removal:?} on {interface}: back after {back:?}");
                assert_eq!(ask(&mut open), 200, "{mode}: {removal:?}: an open connection goes on");
                tenants.assert_served();
            }
        }
        assert_eq!(process.attachments(), attachments, "{mode}");
        assert_eq!(process.state()["failed"].as_array().map(Vec::len), Some(0));
        assert_eq!(process.stop().code(), Some(0));
        before.assert_same(&HostState::capture(&tenants.host));
    }
}

#[test]
fn a_filter_at_our_priority_is_reported_and_stays() {
    let tenants = TwoTenants::new();
    let (host, tap) = (&tenants.host, &tenants.guests[0].tap);
    let process = tenants.agent().set("metadata_agent", "attach_mode", "clsact").install().start();
    let place = ["dev", tap, "ingress", "protocol", "all", "prio", "7", "handle", "1", "bpf"];
    host.netns().run(&[&["tc", "filter", "replace"], &place[..], &["bytecode", "1,6 0 0 0"]].concat());
    let failed = wait::until("the failure is reported", PATIENCE, || {
        process.state()["failed"].as_array().and_then(|failed| failed.first().cloned())
    });
    assert_eq!(failed["interface"], **tap, "{failed}");
    assert!(filters(host, tap).contains("bytecode"), "{}", filters(host, tap));
    assert_served(&tenants.guests[1]);

    host.netns().run(&[&["tc", "filter", "del"], &place[..]].concat());
    wait::until("the program is back", PATIENCE, || is_on(host, tap).then_some(()));
    wait::until("nothing failed", PATIENCE, || {
        process.state()["failed"].as_array().is_some_and(Vec::is_empty).then_some(())
    });
    tenants.assert_served();
    assert_eq!(process.stop().code(), Some(0));
}

/// The commands with which tools set a bandwidth limit on a guest's interface. None of them
/// considers that the qdisc there may belong to another program. (`police` is not in every kernel;
/// a filter that passes everything stands for it, in the same place.)
const BANDWIDTHS: [(&str, &str); 4] = [
    // lib/netdev-linux.c, netdev_linux_set_policing
    (
        "Open vSwitch",
        "qdisc del dev TAP ingress\n\
         qdisc add dev TAP handle ffff: ingress\n\
         filter add dev TAP parent ffff: protocol all prio 49 u32 match u32 0 0 flowid :1",
    ),
    // src/util/virnetdevbandwidth.c, virNetDevBandwidthSet
    (
        "libvirt",
        "qdisc del dev TAP ingress\n\
         qdisc add dev TAP root handle 1: htb default 1\n\
         class add dev TAP parent 1: classid 1:1 htb rate 100mbit\n\
         qdisc add dev TAP ingress\n\
         filter add dev TAP parent ffff: protocol all u32 match u32 0 0 flowid :1",
    ),
    // neutron/agent/linux/tc_lib.py, TcCommand.update_filters_bw_limit
    (
        "Neutron",
        "qdisc del dev TAP ingress\n\
         qdisc add dev TAP ingress\n\
         filter add dev TAP parent ffff: protocol all prio 49 u32 match u32 0 0 flowid :1",
    ),
    (
        "a user of clsact",
        "qdisc del dev TAP ingress\n\
         qdisc add dev TAP clsact\n\
         filter add dev TAP ingress protocol all prio 49 u32 match u32 0 0 flowid :1",
    ),
];

/// Sets a limit as these tools do: deletions of missing objects are ignored, and everything else
/// must succeed.
fn set_bandwidth(host: &Host, tap: &str, commands: &str) {
    let script = commands.replace("TAP", tap).lines().fold("set -e".to_owned(), |script, line| {
        let line = line.trim();
        script + "\ntc " + line + if line.starts_with("qdisc del") { " 2>/dev/null || :" } else { "" }
    });
    host.netns().run(&["sh", "-c", &script]);
}

fn clear_bandwidth(host: &Host, tap: &str) {
    for kind in ["root", "ingress", "clsact"] {
        // Some of them do not exist.
        let cleared = host.netns().command("tc").args(["qdisc", "del", "dev", tap, kind]).output();
        cleared.expect("run tc");
    }
}

#[test]
fn a_bandwidth_limit_holds_and_the_guest_is_served() {
    for mode in ["tcx", "clsact"] {
        let tenants = TwoTenants::new();
        let (host, guest) = (&tenants.host, &tenants.guests[0]);
        for (who, commands) in BANDWIDTHS {
            // The state of the host with the limit and without us.
            set_bandwidth(host, &guest.tap, commands);
            let before = HostState::capture(host);
            let agent = tenants.agent().set("metadata_agent", "attach_mode", mode).install();
            let process = agent.start();
            tenants.assert_served();
            assert_eq!(process.stop().code(), Some(0));
            before.assert_same(&HostState::capture(host));
            clear_bandwidth(host, &guest.tap);

            let process = agent.start();
            let attachments = process.attachments();
            let began = Instant::now();
            set_bandwidth(host, &guest.tap, commands);
            wait::until("the program is back", PATIENCE, || is_on(host, &guest.tap).then_some(()));
            eprintln!("{mode}: {who}: set, and ours there, after {:?}", began.elapsed());
            tenants.assert_served();
            let with_ours = filters(host, &guest.tap);
            assert!(with_ours.contains("u32"), "{mode}: {who}: {with_ours}");
            assert_eq!(process.attachments(), attachments, "{mode}: {who}");

            // Removed while the agent runs, and set once more.
            clear_bandwidth(host, &guest.tap);
            wait::until("the program is back", PATIENCE, || is_on(host, &guest.tap).then_some(()));
            tenants.assert_served();
            set_bandwidth(host, &guest.tap, commands);
            wait::until("the program is back", PATIENCE, || is_on(host, &guest.tap).then_some(()));
            assert_eq!(process.stop().code(), Some(0));
            before.assert_same(&HostState::capture(host));
            clear_bandwidth(host, &guest.tap);
        }
    }
}

#[test]
fn programs_of_other_owners_keep_running() {
    for (mode, place, verdict, metadata, bystander) in [
        ("tcx", Place::First, Verdict::Next, true, true),
        ("tcx", Place::First, Verdict::Drop, false, false),
        ("tcx", Place::Last, Verdict::Next, true, true),
        ("tcx", Place::Last, Verdict::Drop, true, false),
        ("tcx", Place::Filter(3), Verdict::Drop, true, false),
        ("clsact", Place::First, Verdict::Drop, false, false),
        ("clsact", Place::Filter(3), Verdict::Next, true, true),
        ("clsact", Place::Filter(3), Verdict::Drop, false, false),
        ("clsact", Place::Filter(9), Verdict::Next, true, true),
        ("clsact", Place::Filter(9), Verdict::Drop, true, false),
    ] {
        // With the neighbour before the agent or after it. If both attach first, the later one
        // wins.
        for early in [true, false] {
            let metadata = metadata || (early && mode == "tcx" && place == Place::First);
            let case = format!("{mode}, {place:?} {verdict:?}, early: {early}");
            let tenants = TwoTenants::new();
            let (host, guest) = (&tenants.host, &tenants.guests[0]);
            let legacy = tenants.networks[0].legacy();
            let gateway = SocketAddr::from((tenants.networks[0].gateway, 80));
            assert_reaches(guest, gateway, true, &case);
            let mut neighbour = TinyProgram::load("neighbour", verdict);
            let mut come = || neighbour.attach(host.netns(), &guest.tap, place);
            tc(host, &format!("qdisc add dev {} clsact", guest.tap));
            let without = HostState::capture(host);
            if early {
                come();
            }
            let agent = tenants.agent().set("metadata_agent", "attach_mode", mode).install();
            let process = agent.start();
            if !early {
                come();
            }
            assert_reaches(guest, guest.metadata_ipv4(), metadata, &case);
            assert_reaches(guest, gateway, bystander, &case);
            if metadata {
                assert_served(guest);
            }
            assert_served(&tenants.guests[1]);
            assert_eq!(process.stop().code(), Some(0));
            assert_reaches(guest, gateway, verdict == Verdict::Next, &case);
            drop(neighbour);
            if let Place::Filter(priority) = place {
                tc(host, &format!("filter del dev {} ingress prio {priority}", guest.tap));
            }
            without.assert_same(&HostState::capture(host));
            drop(legacy);
        }
    }
}

#[test]
fn the_order_of_programs_survives_a_restart() {
    let tenants = TwoTenants::new();
    let (host, tap) = (&tenants.host, &tenants.guests[0].tap);
    let agent = tenants.agent().install();
    let process = agent.start();
    let mut neighbours = ["before", "after"].map(|name| TinyProgram::load(name, Verdict::Next));
    for (neighbour, place) in neighbours.iter_mut().zip([Place::First, Place::Last]) {
        neighbour.attach(host.netns(), tap, place);
    }
    let order = ["before", names::FROM_GUEST, "after"];
    assert_eq!(programs(host, tap), order);
    process.kill9();
    let process = agent.start();
    assert_eq!(programs(host, tap), order);
    tenants.assert_served();
    assert_eq!(process.stop().code(), Some(0));
    assert_eq!(programs(host, tap), ["before", "after"]);
}

#[test]
fn open_vswitch_polices_a_guest_that_is_served() {
    for mode in ["tcx", "clsact"] {
        let tenants = TwoTenants::new();
        let (host, guest) = (&tenants.host, &tenants.guests[0]);
        host.netns().ip(&format!("link set {} nomaster", guest.tap));
        let switch = Vswitch::start(host.netns());
        let agent = tenants.agent().set("metadata_agent", "attach_mode", mode).install();
        let process = agent.start();
        let attachments = process.attachments();
        let is_back = |what: &str| {
            let began = Instant::now();
            wait::until("the program is back", PATIENCE, || is_on(host, &guest.tap).then_some(()));
            eprintln!("{mode}: {what}: ours is back after {:?}", began.elapsed());
            tenants.assert_served();
        };
        // It deletes the ingress qdisc of each interface it is given, and at each change of the
        // limit.
        switch.add(&guest.tap);
        is_back("a port is added");
        for rate in [1000, 2000] {
            switch.police(&guest.tap, rate);
            is_back("a limit is set");
            let qdiscs = host.netns().run(&["tc", "qdisc", "show", "dev", &guest.tap]);
            assert!(qdiscs.contains("qdisc ingress ffff:"), "{mode}: {qdiscs}");
        }
        let log = switch.log();
        assert!(!log.contains("policing qdisc failed"), "{mode}: its qdisc was refused");
        // Its qdisc is not ours to delete.
        assert_eq!(process.attachments(), attachments, "{mode}");
        assert_eq!(process.stop().code(), Some(0));
        let qdiscs = host.netns().run(&["tc", "qdisc", "show", "dev", &guest.tap]);
        assert!(qdiscs.contains("qdisc ingress ffff:"), "{mode}: {qdiscs}");
        assert!(!is_on(host, &guest.tap), "{mode}");

        let process = agent.start();
        switch.police(&guest.tap, 0);
        is_back("a limit is lifted");
        assert_eq!(process.stop().code(), Some(0));
    }
}
