//! Starts and ends that are not alone: requests in flight, a second agent, a signal in the middle of the start.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{HostState, KernelObjects, Mode, Network, Twins, legacy};
use nix::sys::signal::Signal;

#[test]
fn requests_in_flight_end_properly_while_new_ones_go_to_the_legacy_path() {
    for mode in ["tcx", "clsact"] {
        let twins = Twins::new();
        let _legacies = twins.networks.each_ref().map(Network::legacy);
        let agent = twins.agent().set("metadata_agent", "attach_mode", mode).install();
        let before = HostState::capture(&twins.host);
        let process = agent.start();
        twins.nova.set_mode(Mode::Hold);
        thread::scope(|scope| {
            let in_flight = twins
                .guests
                .each_ref()
                .map(|guest| scope.spawn(|| metadata_tests::twins::assert_served(guest)));
            twins.nova.wait_for(2, PATIENCE);
            process.signal(Signal::SIGTERM);
            for (guest, network) in twins.guests.iter().zip(&twins.networks) {
                // Held by Nova until the listener is closed.
                let answer = wait::until("new connections go to the legacy path", PATIENCE, || {
                    let mut connection =
                        guest.dial(guest.metadata_ipv4(), None, Duration::from_millis(300)).ok()?;
                    connection.request("GET", "/", &[("Connection", "close")], b"").ok()
                });
                assert_eq!(answer.text(), format!("{}{}", legacy::GREETING, network.id), "{mode}");
            }
            assert!(process.exited().is_none(), "the agent waits for what is in flight");
            twins.nova.set_mode(Mode::Serve);
            for request in in_flight {
                request.join().expect("the request in flight is served");
            }
        });
        assert_eq!(process.wait_exit(PATIENCE).code(), Some(0), "{}", process.output());
        before.assert_same(&HostState::capture(&twins.host));
    }
}

#[test]
fn a_second_agent_refuses_and_harms_nobody() {
    let twins = Twins::new();
    let agent = twins.agent().install();
    let first = agent.start();
    let running = HostState::capture(&twins.host);
    let objects = KernelObjects::of(&twins.host);
    let socket = agent.admin_socket().display().to_string();
    let pins = twins.host.bpffs().join("metadata").display().to_string();
    let elsewhere = twins.host.folder().join("second.sock").display().to_string();
    for (args, want) in [
        (vec![], format!("another agent answers on {socket}")),
        (vec!["--admin-socket".to_owned(), elsewhere], format!("{pins} is in use by another agent")),
    ] {
        let second = agent.spawn(&args);
        assert_eq!(second.wait_exit(PATIENCE).code(), Some(1));
        wait::until("it has said why", PATIENCE, || second.output().contains(&want).then_some(()));
        running.assert_same(&HostState::capture(&twins.host));
        assert_eq!(KernelObjects::wait_for_counts(&twins.host, objects.counts()), objects);
        twins.assert_served();
    }
    assert_eq!(first.stop().code(), Some(0));
}

#[test]
fn a_signal_during_the_start_leaves_nothing() {
    let twins = Twins::new();
    // Enough to start for a while.
    let many: Vec<String> = (0..200).map(|n| format!("tuntap add dev tapx{n} mode tap")).collect();
    twins.host.netns().ip(&many.join("\n"));
    let agent = twins.agent().install();
    let before = HostState::capture(&twins.host);
    let process = agent.spawn(&[]);
    let pins = twins.host.bpffs().join("metadata");
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
    before.assert_same(&HostState::capture(&twins.host));
}

#[test]
fn a_start_that_fails_halfway_leaves_nothing() {
    let twins = Twins::new();
    let agent = twins.agent().install();
    // The programs are loaded and pinned by then.
    let name = Path::new("/run/netns").join(agent.portal());
    fs::create_dir(&name).expect("make a directory where the portal's name belongs");
    let before = HostState::capture(&twins.host);
    let process = agent.spawn(&[]);
    let status = process.wait_exit(PATIENCE);
    let after = HostState::capture(&twins.host);
    fs::remove_dir(&name).expect("remove it");
    assert_eq!(status.code(), Some(1));
    wait::until("it has said why", PATIENCE, || process.output().contains(agent.portal()).then_some(()));
    before.assert_same(&after);
}

#[test]
fn an_agent_whose_portal_is_taken_away_says_so_and_leaves_nothing() {
    let twins = Twins::new();
    let _legacies = twins.networks.each_ref().map(Network::legacy);
    let agent = twins.agent().install();
    let before = HostState::capture(&twins.host);
    let process = agent.start();
    twins.host.netns().run(&["ip", "link", "del", "md-portal"]);
    assert_eq!(process.wait_exit(PATIENCE).code(), Some(1));
    let said = "the portal's interface ended by itself";
    wait::until("it has said why", PATIENCE, || process.output().contains(said).then_some(()));
    before.assert_same(&HostState::capture(&twins.host));
    let next = agent.start();
    twins.assert_served();
    assert_eq!(next.stop().code(), Some(0));
}
