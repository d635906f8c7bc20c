//! While no agent serves, packets go where they would go without us: to the host's own metadata
//! path.

use std::io;
use std::time::Duration;

use metadata_agent::ids::MacAddress;
use metadata_ebpf::from_guest::METADATA_MAC;
use metadata_tests::two_tenants::assert_served;
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{Guest, Legacy, Network, NextHop, TwoTenants, legacy};

/// Long enough for an agent on a slow machine, whose heartbeat is late, not to be taken for dead.
const STALE_AFTER: &str = "3";

fn legacies(tenants: &TwoTenants) -> [Legacy; 2] {
    tenants.networks.each_ref().map(Network::legacy)
}

fn greeting(network: &Network) -> String {
    format!("{}{}", legacy::GREETING, network.id)
}

fn assert_legacy_serves(tenants: &TwoTenants) {
    for (guest, network) in tenants.guests.iter().zip(&tenants.networks) {
        assert_eq!(guest.get("/").text(), greeting(network));
    }
}

/// Makes one attempt with a short limit, because a request to a stopped agent waits for ever.
fn try_get(guest: &Guest) -> io::Result<String> {
    let mut connection = guest.dial(guest.metadata_ipv4(), None, Duration::from_millis(300))?;
    Ok(connection.request("GET", "/", &[("Connection", "close")], b"")?.text().to_owned())
}

#[test]
fn after_a_crash_new_connections_take_the_legacy_path() {
    for mode in ["tcx", "clsact"] {
        let tenants = TwoTenants::new();
        let legacies = legacies(&tenants);
        let agent = tenants.agent().set("metadata_agent", "attach_mode", mode).install();
        // Long enough that only the missing listener can be the reason to step aside.
        let patient =
            ["--config-file".to_owned(), tenants.host.folder().join("patient.ini").display().to_string()];
        std::fs::write(&patient[1], "[metadata_agent]\nheartbeat_stale_after = 60\n").expect("write a file");
        for _ in 0..2 {
            let process = agent.spawn(&patient);
            process.wait_ready();
            tenants.assert_served();
            let asked = legacies.each_ref().map(|legacy| legacy.requests().len());
            process.kill9();
            assert_legacy_serves(&tenants);
            let now = legacies.each_ref().map(|legacy| legacy.requests().len());
            assert_eq!(now, asked.map(|count| count + 1), "{mode}");
        }
    }
}

#[test]
fn a_stopped_agent_leaves_everything_to_the_legacy_path() {
    let tenants = TwoTenants::new();
    let _legacies = legacies(&tenants);
    let process = tenants.agent().install().start();
    tenants.assert_served();
    assert_eq!(process.stop().code(), Some(0));
    assert_legacy_serves(&tenants);
}

#[test]
fn a_hung_agent_is_bypassed_and_comes_back() {
    let tenants = TwoTenants::new();
    let _legacies = legacies(&tenants);
    let agent = tenants.agent().set("metadata_agent", "heartbeat_stale_after", STALE_AFTER).install();
    let process = agent.start();
    tenants.assert_served();

    process.freeze();
    for (guest, network) in tenants.guests.iter().zip(&tenants.networks) {
        let answer = wait::until("the legacy path serves", PATIENCE, || try_get(guest).ok());
        assert_eq!(answer, greeting(network));
    }
    process.thaw();
    for (guest, network) in tenants.guests.iter().zip(&tenants.networks) {
        wait::until("the agent serves again", PATIENCE, || {
            (try_get(guest).ok()? != greeting(network)).then_some(())
        });
    }
    tenants.assert_served();
    assert_eq!(process.stop().code(), Some(0));
}

/// The data runtime is missed at once. The control runtime may block for seconds in the kernel.
#[test]
fn an_agent_whose_runtime_hangs_is_bypassed_and_comes_back() {
    for (runtime, threads) in [("data", "md-data"), ("control", "metadata-agent")] {
        let tenants = TwoTenants::new();
        let _legacies = legacies(&tenants);
        let agent = tenants.agent().set("metadata_agent", "heartbeat_stale_after", STALE_AFTER).install();
        let process = agent.start();
        tenants.assert_served();

        let frozen = process.freeze_threads(threads);
        if runtime == "control" {
            tenants.assert_served();
        }
        for (guest, network) in tenants.guests.iter().zip(&tenants.networks) {
            wait::until(&format!("the legacy path serves without the {runtime} runtime"), PATIENCE, || {
                (try_get(guest).ok()? == greeting(network)).then_some(())
            });
        }
        drop(frozen);
        for (guest, network) in tenants.guests.iter().zip(&tenants.networks) {
            wait::until(&format!("the agent serves with the {runtime} runtime"), PATIENCE, || {
                (try_get(guest).ok()? != greeting(network)).then_some(())
            });
        }
        tenants.assert_served();
        let is_logged = process.output().contains("control runtime hangs");
        assert_eq!(is_logged, runtime == "control", "{}", process.output());
        assert_eq!(process.stop().code(), Some(0), "{runtime}");
    }
}

#[test]
fn arp_is_answered_by_the_path_that_serves() {
    let mut tenants = TwoTenants::new();
    for (guest, network) in tenants.guests.iter_mut().zip(&tenants.networks) {
        let mut spec = network.spec(metadata_tests::two_tenants::ADDRESS);
        spec.next_hop = NextHop::OnLink;
        tenants.nova.add(metadata_tests::Instance::from_port(&spec.port));
        *guest = network.plug(spec);
    }
    let _legacies = legacies(&tenants);
    let agent = tenants.agent().set("metadata_agent", "heartbeat_stale_after", STALE_AFTER).install();

    for _ in 0..2 {
        let process = agent.start();
        tenants.assert_served();
        for guest in &tenants.guests {
            until_answered_by(guest, MacAddress(METADATA_MAC));
        }
        tenants.assert_served();
        process.kill9();
        for (guest, network) in tenants.guests.iter().zip(&tenants.networks) {
            until_answered_by(guest, network.gateway_mac);
            assert_eq!(guest.get("/").text(), greeting(network));
        }
    }
}

/// Makes a guest resolve the MAC address again until this one responds. The last segment of a
/// closing connection may trigger the resolution, so an earlier result can appear once more.
fn until_answered_by(guest: &Guest, mac: MacAddress) {
    let mac = mac.to_string();
    wait::until("ARP is answered by the serving path", PATIENCE, || {
        guest.netns().run(&["ip", "neigh", "flush", "to", "169.254.169.254", "dev", "eth0"]);
        // Sends the request. The neighbour table shows if anything responds.
        drop(try_get(guest));
        (guest.neighbour("169.254.169.254")? == mac).then_some(())
    });
}

#[test]
fn a_legacy_connection_survives_the_agents_start() {
    for mode in ["tcx", "clsact"] {
        let tenants = TwoTenants::new();
        let _legacies = legacies(&tenants);
        let mut old = tenants.guests.each_ref().map(Guest::connect);
        let mut old_still_works = |body: &[u8]| {
            for (connection, network) in old.iter_mut().zip(&tenants.networks) {
                let answer =
                    connection.request("POST", "/", &[], body).expect("an answer on an old connection");
                assert_eq!(answer.text(), greeting(network), "{mode}");
            }
        };
        old_still_works(b"before");
        let process = tenants.agent().set("metadata_agent", "attach_mode", mode).install().start();
        old_still_works(b"after");
        for guest in &tenants.guests {
            for _ in 0..5 {
                assert_served(guest);
                old_still_works(&vec![b'x'; 40_000]);
            }
        }
        assert_eq!(process.stop().code(), Some(0));
        old_still_works(b"and after the agent");
    }
}
