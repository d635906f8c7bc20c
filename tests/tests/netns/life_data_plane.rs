//! The data plane is a process of its own. Whatever becomes of it, guests are served again at once.

use std::io;
use std::time::{Duration, Instant};

use metadata_tests::agent::AgentProcess;
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{Guest, Legacy, Mode, Network, ServedTenants, TwoTenants, legacy, processes};

/// Long enough for a heartbeat that is late on a slow machine.
const STALE_AFTER: &str = "3";

/// Waits for the next data plane.
fn successor(process: &AgentProcess, former: u32) -> u32 {
    wait::until("another data plane runs", PATIENCE, || {
        process.running_data_plane().filter(|pid| *pid != former)
    })
}

fn restarts(process: &AgentProcess) -> u64 {
    process.count("metadata_data_plane_restarts_total")
}

/// Only requests in flight are lost. Connections wait in the kernel for the next process.
#[test]
fn connections_wait_for_the_next_data_plane() {
    let tenants = ServedTenants::new();
    let (process, red) = (&tenants.process, &tenants.red);
    let mut gaps = Vec::new();
    for round in 1..=10 {
        red.assert_hostname_served();
        let former = process.kill_data_plane();
        let begin = Instant::now();
        // Neither refused nor reset, although it comes before anything has noticed.
        red.assert_hostname_served();
        gaps.push(begin.elapsed());
        successor(process, former);
        wait::until("the restart is counted", PATIENCE, || (restarts(process) == round).then_some(()));
    }
    gaps.sort_unstable();
    println!("served after {:?} to {:?}, median {:?}", gaps[0], gaps[9], gaps[5]);
    let served = process.count("metadata_requests_total{code=\"200\"}");
    assert!(served >= 20, "{served}: what a data plane counted outlives it");
    assert!(process.output().contains("data plane ended; starting another one"), "{}", process.output());
    assert_eq!(process.exited(), None);
}

#[test]
fn a_request_in_flight_is_reset_and_nothing_else_is_lost() {
    let tenants = TwoTenants::new();
    let process = tenants.agent().install().start();
    tenants.nova.set_mode(Mode::Hold);
    let mut in_flight = tenants.guests[0].connect();
    in_flight.send("GET / HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n").expect("send the request");
    tenants.nova.wait_for(1, PATIENCE);
    process.kill_data_plane();
    let error = in_flight.receive().expect_err("its process is gone");
    assert!(matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof), "{error}");
    tenants.nova.set_mode(Mode::Serve);
    tenants.assert_served();
    assert_eq!(process.count("metadata_connections_open"), 0, "they ended with their process");
}

fn try_get(guest: &Guest) -> io::Result<String> {
    let mut connection = guest.dial(guest.metadata_ipv4(), None, Duration::from_millis(300))?;
    Ok(connection.request("GET", "/", &[("Connection", "close")], b"")?.text().to_owned())
}

/// The kernel notices it first. If the data plane does not come back, it is replaced.
#[test]
fn a_data_plane_that_hangs_is_bypassed_and_replaced() {
    let tenants = TwoTenants::new();
    let _legacies: [Legacy; 2] = tenants.networks.each_ref().map(Network::legacy);
    let greeting = |network: &Network| format!("{}{}", legacy::GREETING, network.id);
    let agent = tenants.agent().set("metadata_agent", "heartbeat_stale_after", STALE_AFTER).install();
    let process = agent.start();
    tenants.assert_served();
    let hung = process.data_plane();
    processes::stop(hung);
    for (guest, network) in tenants.guests.iter().zip(&tenants.networks) {
        wait::until("the legacy path serves", PATIENCE, || {
            (try_get(guest).ok()? == greeting(network)).then_some(())
        });
    }
    successor(&process, hung);
    assert!(process.output().contains("data plane hangs; starting another one"), "{}", process.output());
    for (guest, network) in tenants.guests.iter().zip(&tenants.networks) {
        wait::until("the agent serves again", PATIENCE, || {
            (try_get(guest).ok()? != greeting(network)).then_some(())
        });
    }
    tenants.assert_served();
    assert!(!processes::runs(hung), "the former one was killed");
    assert_eq!(process.stop().code(), Some(0));
}

/// Guests whose identity is known need nothing of the control process.
#[test]
fn the_data_plane_serves_while_the_control_process_hangs() {
    let tenants = TwoTenants::new();
    let agent = tenants.agent().set("metadata_agent", "heartbeat_stale_after", "60").install();
    let process = agent.start();
    tenants.assert_served();
    processes::stop(process.pid());
    for _ in 0..10 {
        tenants.assert_served();
    }
    process.thaw();
    tenants.assert_served();
    assert_eq!((process.stop().code(), "in order"), (Some(0), "in order"));
}

#[test]
fn no_data_plane_outlives_its_control_process() {
    let tenants = TwoTenants::new();
    let agent = tenants.agent().install();
    for crashes in [true, false] {
        let process = agent.start();
        tenants.assert_served();
        let data_plane = process.data_plane();
        if crashes {
            process.kill9();
        } else {
            assert_eq!(process.stop().code(), Some(0));
        }
        assert!(!processes::runs(data_plane), "crashes: {crashes}");
    }
}
