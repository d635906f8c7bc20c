//! The excess of one guest, too many requests or too many connections, does not affect its
//! neighbour with the same address.

use std::net::TcpStream;

use metadata_tests::two_tenants::HOSTNAME;
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{AgentProcess, Connection, ServedTenants, Tenant};

const LIMITED: &str = "metadata_rejected_requests_total{reason=\"rate_limited\"}";
const OWN: &str = "metadata_agent";
const RATE: &str = "metadata_rate_limiting";
const OPEN: &str = "metadata_connections_open";

/// Starts two tenants whose agent has these additional options.
fn tenants(options: &[(&str, &str, &str)]) -> ServedTenants {
    ServedTenants::with(|installer, red, blue| {
        let installer = installer.port(&red.port).port(&blue.port);
        options.iter().fold(installer, |installer, (group, key, value)| installer.set(group, key, value))
    })
}

#[test]
fn only_the_guest_that_asks_too_often_is_refused() {
    let tenants = tenants(&[
        (RATE, "rate_limit_enabled", "true"),
        (RATE, "base_window_duration", "3600"),
        (RATE, "base_query_rate_limit", "5"),
        (RATE, "burst_window_duration", "3600"),
        (RATE, "burst_query_rate_limit", "30"),
    ]);
    let ServedTenants { process, nova, red, blue, .. } = &tenants;
    for _ in 0..5 {
        red.assert_hostname_served();
    }
    for _ in 0..3 {
        let refused = red.get(HOSTNAME);
        assert_eq!((refused.status, refused.header("retry-after")), (429, Some("1")));
        let probed = red.get("/openstack");
        assert_eq!((probed.status, probed.header("retry-after")), (503, Some("1")));
    }
    for _ in 0..5 {
        blue.assert_hostname_served();
    }
    assert_eq!(blue.get(HOSTNAME).status, 429);
    assert_eq!((process.count(LIMITED), nova.requests().len()), (7, 10));
    let output = process.output();
    assert!(output.contains("raise base_query_rate_limit"), "{output}");
}

/// Opens connections and sends half a request on each, as a guest does that wants to keep them.
fn hoard(guest: &Tenant, wanted: u32) -> Vec<Connection<TcpStream>> {
    let stalled = |_| {
        let mut connection = guest.connect();
        // If the agent has already refused the connection, this is counted below.
        let _ = connection.send("GET /latest HTTP/1.1\r\nHost: ");
        connection
    };
    (0..wanted).map(stalled).collect()
}

fn until_held(process: &AgentProcess, open: u64, refused: &[(&str, u64)]) {
    wait::until("all connections are taken or refused", PATIENCE, || {
        let as_reported = refused.iter().all(|(reason, times)| {
            let series = format!("metadata_rejected_connections_total{{reason=\"{reason}\"}}");
            process.count(&series) == *times
        });
        (process.count(OPEN) == open && as_reported).then_some(())
    });
}

#[test]
fn holding_connections_up_to_the_limit_locks_out_no_one() {
    let tenants = tenants(&[(OWN, "connections_per_guest", "10")]);
    let ServedTenants { process, red, blue, .. } = &tenants;
    let held = hoard(red, 13);
    until_held(process, 10, &[("guest_connections", 3)]);
    blue.assert_hostname_served();
    drop(held);
    until_held(process, 0, &[]);
    red.assert_hostname_served();
}

/// With these limits, red alone could take all places, and so could red together with blue.
#[test]
fn holding_all_connections_does_not_lock_out_a_neighbour() {
    let tenants = tenants(&[(OWN, "connections", "8")]);
    let ServedTenants { process, red, blue, .. } = &tenants;
    // Four places are reserved. Of the eight shared ones, a guest gets no more than it leaves free.
    let reds = hoard(red, 20);
    until_held(process, 8, &[("total_connections", 12)]);
    let blues = hoard(blue, 20);
    until_held(process, 14, &[("total_connections", 26)]);
    drop(reds);
    until_held(process, 6, &[]);
    let reds = hoard(red, 4);
    until_held(process, 10, &[]);
    drop(blues);
    until_held(process, 4, &[]);
    blue.assert_hostname_served();
    drop(reds);
    until_held(process, 0, &[]);
    red.assert_hostname_served();
}
