//! A guest that asks too often is told so, and Nova hears nothing of it.

use std::time::Duration;

use metadata_agent::proxy::{ProxyConfig, RateLimit, RateWindow};

use crate::rig::*;

async fn agent_that_grants(requests: u32, nova: &Nova) -> Agent {
    let window = RateWindow { requests, length: Duration::from_hours(1) };
    let rate_limit = Some(RateLimit { windows: [window; 2], ipv4: true, ipv6: false });
    let config = ProxyConfig { rate_limit, ..ProxyConfig::default() };
    Agent::with(config, upstream(nova.port), Desk::with(known())).await
}

#[tokio::test]
async fn a_request_too_many_is_answered_with_429_and_the_connection_stays() {
    let mut nova = Nova::saying(OK).await;
    let agent = agent_that_grants(3, &nova).await;
    let mut guest = agent.guest().await;
    for status in [200, 200, 200, 429, 429] {
        guest.send(GET).await;
        assert_status(&guest.answer().await, status);
    }
    // A connection of its own makes nobody another port.
    let answer = agent.ask(GET).await;
    assert_status(&answer, 429);
    assert_eq!(header(answer.as_bytes(), "retry-after").as_deref(), Some("1"));
    for _ in 0..3 {
        nova.next().await;
    }
    assert!(nova.seen.is_empty());
    agent.assert_counted("metadata_rejected_requests_total{reason=\"rate_limited\"} 3");
}

#[tokio::test]
async fn who_looks_for_the_service_is_told_that_there_is_one() {
    let nova = Nova::saying(OK).await;
    let agent = agent_that_grants(1, &nova).await;
    assert_status(&agent.ask(GET).await, 200);
    for path in ["/openstack", "//openstack", "/openstack/", "/2009-04-04/meta-data/instance-id"] {
        let answer = agent.ask(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n")).await;
        assert_status(&answer, 503);
        assert_eq!(header(answer.as_bytes(), "retry-after").as_deref(), Some("1"), "{path}");
    }
    assert_status(&agent.ask(GET).await, 429);
}

#[tokio::test]
async fn what_is_malformed_is_told_so_and_does_not_count() {
    let nova = Nova::saying(OK).await;
    let agent = agent_that_grants(1, &nova).await;
    assert_status(&agent.ask("GET /x HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n").await, 400);
    assert_status(&agent.ask(GET).await, 200);
    assert_status(&agent.ask(GET).await, 429);
}
