//! A guest's share of Nova, or of Neutron's metadata agent: its requests in flight.

use std::thread;
use std::time::Duration;

use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{Answer, Mode, NeutronAgent, ServedTenants};

const HELD: &str = "/latest/user-data";
/// The default of `requests_per_guest`.
const SHARE: usize = 16;
/// The part of it that a guest has while other guests are served.
const SHARE_IN_COMPANY: usize = 5;

#[test]
fn one_guest_has_a_bounded_number_of_requests_at_nova() {
    let tenants = ServedTenants::with(|installer, red, blue| {
        // A slow machine must not end the wait of red's requests.
        installer.port(&red.port).port(&blue.port).set("metadata_agent", "nova_connect_timeout", "60")
    });
    let ServedTenants { process, nova, red, blue, .. } = &tenants;
    nova.set_mode(Mode::HoldPath(HELD));
    thread::scope(|scope| {
        let asking: Vec<_> = (0..40).map(|_| scope.spawn(|| red.get(HELD).status)).collect();
        wait::until("the others wait", PATIENCE, || {
            (process.count("metadata_connections_total") == 40).then_some(())
        });
        nova.wait_for(SHARE, PATIENCE);
        for _ in 0..20 {
            blue.assert_hostname_served();
        }
        let held = nova.requests().iter().filter(|request| request.path == HELD).count();
        assert_eq!(held, SHARE, "requests of one guest at Nova");
        nova.set_mode(Mode::Serve);
        for answer in asking {
            assert_eq!(answer.join().expect("an answer"), 200);
        }
    });
    assert!(process.count("metadata_upstream_waits_total{bound=\"guest\"}") > 0);
    assert_eq!(process.count("metadata_upstream_waits_total{bound=\"all\"}"), 0);
    assert_eq!(process.count("metadata_upstream_errors_total{error=\"busy\"}"), 0);
}

#[test]
fn a_guest_in_company_has_a_third_of_its_share() {
    let tenants = ServedTenants::with(|installer, red, blue| {
        installer.port(&red.port).port(&blue.port).set("metadata_agent", "nova_connect_timeout", "60")
    });
    let ServedTenants { process, nova, red, blue, .. } = &tenants;
    let mut company = blue.connect();
    let mut ask_as_blue = || company.request("GET", "/latest/meta-data/hostname", &[], b"");
    assert_eq!(ask_as_blue().expect("an answer").status, 200);
    nova.set_mode(Mode::HoldPath(HELD));
    thread::scope(|scope| {
        let asking: Vec<_> = (0..40).map(|_| scope.spawn(|| red.get(HELD).status)).collect();
        nova.wait_for(1 + SHARE_IN_COMPANY, PATIENCE);
        wait::until("the others wait", PATIENCE, || {
            (process.count("metadata_connections_total") == 41).then_some(())
        });
        for _ in 0..20 {
            assert_eq!(ask_as_blue().expect("an answer").status, 200);
        }
        let held = nova.requests().iter().filter(|request| request.path == HELD).count();
        assert_eq!(held, SHARE_IN_COMPANY, "requests of one guest at Nova");
        nova.set_mode(Mode::Serve);
        for answer in asking {
            assert_eq!(answer.join().expect("an answer"), 200);
        }
    });
}

/// Neutron's agent answers one request after the other, so that 40 of one guest take longer than
/// another may wait.
#[test]
fn guests_take_turns_at_neutrons_agent() {
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("metadata_proxy");
    let tenants = ServedTenants::with(|installer, red, blue| {
        installer
            .port(&red.port)
            .port(&blue.port)
            .set("metadata_agent", "upstream", "neutron-agent")
            .set("metadata_agent", "neutron_agent_requests", "1")
            .set("metadata_agent", "nova_connect_timeout", "1")
            .set("DEFAULT", "metadata_proxy_socket", &socket.display().to_string())
    });
    let ServedTenants { process, red, blue, .. } = &tenants;
    let busy = "metadata_upstream_errors_total{error=\"busy\"}";
    let _neutron = NeutronAgent::start(&socket, |_| {
        // A slow server: 50 ms for each request.
        let never = wait::poll(Duration::from_millis(50), || None::<()>);
        assert!(never.is_none());
        Answer::text(200, "served")
    });
    thread::scope(|scope| {
        for _ in 0..60 {
            // Some of these wait too long. That is the guest's own doing.
            scope.spawn(|| red.try_get("/").map(|answer| answer.status).ok());
        }
        wait::until("red's requests wait", PATIENCE, || {
            (process.count("metadata_upstream_waits_total{bound=\"all\"}") > 0
                || process.count("metadata_connections_open") >= 40)
                .then_some(())
        });
        for _ in 0..10 {
            assert_eq!(blue.get("/").status, 200);
        }
    });
    assert!(process.count(busy) > 0, "red's line is too short to prove anything");
}
