//! One guest's excess is its own: too many requests, too many connections, while its neighbour with the same address is
//! served.

use std::net::TcpStream;

use metadata_tests::tenants::HOSTNAME;
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{AgentProcess, Connection, Tenant, Tenants};

const LIMITED: &str = "metadata_rejected_requests_total{reason=\"rate_limited\"}";
const OWN: &str = "metadata_agent";
const RATE: &str = "metadata_rate_limiting";
const OPEN: &str = "metadata_connections_open";

/// Tenants whose agent has these options besides.
fn tenants(options: &[(&str, &str, &str)]) -> Tenants {
    Tenants::with(|installer, red, blue| {
        let installer = installer.port(&red.port).port(&blue.port);
        options.iter().fold(installer, |installer, (group, key, value)| installer.set(group, key, value))
    })
}

#[test]
fn who_asks_too_often_is_refused_alone() {
    let tenants = tenants(&[
        (RATE, "rate_limit_enabled", "true"),
        (RATE, "base_window_duration", "3600"),
        (RATE, "base_query_rate_limit", "5"),
        (RATE, "burst_window_duration", "3600"),
        (RATE, "burst_query_rate_limit", "30"),
    ]);
    let Tenants { process, nova, red, blue, .. } = &tenants;
    for _ in 0..5 {
        red.assert_served();
    }
    for _ in 0..3 {
        let refused = red.get(HOSTNAME);
        assert_eq!((refused.status, refused.header("retry-after")), (429, Some("1")));
        let probed = red.get("/openstack");
        assert_eq!((probed.status, probed.header("retry-after")), (503, Some("1")));
    }
    for _ in 0..5 {
        blue.assert_served();
    }
    assert_eq!(blue.get(HOSTNAME).status, 429);
    assert_eq!((process.count(LIMITED), nova.requests().len()), (7, 10));
    let told = process.output();
    assert!(told.contains("raise base_query_rate_limit"), "{told}");
}

/// Opens connections and sends half a request on each, as a guest does that wants to keep them.
fn hoard(guest: &Tenant, wanted: u32) -> Vec<Connection<TcpStream>> {
    let stalled = |_| {
        let mut connection = guest.connect();
        // Where the agent has refused it already, that is counted below.
        let _ = connection.send("GET /latest HTTP/1.1\r\nHost: ");
        connection
    };
    (0..wanted).map(stalled).collect()
}

fn until_held(process: &AgentProcess, open: u64, refused: &[(&str, u64)]) {
    wait::until("all connections are taken or refused", PATIENCE, || {
        let as_told = refused.iter().all(|(reason, times)| {
            let series = format!("metadata_rejected_connections_total{{reason=\"{reason}\"}}");
            process.count(&series) == *times
        });
        (process.count(OPEN) == open && as_told).then_some(())
    });
}

#[test]
fn who_hoards_connections_up_to_its_own_limit_keeps_nobody_out() {
    let tenants = tenants(&[(OWN, "connections_per_port", "10")]);
    let Tenants { process, red, blue, .. } = &tenants;
    let held = hoard(red, 13);
    until_held(process, 10, &[("attachment_connections", 3)]);
    blue.assert_served();
    drop(held);
    until_held(process, 0, &[]);
    red.assert_served();
}

/// Both limits are such that red, and red with blue, could take all places there are.
#[test]
fn who_hoards_all_connections_there_are_leaves_its_neighbour_some() {
    let tenants = tenants(&[(OWN, "connections", "8")]);
    let Tenants { process, red, blue, .. } = &tenants;
    // Four are everybody's; of the eight that are shared nobody gets more than it leaves.
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
    blue.assert_served();
    drop(reds);
    until_held(process, 0, &[]);
    red.assert_served();
}
