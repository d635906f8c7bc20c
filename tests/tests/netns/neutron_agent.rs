//! The agent in front of Neutron's metadata agent, which then receives the same requests as from
//! its haproxies.

use std::path::PathBuf;
use std::thread;

use metadata_tests::agent::Installer;
use metadata_tests::neutron_agent::{OriginalAgent, ReadRequest};
use metadata_tests::two_tenants::HOSTNAME;
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{
    Answer, Host, NeutronAgent, NovaStandIn, Ovsdb, Plug, ServedTenants, Tenant, TwoTenants,
};

/// Many times the accept queue of Neutron's agent.
const BURST: usize = 40;

/// Responds with the headers by which it would look up the client.
fn lookup_headers(asked: &ReadRequest) -> Answer {
    let [network, address] = ["x-neutron-network-id", "x-forwarded-for"].map(|name| asked.header(name));
    Answer::text(200, &format!("{} {}", network.unwrap_or("-"), address.unwrap_or("-")))
}

fn self_of(tenant: &Tenant) -> String {
    format!("{} 10.0.0.5", tenant.network.id)
}

struct Site {
    tenants: ServedTenants,
    socket: PathBuf,
}

impl Site {
    fn new(configure: impl FnOnce(Installer, &Tenant, &Tenant) -> Installer) -> Self {
        let host = Host::new();
        let socket = host.folder().join("metadata_proxy");
        let nova = NovaStandIn::start(host.netns());
        let tenants = TwoTenants::on(host, nova, |spec| spec).serve(|installer, red, blue| {
            let installer = installer.set("metadata_agent", "upstream", "neutron-agent").set(
                "DEFAULT",
                "metadata_proxy_socket",
                &socket.display().to_string(),
            );
            configure(installer, red, blue)
        });
        Self { tenants, socket }
    }

    fn known() -> Self {
        Self::new(|installer, red, blue| installer.port(&red.port).port(&blue.port))
    }
}

#[test]
fn two_guests_with_one_address_are_distinguished_by_network() {
    let site = Site::known();
    let neutron = NeutronAgent::start(&site.socket, lookup_headers);
    let ServedTenants { nova, red, blue, .. } = &site.tenants;
    let claims = [("X-Forwarded-For", "10.0.0.66"), ("X-Neutron-Router-ID", "x"), ("X-Instance-ID", "y")];
    for tenant in [red, blue] {
        let answer = tenant.connect().request("GET", "/a?b", &claims, b"").expect("an answer");
        assert_eq!((answer.status, answer.text()), (200, self_of(tenant).as_str()));
        let asked = neutron.requests().pop().expect("a request");
        assert_eq!(asked.line, "GET /a?b");
        let network = tenant.network.id.to_string();
        let expected = [
            ("accept", "*/*"),
            ("connection", "close"),
            ("host", "169.254.169.254"),
            ("x-forwarded-for", "10.0.0.5"),
            ("x-neutron-network-id", &network),
        ];
        assert_eq!(asked.headers, expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
    }
    assert!(nova.requests().is_empty());
}

#[test]
fn a_guest_is_served_by_its_network_alone() {
    // The OVS agent's database provides the network, but no source provides the project.
    let ovsdb = Ovsdb::start();
    let site = Site::new(|installer, red, blue| {
        for tenant in [red, blue] {
            ovsdb.plug(&tenant.port, Plug::Direct);
        }
        installer.set("ovs", "ovsdb_connection", &ovsdb.remote())
    });
    let _neutron = NeutronAgent::start(&site.socket, lookup_headers);
    for tenant in [&site.tenants.red, &site.tenants.blue] {
        let answer = tenant.get("/");
        assert_eq!((answer.status, answer.text()), (200, self_of(tenant).as_str()));
        let attachment = site.tenants.attachment(tenant);
        assert_eq!(attachment["identity"], "on_network");
        assert_eq!(attachment["port"]["network"], tenant.network.id.to_string());
    }
}

#[test]
fn a_password_and_every_status_pass() {
    let site = Site::known();
    let neutron = NeutronAgent::start(&site.socket, |asked| match asked.line.split_once(" /") {
        Some((_, status)) => Answer::text(status.parse().expect("a status"), "a body"),
        None => Answer::text(400, "no path"),
    });
    let red = &site.tenants.red;
    for status in [200, 403, 404, 409, 429, 500, 503] {
        let answer = red.get(&format!("/{status}"));
        assert_eq!((answer.status, answer.text(), answer.header("retry-after")), (status, "a body", None));
    }
    assert_eq!(red.post("/200", b"hunter2").status, 200);
    // It reads once: a body that does not arrive together with the head is lost.
    assert_eq!(neutron.requests().pop().expect("a request").body, b"hunter2");
}

#[test]
fn guests_get_retry_later_until_neutrons_agent_is_up() {
    let site = Site::known();
    let red = &site.tenants.red;
    let answer = red.get(HOSTNAME);
    assert_eq!((answer.status, answer.header("retry-after")), (503, Some("1")));
    let neutron = NeutronAgent::start(&site.socket, lookup_headers);
    assert_eq!(red.get(HOSTNAME).status, 200);
    drop(neutron);
    assert_eq!(red.get(HOSTNAME).status, 503);
}

#[test]
fn a_burst_does_not_overrun_the_accept_queue() {
    let site = Site::known();
    let ServedTenants { process, red, blue, .. } = &site.tenants;
    let neutron = NeutronAgent::start(&site.socket, lookup_headers);
    thread::scope(|scope| {
        for number in 0..BURST {
            scope.spawn(move || {
                let tenant = if number % 2 == 0 { red } else { blue };
                assert_eq!(tenant.get("/").text(), self_of(tenant));
            });
        }
    });
    assert_eq!(neutron.requests().len(), BURST);
    for error in ["busy", "connect", "connect_timeout", "broken"] {
        assert_eq!(
            process.count(&format!("metadata_upstream_errors_total{{error=\"{error}\"}}")),
            0,
            "{error}"
        );
    }
    wait::until("all connections are closed", PATIENCE, || {
        (process.count("metadata_connections_open") == 0).then_some(())
    });
}

#[test]
fn neutrons_own_agent_finds_the_instance_we_name() {
    let site = Site::known();
    let ServedTenants { host, nova, red, blue, .. } = &site.tenants;
    let _neutrons = OriginalAgent::start(host.netns(), &site.socket, [&red.port, &blue.port], nova);
    for tenant in [red, blue] {
        tenant.assert_hostname_served();
        let asked = nova.requests().pop().expect("a request");
        assert_eq!(asked.header("x-instance-id"), Some(tenant.port.instance.to_string()));
        assert_eq!(asked.header("x-forwarded-for").as_deref(), Some("10.0.0.5"));
    }
    assert_eq!(red.post("/openstack/2013-10-17/password", b"hunter2").status, 200);
    assert_eq!(nova.password(red.port.instance).as_deref(), Some(&b"hunter2"[..]));
    assert_eq!(nova.password(blue.port.instance), None);
    assert_eq!(red.get("/openstack/no-such-thing").status, 404);
}
