//! Connections to Nova never carry one guest's bytes to another, whatever Nova does on them, and
//! do not use up the host's ports.

use std::net::TcpStream;
use std::ops::AddAssign;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use metadata_tests::faulty_nova::ATTACK;
use metadata_tests::http_server::Mode;
use metadata_tests::load::{Load, Style};
use metadata_tests::nova::SECRET;
use metadata_tests::two_tenants::ADDRESS;
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{
    Agent, AgentProcess, Connection, Fault, FaultyNova, Guest, Host, Instance, Network, NovaStandIn,
};

/// Requests of both victims together.
const REQUESTS: usize = 30_000;
const CONNECTIONS_OF_A_VICTIM: usize = 3;
const CONNECTIONS_OF_THE_ATTACKER: usize = 4;

/// Three guests with the same address on networks of their own, and an agent. Fields are in drop
/// order.
struct ThreeTenants {
    process: AgentProcess,
    _agent: Agent,
    guests: [Guest; 3],
    _networks: [Network; 3],
    host: Host,
}

impl ThreeTenants {
    fn new(host: Host, nova: std::net::SocketAddr) -> Self {
        let networks = [host.network(), host.network(), host.network()];
        let guests = networks.each_ref().map(|network| network.guest(ADDRESS));
        let installer = Agent::forwarding_to(&host, nova, SECRET);
        let agent = guests.iter().fold(installer, |installer, guest| installer.port(&guest.port)).install();
        let process = agent.start();
        Self { process, _agent: agent, guests, _networks: networks, host }
    }
}

/// Answers that are not the right one.
#[derive(Debug, Default, PartialEq, Eq)]
struct Wrong {
    /// Answers with a byte of another guest's document.
    foreign: usize,
    /// Other answers, errors and closed connections.
    failed: usize,
}

impl AddAssign for Wrong {
    fn add_assign(&mut self, other: Self) {
        self.foreign += other.foreign;
        self.failed += other.failed;
    }
}

/// Sends requests on one connection. Each has a path of its own, so that an answer to another
/// request shows.
fn request_as_victim(guest: &Guest, lane: usize, count: usize) -> Wrong {
    let instance = guest.port.instance.to_string();
    let mut wrong = Wrong::default();
    let mut connection = guest.connect();
    for number in 0..count {
        let path = format!("/latest/{lane}/{number}");
        match connection.request("GET", &path, &[], b"") {
            Ok(answer)
                if answer.status == 200
                    && answer.body == FaultyNova::document(&instance, &path).as_bytes() => {}
            Ok(answer) => {
                let text = String::from_utf8_lossy(&answer.body).into_owned();
                let is_foreign = answer.status == 200 && !text.starts_with(&instance);
                wrong += Wrong { foreign: is_foreign.into(), failed: (!is_foreign).into() };
            }
            Err(_) => {
                wrong.failed += 1;
                connection = guest.connect();
            }
        }
    }
    wrong
}

/// Sends requests that a faulty server answers more than once, until told to stop. Returns the
/// number of those that were answered.
fn attack(guest: &Guest, is_over: &AtomicBool) -> u64 {
    let whole = format!("GET {ATTACK}/inner HTTP/1.1\r\nHost: x\r\nX-Instance-ID: attacker\r\n\r\n");
    let half = format!("GET {ATTACK}/half HTTP/1.1\r\nX-Instance-ID: attacker\r\nX-Rest: ");
    let requests: [(&str, &[u8]); 5] = [
        ("POST", whole.as_bytes()),
        ("GET", b""),
        ("POST", half.as_bytes()),
        ("GET", whole.as_bytes()),
        ("PUT", half.as_bytes()),
    ];
    let mut answered = 0;
    let mut connection: Option<Connection<TcpStream>> = None;
    for (method, body) in requests.iter().cycle() {
        if is_over.load(Ordering::Relaxed) {
            break;
        }
        let open = connection.get_or_insert_with(|| guest.connect());
        match open.request(method, &format!("{ATTACK}/outer"), &[], body) {
            Ok(_) => answered += 1,
            // The attacker's own failures are its own affair.
            Err(_) => connection = None,
        }
    }
    answered
}

/// A faulty server in Nova's place, and three tenants.
fn before_a_faulty_nova(fault: Fault) -> (FaultyNova, ThreeTenants) {
    let host = Host::new();
    let nova = FaultyNova::start(host.netns(), fault);
    let tenants = ThreeTenants::new(host, nova.address());
    (nova, tenants)
}

#[track_caller]
fn assert_victims_unharmed(tenants: &ThreeTenants) {
    let [first, second, attacker] = &tenants.guests;
    let (is_over, attacks) = (AtomicBool::new(false), AtomicU64::new(0));
    let lanes = 2 * CONNECTIONS_OF_A_VICTIM;
    let mut wrong = Wrong::default();
    thread::scope(|scope| {
        for _ in 0..CONNECTIONS_OF_THE_ATTACKER {
            scope.spawn(|| attacks.fetch_add(attack(attacker, &is_over), Ordering::Relaxed));
        }
        let victims: Vec<_> = (0..lanes)
            .map(|lane| {
                let guest = if lane % 2 == 0 { first } else { second };
                scope.spawn(move || request_as_victim(guest, lane, REQUESTS / lanes))
            })
            .collect();
        let results: Vec<_> = victims.into_iter().map(thread::ScopedJoinHandle::join).collect();
        is_over.store(true, Ordering::Relaxed);
        for result in results {
            wrong += result.expect("a victim's thread");
        }
    });
    let attacks = attacks.into_inner();
    assert!(attacks > 1000, "only {attacks} requests of the attacker were answered");
    assert_eq!(wrong, Wrong::default(), "of {REQUESTS} requests beside {attacks} of the attacker");
    assert_eq!(tenants.process.exited(), None);
}

#[test]
fn a_nova_that_leaves_bodies_unread_harms_no_other_guest() {
    let (_nova, tenants) = before_a_faulty_nova(Fault::LeavesBodiesUnread);
    assert_victims_unharmed(&tenants);
}

#[test]
fn a_nova_that_answers_late_harms_no_other_guest() {
    let (_nova, tenants) = before_a_faulty_nova(Fault::AnswersLate);
    assert_victims_unharmed(&tenants);
}

/// The second answer is noticed with the first, so it cannot do harm yet. The server may send the
/// next one later, so no connection of these guests carries a second request.
#[test]
fn a_nova_that_answers_twice_harms_no_other_guest() {
    let (nova, tenants) = before_a_faulty_nova(Fault::AnswersTwice);
    for guest in &tenants.guests {
        assert_eq!(request_as_victim(guest, 0, 1), Wrong::default());
    }
    wait::until("the agent has noticed the second answers", PATIENCE, || {
        (tenants.process.count("metadata_upstream_unsolicited_total") == 3).then_some(())
    });
    assert_victims_unharmed(&tenants);
    assert_eq!(nova.reuses(), 0);
}

/// A Nova that answers everything, and three guests.
fn before_a_fast_nova() -> (NovaStandIn, ThreeTenants) {
    let host = Host::new();
    let nova = NovaStandIn::start(host.netns());
    let tenants = ThreeTenants::new(host, nova.address());
    for guest in &tenants.guests {
        nova.add(Instance::from_port(&guest.port));
    }
    nova.set_mode(Mode::Static(BODY.into()));
    (nova, tenants)
}

const BODY: &[u8] = b"ok";

fn load(guest: &Guest, post: Option<Vec<u8>>, connections: usize) -> Load {
    Load {
        target: guest.metadata_ipv4(),
        path: "/openstack/2013-10-17/password".to_owned(),
        post,
        body: BODY.to_vec(),
        connections,
        style: Style::KeepAlive,
        duration: Duration::from_secs(3),
    }
}

/// Counts the ports towards Nova that cannot be used for a minute.
fn ports_in_time_wait(host: &Host, nova: &NovaStandIn) -> usize {
    let port = format!(":{}", nova.address().port());
    let sockets = host.netns().run(&["ss", "-Htn", "state", "time-wait", "dport", "=", &port]);
    sockets.lines().count()
}

/// Each of them has a connection of its own, or a guest's body could reach another guest.
#[test]
fn posts_leave_no_port_in_time_wait() {
    let (nova, tenants) = before_a_fast_nova();
    let guest = &tenants.guests[0];
    let tally = load(guest, Some(b"secret".to_vec()), 64).run(guest.netns());
    let (answered, opened) = (tally.latencies.len(), tenants.process.count(OPENED));
    assert!(tally.failures.is_empty(), "{:?} {:?}", tally.failures, tally.first_failure);
    assert!(answered > 64 && opened >= answered as u64, "{answered} answers over {opened} connections");
    assert_eq!(ports_in_time_wait(&tenants.host, &nova), 0, "after {opened} connections");
}

/// Connections to Nova that were opened.
const OPENED: &str = "metadata_upstream_connections_total";

/// More connections than the agent keeps idle.
#[test]
fn three_busy_guests_leave_no_port_in_time_wait() {
    let (nova, tenants) = before_a_fast_nova();
    thread::scope(|scope| {
        for guest in &tenants.guests {
            scope.spawn(move || {
                let tally = load(guest, None, 120).run(guest.netns());
                assert!(tally.failures.is_empty(), "{:?} {:?}", tally.failures, tally.first_failure);
            });
        }
    });
    let opened = tenants.process.count(OPENED);
    assert_eq!(ports_in_time_wait(&tenants.host, &nova), 0, "after {opened} connections");
}
