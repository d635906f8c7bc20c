//! Guests' interfaces appear, vanish and change while the agent runs.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use aya::maps::{HashMap, Map, MapData};
use aya::programs::{SchedClassifier, TcAttachType};
use metadata_ebpf::abi::{Port, PortKey, names};
use metadata_tests::two_tenants::{ADDRESS, assert_served};
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{GuestSpec, Host, HostState, Instance, NextHop, TwoTenants};
use nix::net::if_::if_nametoindex;

/// Returns the number of interfaces in the kernel's maps and in the pins.
fn known(host: &Host) -> (usize, usize) {
    let folder = host.bpffs().join("metadata");
    let ports = MapData::from_pin(folder.join(names::PORTS)).expect("open MD_PORTS");
    let ports = HashMap::<_, PortKey, Port>::try_from(Map::HashMap(ports)).expect("read MD_PORTS");
    let pins = fs::read_dir(&folder).expect("list the pins").flatten();
    let guests = pins.filter(|pin| {
        let name = pin.file_name();
        ["guest-", "filter-"].iter().any(|prefix| name.to_string_lossy().starts_with(prefix))
    });
    (ports.keys().count(), guests.count())
}

#[test]
fn a_new_interface_is_served_at_once() {
    let tenants = TwoTenants::new();
    let agent = tenants.agent().install();
    let process = agent.start();
    let specs = tenants.networks.each_ref().map(|network| network.spec([10, 0, 0, 6]));
    for spec in &specs {
        tenants.nova.add(Instance::from_port(&spec.port));
    }
    let known = tenants.guests.iter().map(|guest| &guest.port).chain(specs.iter().map(|spec| &spec.port));
    agent.set_ports(known);
    for (spec, network) in specs.into_iter().zip(&tenants.networks) {
        let tap = spec.port.tap();
        let watch = |tap: &str| {
            let end = Instant::now() + PATIENCE;
            let before_the_end = || assert!(Instant::now() < end, "{tap} is not attached");
            while if_nametoindex(tap).is_err() {
                before_the_end();
            }
            let announced = Instant::now();
            loop {
                before_the_end();
                // The query takes the lock that attaching needs (rtnl). Without a pause it would
                // measure itself.
                thread::park_timeout(Duration::from_millis(1));
                let attached = SchedClassifier::query_tcx(tap, TcAttachType::Ingress);
                if attached.is_ok_and(|(_, programs)| !programs.is_empty()) {
                    return announced.elapsed();
                }
            }
        };
        let host = tenants.host.netns();
        let (guest, delay) = thread::scope(|scope| {
            let delay = scope.spawn(|| host.enter(|| watch(&tap)));
            (network.plug(spec), delay.join().expect("the interface is attached"))
        });
        eprintln!("{tap}: attached {delay:?} after it was there");
        assert_served(&guest);
    }
    tenants.assert_served();
    assert_eq!(process.stop().code(), Some(0));
}

#[test]
fn a_hundred_interfaces_are_attached_and_detached_at_once() {
    for mode in ["tcx", "clsact"] {
        let tenants = TwoTenants::new();
        let own: BTreeSet<&str> = tenants.guests.iter().map(|guest| guest.tap.as_str()).collect();
        let process =
            tenants.agent().set("metadata_agent", "attach_mode", mode).without_probes().install().start();
        let names: Vec<String> = (0..100).map(|n| format!("tapmany{n}")).collect();
        let (mut add, mut delete) = (String::new(), String::new());
        for name in &names {
            writeln!(add, "tuntap add dev {name} mode tap\nlink set {name} up").expect("write to a String");
            writeln!(delete, "link del {name}").expect("write to a String");
        }
        let began = Instant::now();
        tenants.host.netns().ip(&add);
        let made = began.elapsed();
        let all = own.iter().copied().chain(names.iter().map(String::as_str));
        let ids: BTreeSet<u64> = process.wait_for_attachments(all).into_values().collect();
        eprintln!("{mode}: 100 interfaces created within {made:?}, attached within {:?}", began.elapsed());
        assert_eq!(ids.len(), 102, "every attachment has its own id");
        assert_eq!(known(&tenants.host), (102, 102));
        tenants.assert_served();

        tenants.host.netns().ip(&delete);
        process.wait_for_attachments(own);
        assert_eq!(known(&tenants.host), (2, 2), "{mode}");
        tenants.assert_served();
        assert_eq!(process.stop().code(), Some(0));
    }
}

/// The new attachment belongs to the new instance.
#[test]
fn a_recreated_interface_is_a_new_attachment() {
    for mode in ["tcx", "clsact"] {
        let tenants = TwoTenants::new();
        let agent = tenants.agent().set("metadata_agent", "attach_mode", mode).without_probes().install();
        let process = agent.start();
        tenants.assert_served();
        let before = process.attachments();

        let TwoTenants { guests: [first, second], networks, nova, host } = tenants;
        let tap = first.tap.clone();
        drop(first);
        // Another instance behind an interface with the same name.
        let mut port = networks[0].spec(ADDRESS).port;
        port.device = Some(tap.clone());
        nova.add(Instance::from_port(&port));
        agent.set_ports([&port, &second.port]);
        let first = networks[0].plug(GuestSpec { port, next_hop: NextHop::Gateway, namespace: None });
        assert_eq!(first.tap, tap);
        let after = wait::until("the new interface is attached", PATIENCE, || {
            let now = process.attachments();
            now.get(&tap).is_some_and(|id| *id != before[&tap]).then_some(now)
        });
        assert!(after[&tap] > before[&second.tap], "{mode}: {after:?}");
        assert_eq!(after[&second.tap], before[&second.tap], "{mode}");
        assert_eq!(known(&host), (2, 2), "{mode}");
        assert_served(&first);
        assert_served(&second);
        assert_eq!(process.stop().code(), Some(0));
    }
}

#[test]
fn only_guests_interfaces_are_attached() {
    let tenants = TwoTenants::new();
    let own: Vec<&str> = tenants.guests.iter().map(|guest| guest.tap.as_str()).collect();
    let ovn = &format!("tap{}0", &tenants.networks[0].id.to_string()[..10]);
    let strangers = format!(
        "link add {ovn} type veth peer name ovn-peer\n\
         link add qvo1 type veth peer name qvb1\n\
         tuntap add dev vnet1 mode tap\n\
         tuntap add dev tapreal1 mode tap\n\
         tuntap add dev tun1 mode tun"
    );
    for (kinds, patterns, want) in [
        ("tun", "tap*", vec!["tapreal1"]),
        ("tun", "vnet?,tapr*", vec!["vnet1", "tapreal1"]),
        ("tun,veth", "tap*", vec![own[0], own[1], ovn, "tapreal1"]),
    ] {
        let agent = tenants
            .agent()
            .set("metadata_agent", "guest_link_kinds", kinds)
            .set("metadata_agent", "guest_interfaces", patterns)
            .without_probes()
            .install();
        let before = HostState::capture(&tenants.host);
        // Interfaces that exist before the agent starts and later ones are treated alike.
        for early in [true, false] {
            let make = || tenants.host.netns().ip(&strangers);
            if early {
                make();
            }
            let process = agent.start();
            if !early {
                make();
            }
            // Events arrive in order, so once the last one is processed, all are.
            tenants.host.netns().ip("tuntap add dev taplast mode tap\ntuntap add dev vnet9 mode tap");
            let last = if patterns.contains("vnet") { "vnet9" } else { "taplast" };
            let ids = process.wait_for_attachments(want.iter().copied().chain([last]));
            assert_eq!(known(&tenants.host).0, ids.len(), "{kinds} {patterns}");
            assert_eq!(process.stop().code(), Some(0));
            tenants.host.netns().ip(&format!(
                "link del {ovn}\nlink del qvo1\nlink del vnet1\nlink del tapreal1\nlink del tun1\n\
                 link del taplast\nlink del vnet9"
            ));
            before.assert_same(&HostState::capture(&tenants.host));
        }
    }
}

#[test]
fn a_renamed_interface_is_matched_by_its_new_name() {
    for mode in ["tcx", "clsact"] {
        let tenants = TwoTenants::new();
        let own = || tenants.guests.iter().map(|guest| guest.tap.as_str());
        let before = HostState::capture(&tenants.host);
        let process =
            tenants.agent().set("metadata_agent", "attach_mode", mode).without_probes().install().start();
        let host = tenants.host.netns();
        host.ip("tuntap add dev tapone mode tap");
        let ids = process.wait_for_attachments(own().chain(["tapone"]));
        host.ip("link set tapone name tapother");
        let renamed = process.wait_for_attachments(own().chain(["tapother"]));
        assert_eq!(renamed["tapother"], ids["tapone"], "{mode}: it is the same interface");
        host.ip("link set tapother name mine");
        process.wait_for_attachments(own());
        assert_eq!(known(&tenants.host), (2, 2), "{mode}");
        // Nothing of the agent remains on the detached interface.
        wait::until("the filter is off", PATIENCE, || {
            let qdiscs = host.run(&["tc", "qdisc", "show", "dev", "mine"]);
            let tcx = host.enter(|| SchedClassifier::query_tcx("mine", TcAttachType::Ingress));
            let programs = tcx.map_or(0, |(_, programs)| programs.len());
            (!qdiscs.contains("ingress") && programs == 0).then_some(())
        });
        host.ip("link del mine");
        tenants.assert_served();
        assert_eq!(process.stop().code(), Some(0));
        before.assert_same(&HostState::capture(&tenants.host));
    }
}

/// It does not delay others.
#[test]
fn an_interface_that_fails_to_attach_is_retried_alone() {
    let tenants = TwoTenants::new();
    let host = tenants.host.netns();
    host.ip("tuntap add dev tapbusy mode tap");
    // A foreign filter with exactly our priority and handle.
    host.run(&["tc", "qdisc", "add", "dev", "tapbusy", "clsact"]);
    let place = ["protocol", "all", "prio", "7", "handle", "1", "bpf", "bytecode", "1,6 0 0 0"];
    host.run(&[&["tc", "filter", "add", "dev", "tapbusy", "ingress"], &place[..]].concat());
    let process = tenants.agent().set("metadata_agent", "attach_mode", "clsact").install().start();
    tenants.assert_served();
    let failed = process.state()["failed"].clone();
    assert_eq!(failed[0]["interface"], "tapbusy", "{failed}");
    assert!(failed[0]["error"].as_str().is_some_and(|error| error.contains("cannot attach")), "{failed}");
    let filters = || host.run(&["tc", "filter", "show", "dev", "tapbusy", "ingress"]);
    assert!(filters().contains("bytecode") && !filters().contains(names::FROM_GUEST), "{}", filters());

    host.run(&["tc", "filter", "del", "dev", "tapbusy", "ingress"]);
    process
        .wait_for_attachments(["tapbusy"].into_iter().chain(tenants.guests.iter().map(|g| g.tap.as_str())));
    assert!(process.state()["failed"].as_array().is_some_and(Vec::is_empty));
    assert_eq!(process.stop().code(), Some(0));
    assert!(
        host.run(&["tc", "qdisc", "show", "dev", "tapbusy"]).contains("clsact"),
        "the foreign qdisc must stay"
    );
}
