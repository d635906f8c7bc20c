//! Programs and portal uplinks that are removed in a namespace are restored within a second,
//! programs with the same attachment.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use aya::programs::{SchedClassifier, TcAttachType};
use metadata_ebpf::abi::names;
use metadata_tests::two_tenants::assert_served;
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{Agent, Netns, Routed};
use nix::net::if_::if_nametoindex;

const PORTAL_LINK: &str = "md-portal";
/// The agent promises one second. The rest is for slow machines.
const PROMISE: Duration = Duration::from_secs(10);

/// Returns the path of the pinned link of a router's interface.
fn pin_of(agent: &Agent, netns: &Netns, interface: &str) -> PathBuf {
    let inode = fs::metadata(format!("/run/netns/{}", netns.name())).expect("the namespace").ino();
    let index = netns.enter(|| if_nametoindex(interface)).expect("its index");
    agent.pins().join(format!("netns-{inode}")).join(format!("guest-{index}"))
}

/// Returns true if our program is on an interface, by whatever mechanism.
fn is_on(netns: &Netns, interface: &str) -> bool {
    let name = if interface == PORTAL_LINK { names::TO_GUEST } else { names::FROM_GUEST };
    let query = || SchedClassifier::query_tcx(interface, TcAttachType::Ingress);
    let (_, tcx) = netns.enter(query).expect("programs by TCX");
    tcx.iter().any(|program| program.name_as_str() == Some(name))
        || netns.run(&["tc", "filter", "show", "dev", interface, "ingress"]).contains(name)
}

/// It keeps its attachment.
#[test]
fn a_program_detached_in_a_namespace_is_reattached() {
    for mode in ["tcx", "clsact"] {
        let routed = Routed::new();
        let agent = routed.agent().set("metadata_agent", "attach_mode", mode).install();
        let process = agent.start();
        assert_served(&routed.guest);
        let tap = routed.interface.tap();
        let (netns, device) = (routed.router.netns(), tap.as_str());
        let attachments = process.attachments();
        let mut open = routed.guest.connect();
        let tc = |command: &str, interface: &str| {
            let command = command.replace("DEV", interface);
            netns.run(&command.split_whitespace().collect::<Vec<_>>());
        };
        let pin = || pin_of(&agent, netns, device);
        let detach = || {
            let status = Command::new("bpftool").args(["link", "detach", "pinned"]).arg(pin()).status();
            assert!(status.expect("bpftool").success());
        };
        let remove_pin = || fs::remove_file(pin()).expect("remove a pin");
        let delete_qdisc = |interface: &str| tc("tc qdisc del dev DEV ingress", interface);
        let delete_filters = |interface: &str| tc("tc filter del dev DEV ingress", interface);
        let of_device: [&dyn Fn(); 2] = match mode {
            "tcx" => [&detach, &remove_pin],
            _ => [&|| delete_qdisc(device), &|| delete_filters(device)],
        };
        let of_portal: [&dyn Fn(); 2] = [&|| delete_qdisc(PORTAL_LINK), &|| delete_filters(PORTAL_LINK)];
        for (interface, removals) in [(device, of_device), (PORTAL_LINK, of_portal)] {
            for (number, remove) in removals.iter().enumerate() {
                let began = Instant::now();
                remove();
                wait::until("the program is back", PATIENCE, || {
                    let is_pinned = mode != "tcx" || pin().exists();
                    (is_pinned && is_on(netns, interface)).then_some(())
                });
                let back = began.elapsed();
                eprintln!("{mode}: {interface}, removal {number}: back after {back:?}");
                assert!(back < PROMISE, "{mode}: {interface}, removal {number}: back after {back:?}");
                let answer = open.request("GET", "/openstack", &[], b"").expect("an open connection goes on");
                assert_eq!(answer.status, 200, "{mode}: {interface}, removal {number}");
                assert_served(&routed.guest);
            }
        }
        assert_eq!(process.attachments(), attachments, "{mode}");
        assert_eq!(process.stop().code(), Some(0), "{mode}");
        assert!(!is_on(netns, device), "{mode}: nothing stays");
    }
}

#[test]
fn a_deleted_portal_uplink_is_recreated() {
    for mode in ["tcx", "clsact"] {
        let routed = Routed::new();
        let agent = routed.agent().set("metadata_agent", "attach_mode", mode).install();
        let process = agent.start();
        assert_served(&routed.guest);
        let before = process.attachments();
        routed.router.netns().ip(&format!("link del {PORTAL_LINK}"));
        let after = wait::until("the interface is attached again", PATIENCE, || {
            let now = process.attachments();
            (now.len() == 1 && now != before).then_some(now)
        });
        assert_served(&routed.guest);
        assert_eq!(after.keys().collect::<Vec<_>>(), before.keys().collect::<Vec<_>>(), "{mode}");
        wait::until("nothing failed", PATIENCE, || {
            process.state()["namespaces"]["failed"].as_array().is_some_and(Vec::is_empty).then_some(())
        });
        assert_eq!(process.stop().code(), Some(0), "{mode}");
    }
}

#[test]
fn a_filter_at_our_priority_in_a_namespace_is_reported() {
    let routed = Routed::new();
    let agent = routed.agent().set("metadata_agent", "attach_mode", "clsact").install();
    let process = agent.start();
    assert_served(&routed.guest);
    let (netns, tap) = (routed.router.netns(), routed.interface.tap());
    let attachments = process.attachments();
    let place = ["dev", &tap, "ingress", "protocol", "all", "prio", "7", "handle", "1", "bpf"];
    netns.run(&[&["tc", "filter", "replace"], &place[..], &["bytecode", "1,6 0 0 0"]].concat());
    let failed = wait::until("the failure is reported", PATIENCE, || {
        process.state()["namespaces"]["failed"].as_array().and_then(|failed| failed.first().cloned())
    });
    let error = failed["error"].as_str().unwrap_or_default();
    assert!(error.starts_with(&format!("{tap}: ")) && error.contains("cannot attach"), "{failed}");
    assert_eq!(failed["namespace"], netns.name(), "{failed}");

    netns.run(&[&["tc", "filter", "del"], &place[..]].concat());
    wait::until("the program is back", PATIENCE, || is_on(netns, &tap).then_some(()));
    wait::until("nothing failed", PATIENCE, || {
        process.state()["namespaces"]["failed"].as_array().is_some_and(Vec::is_empty).then_some(())
    });
    assert_served(&routed.guest);
    assert_eq!(process.attachments(), attachments, "it is the same attachment");
    assert_eq!(process.stop().code(), Some(0));
}
