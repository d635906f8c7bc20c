//! Starts and stops under load: requests in flight, a second agent, a signal in the middle of the
//! start.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{HostState, KernelObjects, Mode, Network, TwoTenants, legacy};
use nix::sys::signal::Signal;

/// New connections go to the legacy path.
#[test]
fn requests_in_flight_finish_while_new_ones_bypass_the_agent() {
    for mode in ["tcx", "clsact"] {
        let tenants = TwoTenants::new();
        let _legacies = tenants.networks.each_ref().map(Network::legacy);
        let agent = tenants.agent().set("metadata_agent", "attach_mode", mode).install();
        let before = HostState::capture(&tenants.host);
        let process = agent.start();
        tenants.nova.set_mode(Mode::Hold);
        thread::scope(|scope| {
            let in_flight = tenants
                .guests
                .each_ref()
                .map(|guest| scope.spawn(|| metadata_tests::two_tenants::assert_served(guest)));
            tenants.nova.wait_for(2, PATIENCE);
            process.signal(Signal::SIGTERM);
            for (guest, network) in tenants.guests.iter().zip(&tenants.networks) {
                // Nova holds it until the listener is closed.
                let answer = wait::until("new connections go to the legacy path", PATIENCE, || {
                    let mut connection =
                        guest.dial(guest.metadata_ipv4(), None, Duration::from_millis(300)).ok()?;
                    connection.request("GET", "/", &[("Connection", "close")], b"").ok()
                });
                assert_eq!(answer.text(), format!("{}{}", legacy::GREETING, network.id), "{mode}");
            }
            assert!(process.exited().is_none(), "the agent waits for requests in flight");
            tenants.nova.set_mode(Mode::Serve);
            for request in in_flight {
                request.join().expect("the request in flight is served");
            }
        });
        assert_eq!(process.wait_exit(PATIENCE).code(), Some(0), "{}", process.output());
        before.assert_same(&HostState::capture(&tenants.host));
    }
}

#[test]
fn a_second_agent_refuses_to_start_and_does_no_harm() {
    let tenants = TwoTenants::new();
    let agent = tenants.agent().install();
    let first = agent.start();
    let running = HostState::capture(&tenants.host);
    let objects = KernelObjects::from_host(&tenants.host);
    let socket = agent.admin_socket().display().to_string();
    let pins = tenants.host.bpffs().join("metadata").display().to_string();
    let elsewhere = tenants.host.folder().join("second.sock").display().to_string();
    for (args, want) in [
        (vec![], format!("another agent answers on {socket}")),
        (vec!["--admin-socket".to_owned(), elsewhere], format!("{pins} is in use by another agent")),
    ] {
        let second = agent.spawn(&args);
        assert_eq!(second.wait_exit(PATIENCE).code(), Some(1));
        wait::until("it reported the reason", PATIENCE, || second.output().contains(&want).then_some(()));
        running.assert_same(&HostState::capture(&tenants.host));
        assert_eq!(KernelObjects::wait_for_counts(&tenants.host, objects.counts()), objects);
        tenants.assert_served();
    }
    assert_eq!(first.stop().code(), Some(0));
}

#[test]
fn a_signal_during_the_start_leaves_nothing_behind() {
    let tenants = TwoTenants::new();
    // Enough for a start that takes a while.
    let many: Vec<String> = (0..200).map(|n| format!("tuntap add dev tapx{n} mode tap")).collect();
    tenants.host.netns().ip(&many.join("\n"));
    let agent = tenants.agent().install();
    let before = HostState::capture(&tenants.host);
    let process = agent.spawn(&[]);
    let pins = tenants.host.bpffs().join("metadata");
    wait::until("the start is under way", PATIENCE, || {
        let guests = fs::read_dir(&pins).ok()?.flatten();
        guests
            .map(|pin| pin.file_name())
            .any(|name| name.to_string_lossy().starts_with("guest-"))
            .then_some(())
    });
    process.signal(Signal::SIGTERM);
    assert_eq!(process.wait_exit(PATIENCE).code(), Some(0), "{}", process.output());
    assert!(!process.output().contains("serving"), "it had already started: {}", process.output());
    before.assert_same(&HostState::capture(&tenants.host));
}

#[test]
fn a_start_that_fails_halfway_leaves_nothing_behind() {
    let tenants = TwoTenants::new();
    let agent = tenants.agent().install();
    // The programs are loaded and pinned by then.
    let name = Path::new("/run/netns").join(agent.portal());
    fs::create_dir(&name).expect("create a directory with the name of the portal");
    let before = HostState::capture(&tenants.host);
    let process = agent.spawn(&[]);
    let status = process.wait_exit(PATIENCE);
    let after = HostState::capture(&tenants.host);
    fs::remove_dir(&name).expect("remove it");
    assert_eq!(status.code(), Some(1));
    wait::until("it reported the reason", PATIENCE, || {
        process.output().contains(agent.portal()).then_some(())
    });
    before.assert_same(&after);
}
