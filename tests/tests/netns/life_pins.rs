//! The pin directory is restored if other software removes it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use metadata_tests::two_tenants::{HOSTNAME, assert_served};
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{Agent, AgentProcess, Guest, HostState, Routed, TwoTenants};

const MODES: [&str; 2] = ["tcx", "clsact"];

/// Returns the paths below a directory, or none if it is not there.
fn paths(directory: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        found.insert(entry.path().display().to_string());
        found.extend(paths(&entry.path()));
    }
    found
}

/// Removes the pins or their directory, and waits until they are back and the guest is served.
fn assert_restored(agent: &Agent, process: &AgentProcess, guest: &Guest, remove: impl Fn(&Path)) {
    let (pins, attachments) = (paths(&agent.pins()), process.attachments());
    assert!(pins.iter().any(|pin| pin.ends_with("/MD_PORTS")), "{pins:?}");
    remove(&agent.pins());
    wait::until("the pins are back", PATIENCE, || (paths(&agent.pins()) == pins).then_some(()));
    wait::until("the guest is served", PATIENCE, || {
        let mut connection = guest.dial(guest.metadata_ipv4(), None, Duration::from_millis(300)).ok()?;
        let answer = connection.request("GET", HOSTNAME, &[("Connection", "close")], b"").ok()?;
        (answer.status == 200).then_some(())
    });
    assert_eq!(process.attachments(), attachments);
    assert!(process.output().contains("pins were removed externally; restored"), "{}", process.output());
}

fn directory(pins: &Path) {
    fs::remove_dir_all(pins).expect("remove the directory");
}

/// Leaves directories, among them the records of filters.
fn files(pins: &Path) {
    for pin in fs::read_dir(pins).expect("list the pins").flatten().map(|entry| entry.path()) {
        if !pin.is_dir() {
            fs::remove_file(&pin).expect("remove a pin");
        }
    }
}

#[test]
fn pins_that_are_removed_are_restored() {
    for mode in MODES {
        let tenants = TwoTenants::new();
        let agent = tenants.agent().set("metadata_agent", "attach_mode", mode).install();
        let before = HostState::capture(&tenants.host);
        let process = agent.start();
        tenants.assert_served();
        for remove in [directory, files] {
            assert_restored(&agent, &process, &tenants.guests[0], remove);
        }
        // The next agent finds the same maps, and removes everything.
        let attachments = process.attachments();
        process.kill9();
        let process = agent.start();
        assert_eq!(process.attachments(), attachments, "{mode}: {}", process.output());
        tenants.assert_served();
        assert_eq!(process.stop().code(), Some(0), "{mode}");
        before.assert_same(&HostState::capture(&tenants.host));
    }
}

#[test]
fn pins_of_a_namespace_are_restored() {
    for mode in MODES {
        let routed = Routed::new();
        let agent = routed.agent().set("metadata_agent", "attach_mode", mode).install();
        let process = agent.start();
        assert_served(&routed.guest);
        for remove in [directory, files] {
            assert_restored(&agent, &process, &routed.guest, remove);
        }
        let attachments = process.attachments();
        process.kill9();
        let process = agent.start();
        assert_eq!(process.attachments(), attachments, "{mode}: {}", process.output());
        assert_served(&routed.guest);
        assert_eq!(process.stop().code(), Some(0), "{mode}");
        assert_eq!(paths(&agent.pins()), BTreeSet::new());
    }
}
