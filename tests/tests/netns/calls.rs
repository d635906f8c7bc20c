//! The system calls that the agent makes for a request.
//!
//! They take most of the agent's CPU time, and their number per request hardly depends on the
//! machine or its load. So the record in the tree is exact, and each change of it shows in review.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use metadata_tests::ServedTenants;
use metadata_tests::system_calls::{self, SystemCalls};
use metadata_tests::two_tenants::HOSTNAME;
use serde::{Deserialize, Serialize};

/// Requests of each kind. What happens in fewer than half of them is not part of a request: the
/// heartbeat, or a read that found nothing yet.
const REQUESTS: u64 = 1000;

/// Requests after which every pool and every buffer exists.
const WARM_UP: u64 = 50;

/// Calls by which threads wait for events and wake each other. Their number depends on the
/// scheduler.
const VARYING: [&str; 5] = ["epoll_pwait", "epoll_wait", "futex", "sched_yield", "write"];

const FILE: &str = "calls.json";

/// The calls of one request.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Calls {
    kept_connection: SystemCalls,
    new_connection: SystemCalls,
}

/// `BLESS=1` rewrites the record.
#[test]
fn a_request_makes_the_recorded_system_calls() {
    let tenants =
        ServedTenants::with(|agent, red, blue| agent.port(&red.port).port(&blue.port).without_probes());
    let (process, red) = (&tenants.process, &tenants.red);
    let pid = process.data_plane();

    let mut connection = red.connect();
    let mut ask = || {
        let answer = connection.request("GET", HOSTNAME, &[], b"").expect("an answer");
        assert_eq!(answer.text(), red.hostname());
    };
    (0..WARM_UP).for_each(|_| ask());
    let kept = system_calls::count(pid, || (0..REQUESTS).for_each(|_| ask()));
    drop(connection);

    (0..WARM_UP).for_each(|_| red.assert_hostname_served());
    let new = system_calls::count(pid, || (0..REQUESTS).for_each(|_| red.assert_hostname_served()));

    let found = Calls { kept_connection: of_a_request(&kept), new_connection: of_a_request(&new) };
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(FILE);
    if std::env::var_os("BLESS").is_some() {
        let text = serde_json::to_string_pretty(&found).expect("JSON");
        fs::write(&path, text + "\n").expect("write the record");
    }
    let text = fs::read_to_string(&path).expect("read the record");
    let recorded: Calls = serde_json::from_str(&text).expect("a record");
    assert_eq!(
        found, recorded,
        "left: found, right: tests/{FILE}. If this is intended, run this test with BLESS=1, and give the \
         reason in the commit.\nAll calls for {REQUESTS} requests on a kept connection: {kept:?}\n\
         For {REQUESTS} new connections: {new:?}"
    );
}

fn of_a_request(all: &SystemCalls) -> SystemCalls {
    let mut calls: BTreeMap<_, _> = all.clone();
    calls.retain(|name, _| !VARYING.contains(&name.as_str()));
    for calls in calls.values_mut() {
        *calls = (*calls + REQUESTS / 2) / REQUESTS;
    }
    calls.retain(|_, calls| *calls > 0);
    calls
}
