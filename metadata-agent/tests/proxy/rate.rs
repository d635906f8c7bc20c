//! Rate limits: excess requests are rejected and never reach Nova.

use std::time::Duration;

use metadata_agent::proxy::{ProxyConfig, RateLimit, RateWindow};

use crate::rig::*;

async fn agent_that_grants(requests: u32, nova: &Nova) -> Agent {
    let window = RateWindow { requests, length: Duration::from_hours(1) };
    let rate_limit = Some(RateLimit { windows: [window; 2], ipv4: true, ipv6: false });
    let config = ProxyConfig { rate_limit, ..ProxyConfig::default() };
    Agent::with(config, upstream(nova.port), FakeDirectory::new(known())).await
}

#[tokio::test]
async fn an_excess_request_gets_429_and_keeps_its_connection() {
    let mut nova = Nova::saying(OK).await;
    let agent = agent_that_grants(3, &nova).await;
    let mut guest = agent.guest().await;
    for status in [200, 200, 200, 429, 429] {
        guest.send(GET).await;
        assert_status(&guest.answer().await, status);
    }
    // A new connection belongs to the same port.
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
async fn the_search_for_the_service_gets_503() {
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
async fn malformed_requests_get_400_and_do_not_count() {
    let nova = Nova::saying(OK).await;
    let agent = agent_that_grants(1, &nova).await;
    assert_status(&agent.ask("GET /x HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n").await, 400);
    assert_status(&agent.ask(GET).await, 200);
    assert_status(&agent.ask(GET).await, 429);
}
