//! While no agent serves, packets go where they would go without us: to the host's own metadata path.

use std::io;
use std::time::Duration;

use metadata_agent::ids::MacAddress;
use metadata_ebpf::from_guest::METADATA_MAC;
use metadata_tests::twins::assert_served;
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{Guest, Legacy, Network, NextHop, Twins, legacy};
use nix::sys::signal::Signal;

/// Long enough that an agent on a slow machine, whose heart beats late, is not taken for a dead one.
const STALE_AFTER: &str = "3";

fn legacies(twins: &Twins) -> [Legacy; 2] {
    twins.networks.each_ref().map(Network::legacy)
}

fn greeting(network: &Network) -> String {
    format!("{}{}", legacy::GREETING, network.id)
}

fn assert_legacy_serves(twins: &Twins) {
    for (guest, network) in twins.guests.iter().zip(&twins.networks) {
        assert_eq!(guest.get("/").text(), greeting(network));
    }
}

/// One attempt that does not wait for long, as whoever ends up at a stopped agent waits for ever.
fn try_get(guest: &Guest) -> io::Result<String> {
    let mut connection = guest.dial(guest.metadata_ipv4(), None, Duration::from_millis(300))?;
    Ok(connection.request("GET", "/", &[("Connection", "close")], b"")?.text().to_owned())
}

#[test]
fn a_crash_leaves_new_connections_to_the_legacy_path_at_once() {
    for mode in ["tcx", "clsact"] {
        let twins = Twins::new();
        let legacies = legacies(&twins);
        let agent = twins.agent().set("metadata_agent", "attach_mode", mode).install();
        // So long that only the missing listener can be the reason to step aside.
        let patient =
            ["--config-file".to_owned(), twins.host.folder().join("patient.ini").display().to_string()];
        std::fs::write(&patient[1], "[metadata_agent]\nheartbeat_stale_after = 60\n").expect("write a file");
        for _ in 0..2 {
            let process = agent.spawn(&patient);
            process.wait_ready();
            twins.assert_served();
            let asked = legacies.each_ref().map(|legacy| legacy.requests().len());
            process.kill9();
            assert_legacy_serves(&twins);
            let now = legacies.each_ref().map(|legacy| legacy.requests().len());
            assert_eq!(now, asked.map(|count| count + 1), "{mode}");
        }
    }
}

#[test]
fn a_stopped_agent_leaves_everything_to_the_legacy_path() {
    let twins = Twins::new();
    let _legacies = legacies(&twins);
    let process = twins.agent().install().start();
    twins.assert_served();
    assert_eq!(process.stop().code(), Some(0));
    assert_legacy_serves(&twins);
}

#[test]
fn a_hung_agent_steps_aside_and_comes_back() {
    let twins = Twins::new();
    let _legacies = legacies(&twins);
    let agent = twins.agent().set("metadata_agent", "heartbeat_stale_after", STALE_AFTER).install();
    let process = agent.start();
    twins.assert_served();

    process.signal(Signal::SIGSTOP);
    for (guest, network) in twins.guests.iter().zip(&twins.networks) {
        let answer = wait::until("the legacy path serves", PATIENCE, || try_get(guest).ok());
        assert_eq!(answer, greeting(network));
    }
    process.signal(Signal::SIGCONT);
    for (guest, network) in twins.guests.iter().zip(&twins.networks) {
        wait::until("the agent serves again", PATIENCE, || {
            (try_get(guest).ok()? != greeting(network)).then_some(())
        });
    }
    twins.assert_served();
    assert_eq!(process.stop().code(), Some(0));
}

#[test]
fn arp_is_answered_by_whoever_serves() {
    let mut twins = Twins::new();
    for (guest, network) in twins.guests.iter_mut().zip(&twins.networks) {
        let mut spec = network.spec(metadata_tests::twins::ADDRESS);
        spec.next_hop = NextHop::OnLink;
        twins.nova.add(metadata_tests::Instance::of(&spec.port));
        *guest = network.plug(spec);
    }
    let _legacies = legacies(&twins);
    let agent = twins.agent().set("metadata_agent", "heartbeat_stale_after", STALE_AFTER).install();

    for _ in 0..2 {
        let process = agent.start();
        twins.assert_served();
        for guest in &twins.guests {
            until_answered_by(guest, MacAddress(METADATA_MAC));
        }
        twins.assert_served();
        process.kill9();
        for (guest, network) in twins.guests.iter().zip(&twins.networks) {
            until_answered_by(guest, network.gateway_mac);
            assert_eq!(guest.get("/").text(), greeting(network));
        }
    }
}

/// Has a guest ask for the MAC address anew until this one answers. The last segment of a connection that ends may be what
/// asks, so an answer from before can come back once.
fn until_answered_by(guest: &Guest, mac: MacAddress) {
    let mac = mac.to_string();
    wait::until("ARP is answered by who serves", PATIENCE, || {
        guest.netns().run(&["ip", "neigh", "flush", "to", "169.254.169.254", "dev", "eth0"]);
        // Sends the request; whether anything comes back shows in the neighbour table.
        drop(try_get(guest));
        (neighbour(guest)? == mac).then_some(())
    });
}

/// The MAC address that a guest has found for 169.254.169.254.
fn neighbour(guest: &Guest) -> Option<String> {
    let found = guest.netns().run(&["ip", "neigh", "show", "169.254.169.254", "dev", "eth0"]);
    Some(found.split_once("lladdr ")?.1.split(' ').next()?.to_owned())
}

#[test]
fn a_connection_to_the_legacy_path_survives_the_agents_coming() {
    for mode in ["tcx", "clsact"] {
        let twins = Twins::new();
        let _legacies = legacies(&twins);
        let mut old = twins.guests.each_ref().map(Guest::connect);
        let mut old_still_works = |body: &[u8]| {
            for (connection, network) in old.iter_mut().zip(&twins.networks) {
                let answer =
                    connection.request("POST", "/", &[], body).expect("an answer on an old connection");
                assert_eq!(answer.text(), greeting(network), "{mode}");
            }
        };
        old_still_works(b"before");
        let process = twins.agent().set("metadata_agent", "attach_mode", mode).install().start();
        old_still_works(b"after");
        for guest in &twins.guests {
            for _ in 0..5 {
                assert_served(guest);
                old_still_works(&vec![b'x'; 40_000]);
            }
        }
        assert_eq!(process.stop().code(), Some(0));
        old_still_works(b"and after the agent");
    }
}
