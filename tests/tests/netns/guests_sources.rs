//! A guest is identified before its request, while its request is held, or never.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use metadata_tests::two_tenants::HOSTNAME;
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{ServedTenants, Tenant, domain};

const OWN: &str = "metadata_agent";
/// The hold time of an unknown guest's request in tests that wait for its end.
const SHORT_HOLD: Duration = Duration::from_secs(2);

/// Starts two tenants of which the static inventory knows only blue.
fn red_is_unknown(hold: &str, grace: &str) -> ServedTenants {
    ServedTenants::with(|installer, _, blue| {
        installer.port(&blue.port).set(OWN, "identity_hold", hold).set(OWN, "identity_grace", grace)
    })
}

/// Other guests are served meanwhile.
#[test]
fn an_unknown_guest_is_held_then_deferred_then_refused() {
    let tenants = red_is_unknown("2", "8");
    let ServedTenants { process, nova, red, blue, .. } = &tenants;
    let asked_at = Instant::now();
    let mut connection = red.connect();
    connection.send(request()).expect("a request");
    blue.assert_hostname_served();
    connection.stream().set_nonblocking(true).expect("look without waiting");
    let looked = connection.stream().peek(&mut [0]).expect_err("no answer while blue was served");
    assert_eq!(looked.kind(), ErrorKind::WouldBlock);
    connection.stream().set_nonblocking(false).expect("wait again");

    let answer = connection.receive().expect("an answer");
    assert!(asked_at.elapsed() >= SHORT_HOLD, "held for only {:?}", asked_at.elapsed());
    assert_eq!((answer.status, answer.header("retry-after")), (503, Some("1")));
    let refused = wait::until("the grace is over", PATIENCE, || {
        let answer = red.get(HOSTNAME);
        match answer.status {
            503 => None,
            _ => Some(answer),
        }
    });
    assert_eq!((refused.status, refused.header("retry-after")), (404, None));
    assert!(process.count("metadata_identity_holds_total{outcome=\"retry_later\"}") >= 1);
    assert!(process.count("metadata_identity_holds_total{outcome=\"refused\"}") >= 1);
    blue.assert_hostname_served();
    let about_blue = |id: Option<String>| id == Some(blue.port.instance.to_string());
    assert!(nova.requests().iter().all(|request| about_blue(request.header("x-instance-id"))));
}

fn request() -> String {
    format!("GET {HOSTNAME} HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n")
}

/// Red's request is held for longer than red waits for a response. `identify` makes red known.
fn assert_answered_once_known(identify: impl FnOnce(&ServedTenants)) {
    let tenants = red_is_unknown("60", "120");
    let ServedTenants { process, red, blue, .. } = &tenants;
    let mut connection = red.connect();
    connection.send(request()).expect("a request");
    // A later request has been answered, so the agent has seen the earlier one as well.
    blue.assert_hostname_served();
    assert_eq!(tenants.attachment(red)["identity"], "unknown");
    identify(&tenants);
    let answer = connection.receive().expect("an answer before the hold ends");
    assert_eq!((answer.status, answer.text()), (200, red.hostname().as_str()));
    assert_eq!(process.count("metadata_identity_holds_total{outcome=\"resolved\"}"), 1);
    assert_eq!(tenants.attachment(red)["identity"], "known");
}

#[test]
fn a_held_request_is_answered_once_the_file_names_its_port() {
    assert_answered_once_known(|tenants| {
        tenants.agent.set_ports([&tenants.red.port, &tenants.blue.port]);
    });
}

#[test]
fn a_held_request_is_answered_once_libvirt_names_its_domain() {
    assert_answered_once_known(|tenants| domain::write(&tenants.agent.libvirt_dir(), &tenants.red.port));
}

#[test]
fn libvirt_alone_provides_all_that_nova_needs() {
    let tenants = ServedTenants::with(|installer, _, _| {
        installer.set(OWN, "static_inventory", "").set(OWN, "identity_hold", "60")
    });
    let ServedTenants { agent, nova, red, blue, .. } = &tenants;
    let guests: [&Tenant; 2] = [red, blue];
    for guest in guests {
        domain::write(&agent.libvirt_dir(), &guest.port);
        guest.assert_hostname_served();
    }
    for (request, guest) in nova.requests().iter().zip(guests) {
        let received = ["x-instance-id", "x-tenant-id", "x-forwarded-for"].map(|name| request.header(name));
        let port = &guest.port;
        let own = [port.instance.to_string(), port.project.to_string(), "10.0.0.5".to_owned()];
        assert_eq!(received, own.map(Some));
    }
}

/// The grace counts from the loss of the identity, however long the guest has been up.
#[test]
fn a_source_that_loses_a_port_for_a_moment_causes_no_404() {
    let grace = 4;
    let tenants = ServedTenants::with(|installer, red, blue| {
        let installer = installer.port(&red.port).port(&blue.port).set(OWN, "identity_hold", "0.2");
        installer.set(OWN, "identity_grace", &grace.to_string())
    });
    let ServedTenants { agent, red, blue, .. } = &tenants;
    let age = || tenants.attachment(red)["attached_seconds_ago"].as_u64().expect("its age");
    wait::until("the guest has been up for longer than the grace", PATIENCE, || {
        (age() > grace).then_some(())
    });
    let lose = || {
        agent.set_ports([&blue.port]);
        wait::until("it is not known", PATIENCE, || {
            (tenants.attachment(red)["identity"] == "unknown").then_some(())
        });
    };
    for _ in 0..2 {
        red.assert_hostname_served();
        lose();
        let deferred = red.get(HOSTNAME);
        assert_eq!((deferred.status, deferred.header("retry-after")), (503, Some("1")), "{deferred:?}");
        blue.assert_hostname_served();
        agent.set_ports([&red.port, &blue.port]);
        wait::until("it is served again", PATIENCE, || (red.get(HOSTNAME).status == 200).then_some(()));
    }
    lose();
    wait::until("the grace is over", PATIENCE, || (red.get(HOSTNAME).status == 404).then_some(()));
}

#[test]
fn a_guest_whose_domain_ended_is_no_longer_identified() {
    let tenants = ServedTenants::with(|installer, _, _| {
        let installer = installer.set(OWN, "static_inventory", "");
        installer.set(OWN, "identity_hold", "0.2").set(OWN, "identity_grace", "120")
    });
    let ServedTenants { agent, red, blue, .. } = &tenants;
    for guest in [red, blue] {
        domain::write(&agent.libvirt_dir(), &guest.port);
        wait::until("it is known", PATIENCE, || (guest.get(HOSTNAME).status == 200).then_some(()));
    }
    domain::remove(&agent.libvirt_dir(), &red.port);
    wait::until("it is not known", PATIENCE, || {
        (tenants.attachment(red)["identity"] == "unknown").then_some(())
    });
    assert_eq!(red.get(HOSTNAME).status, 503);
    blue.assert_hostname_served();
}
