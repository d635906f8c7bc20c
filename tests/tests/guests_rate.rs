//! One guest's excess is its own: too many requests, too many connections, while its neighbour with the same address is
//! served.

#![expect(clippy::expect_used, reason = "helpers of tests fail the test")]

use std::net::TcpStream;

use metadata_tests::http::Connection;
use metadata_tests::tenants::HOSTNAME;
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{AgentProcess, Tenant, Tenants, privileged};

const LIMITED: &str = "metadata_rejected_requests_total{reason=\"rate_limited\"}";
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
fn who_asks_too_often_is_refused_alone_whatever_the_ip_version() {
    if !privileged() {
        return;
    }
    let tenants = tenants(&[
        (RATE, "rate_limit_enabled", "true"),
        (RATE, "ip_versions", "4,6"),
        (RATE, "base_window_duration", "3600"),
        (RATE, "base_query_rate_limit", "5"),
        (RATE, "burst_window_duration", "3600"),
        (RATE, "burst_query_rate_limit", "30"),
    ]);
    let Tenants { process, nova, red, blue, .. } = &tenants;
    for _ in 0..4 {
        red.assert_served();
    }
    wait::until("red's IPv6 is there", PATIENCE, || red.try_get_v6());
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
