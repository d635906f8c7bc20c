//! The load generator counts correctly. The figures of benches depend on it.

use std::time::Duration;

use metadata_tests::load::{Failure, Load, Steady, Style, Tally};
use metadata_tests::{Answer, HttpServer, Mode, Netns, Pace};

const BODY: &[u8] = b"an answer";

/// Runs a load in one namespace over loopback, because only the counting is tested.
fn load(mode: Mode, style: Style) -> Tally {
    let netns = Netns::new("load");
    let server = HttpServer::start(&netns, ([127, 0, 0, 1], 0).into(), |_| Answer::text(200, "an answer"));
    server.set_mode(mode);
    let load = Load {
        target: server.address(),
        path: "/".to_owned(),
        post: None,
        body: BODY.to_vec(),
        connections: 3,
        style,
        duration: Duration::from_millis(100),
    };
    load.run(&netns)
}

fn fails_as(mode: &Mode, failure: Failure) {
    for style in [Style::KeepAlive, Style::NewConnection] {
        let tally = load(mode.clone(), style);
        assert_eq!((tally.in_time, tally.latencies.len()), (0, 0), "{mode:?} {style:?}");
        let kinds: Vec<Failure> = tally.failures.keys().copied().collect();
        assert_eq!(kinds, [failure], "{mode:?} {style:?}: {:?}", tally.first_failure);
    }
}

#[test]
fn correct_answers_are_counted_and_timed() {
    for style in [Style::KeepAlive, Style::NewConnection] {
        let tally = load(Mode::Static(BODY.into()), style);
        assert_eq!(tally.failed(), 0, "{style:?}: {:?}", tally.first_failure);
        assert!(tally.in_time > 0, "{style:?}");
        let late = tally.latencies.len() as u64 - tally.in_time;
        assert!(late <= 3, "{style:?}: at most one late response per connection, not {late}");
        assert!(tally.latencies.is_sorted(), "{style:?}");
        assert!(tally.quantile(0.5) > Duration::ZERO && tally.cpu > Duration::ZERO, "{style:?}");
    }
}

#[test]
fn keep_alive_reuses_connections_and_close_does_not() {
    for (style, kept) in [(Style::KeepAlive, true), (Style::NewConnection, false)] {
        let netns = Netns::new("load");
        let respond = |_: &_| Answer { status: 200, headers: Vec::new(), body: BODY.into() };
        let server = HttpServer::start(&netns, ([127, 0, 0, 1], 0).into(), respond);
        let load = Load {
            target: server.address(),
            path: "/asked/for".to_owned(),
            post: None,
            body: BODY.to_vec(),
            connections: 2,
            style,
            duration: Duration::from_millis(50),
        };
        let tally = load.run(&netns);
        assert_eq!(tally.failed(), 0, "{style:?}: {:?}", tally.first_failure);
        let requests = server.requests();
        assert!(requests.len() > 2 && requests.iter().all(|request| request.path == "/asked/for"));
        let last = requests.iter().map(|request| request.connection).max().unwrap_or_default();
        let connections = usize::try_from(last).unwrap_or(usize::MAX) + 1;
        assert_eq!(connections, if kept { 2 } else { requests.len() }, "{style:?}");
    }
}

#[test]
fn wrong_answers_are_failures() {
    fails_as(&Mode::Static(b"no answer".as_slice().into()), Failure::Body);
    fails_as(&Mode::Static(b"an answer of another length".as_slice().into()), Failure::Length);
    fails_as(&Mode::Fixed(Answer::text(503, "an answer")), Failure::Status);
    fails_as(&Mode::Refuse, Failure::Connect);
    fails_as(&Mode::ResetMidBody, Failure::Broken);
}

/// Runs 20 requests, 5 ms apart, in a namespace of their own.
fn steady(mode: Mode) -> Tally {
    let netns = Netns::new("load");
    let server = HttpServer::start(&netns, ([127, 0, 0, 1], 0).into(), |_| Answer::text(200, "an answer"));
    server.set_mode(mode);
    let steady = Steady {
        target: server.address(),
        path: "/".to_owned(),
        body: BODY.to_vec(),
        interval: Duration::from_millis(5),
        requests: 20,
        patience: Duration::from_secs(2),
    };
    steady.run(&netns)
}

#[test]
fn steady_requests_are_all_counted_once() {
    let served = steady(Mode::Serve);
    assert_eq!((served.failed(), served.latencies.len()), (0, 20), "{:?}", served.first_failure);
    assert!(served.latencies.is_sorted());
    for (mode, failure) in [
        (Mode::Hold, Failure::NoAnswer),
        (Mode::Refuse, Failure::Connect),
        (Mode::Fixed(Answer::text(429, "an answer")), Failure::Status),
    ] {
        let tally = steady(mode.clone());
        assert_eq!((tally.latencies.len(), tally.failures), (0, [(failure, 20)].into()), "{mode:?}");
    }
}

#[test]
fn steady_latencies_include_the_wait_for_a_worker() {
    let each = Duration::from_millis(20);
    let tally = steady(Mode::Paced(Pace::new(1, each)));
    assert_eq!(tally.failed(), 0, "{:?}", tally.first_failure);
    // Requests come every 5 ms and leave every 20 ms.
    assert!(tally.quantile(1.0) + 19 * Duration::from_millis(5) >= 20 * each, "{:?}", tally.latencies);
}
