//! The agent in front of Neutron's metadata agent, which then receives the same requests as from
//! its haproxies.

use std::io::{self, ErrorKind};
use std::net::{SocketAddr, SocketAddrV6, TcpStream};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use metadata_ebpf::reason::Reason;
use metadata_tests::agent::Installer;
use metadata_tests::neutron_agent::{OriginalAgent, ReadRequest};
use metadata_tests::two_tenants::HOSTNAME;
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{
    Agent, Answer, Connection, Guest, Host, Instance, NeutronAgent, NovaStandIn, Ovsdb, Plug, Port,
    ServedTenants, Tenant, TwoTenants, domain,
};

const PASSWORD: &str = "/openstack/2013-10-17/password";
/// Time to wait for a response that must not come.
const UNANSWERED: Duration = Duration::from_millis(400);
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
    // The OVS agent's database provides the network and the MAC address, but no source provides the
    // project or the fixed addresses.
    let ovsdb = Ovsdb::start();
    let site = Site::new(|installer, red, blue| {
        for tenant in [red, blue] {
            ovsdb.plug(&tenant.port, Plug::Direct);
        }
        installer.set("ovs", "ovsdb_connection", &ovsdb.remote())
    });
    let _neutron = NeutronAgent::start(&site.socket, lookup_headers);
    for tenant in [&site.tenants.red, &site.tenants.blue] {
        let derived = format!("{} {}", tenant.network.id, tenant.port.mac.link_local());
        for answer in [tenant.get("/"), tenant.get_v6("/")] {
            assert_eq!((answer.status, answer.text()), (200, derived.as_str()));
        }
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
        assert_eq!(tenant.get_v6(HOSTNAME).text(), tenant.hostname());
        let asked = nova.requests().pop().expect("a request");
        assert_eq!(asked.header("x-forwarded-for"), Some(tenant.port.mac.link_local().to_string()));
    }
    assert_eq!(red.post(PASSWORD, b"hunter2").status, 200);
    assert_eq!(nova.password(red.port.instance).as_deref(), Some(&b"hunter2"[..]));
    assert_eq!(nova.password(blue.port.instance), None);
    assert_eq!(red.get("/openstack/no-such-thing").status, 404);
}

/// Knowledge of the sources about the ports of [`Neighbours`].
#[derive(Clone, Copy, Debug)]
enum Knowledge {
    Complete,
    /// Network and MAC address, from Open vSwitch's database.
    NoAddresses,
    /// Libvirt knows addresses too, but those that the ports had when they were plugged.
    OldAddresses,
}

/// Two guests on one network, and Neutron's own agent. Fields are in drop order.
struct Neighbours {
    thief: Guest,
    victim: Guest,
    _neutron: OriginalAgent,
    socket: PathBuf,
    ovsdb: Ovsdb,
    nova: NovaStandIn,
    host: Host,
}

impl Neighbours {
    fn new() -> Self {
        let (host, ovsdb) = (Host::new(), Ovsdb::start());
        let nova = NovaStandIn::start(host.netns());
        let network = host.network();
        let [thief, victim] = [[10, 0, 0, 5], [10, 0, 0, 6]].map(|address| network.guest(address));
        let ports = [&thief.port, &victim.port];
        for port in ports {
            ovsdb.plug(port, Plug::Direct);
            nova.add(Instance::from_port(port));
        }
        let socket = host.folder().join("metadata_proxy");
        let neutron = OriginalAgent::start(host.netns(), &socket, ports, &nova);
        Self { thief, victim, _neutron: neutron, socket, ovsdb, nova, host }
    }

    fn agent(&self, knowledge: Knowledge, source_check: &str) -> Agent {
        let agent = Agent::on(&self.host, &self.nova)
            .set("metadata_agent", "upstream", "neutron-agent")
            .set("metadata_agent", "source_check", source_check)
            .set("ovs", "ovsdb_connection", &self.ovsdb.remote())
            .set("DEFAULT", "metadata_proxy_socket", &self.socket.display().to_string())
            .install();
        let ports = [&self.thief.port, &self.victim.port];
        match knowledge {
            Knowledge::Complete => agent.set_ports(ports),
            Knowledge::NoAddresses => {}
            Knowledge::OldAddresses => {
                // Each port had the address that the other has now.
                for (port, other) in [(ports[0], ports[1]), (ports[1], ports[0])] {
                    let old = Port { fixed_ips: other.fixed_ips.clone(), ..port.clone() };
                    domain::write(&agent.libvirt_dir(), &old);
                }
            }
        }
        agent
    }

    /// Connects as the thief from an address of the victim.
    fn dial(&self, stolen: SocketAddr, patience: Duration) -> io::Result<Connection<TcpStream>> {
        let to = if stolen.is_ipv4() { self.thief.metadata_ipv4() } else { self.thief.metadata_ipv6() };
        self.thief.dial(to, Some(stolen), patience)
    }

    /// Adds the victim's addresses to the thief's interface, and returns them.
    fn steal_addresses(&self) -> [SocketAddr; 2] {
        let link_local = self.victim.port.mac.link_local();
        let ipv4 = self.victim.port.ipv4().expect("an IPv4 address");
        let SocketAddr::V6(metadata) = self.thief.metadata_ipv6() else { unreachable!("it is IPv6") };
        self.thief
            .netns()
            .ip(&format!("address add {ipv4}/24 dev eth0\naddress add {link_local}/64 dev eth0 nodad"));
        [(ipv4, 0).into(), SocketAddrV6::new(link_local, 0, 0, metadata.scope_id()).into()]
    }
}

fn hostname_of(guest: &Guest) -> String {
    Instance::from_port(&guest.port).hostname()
}

/// Neutron's agent identifies a guest by the address that we forward, so that must never be an
/// address that the guest chose.
#[test]
fn a_guest_with_its_neighbours_addresses_is_itself() {
    let site = Neighbours::new();
    let (thief, victim) = (&site.thief, &site.victim);
    let stolen_addresses = site.steal_addresses();
    for (knowledge, source_check) in [
        (Knowledge::Complete, "strict"),
        (Knowledge::Complete, "mac"),
        (Knowledge::Complete, "off"),
        (Knowledge::NoAddresses, "strict"),
        (Knowledge::NoAddresses, "mac"),
        (Knowledge::NoAddresses, "off"),
        (Knowledge::OldAddresses, "off"),
    ] {
        let case = format!("{knowledge:?} {source_check}");
        let agent = site.agent(knowledge, source_check);
        let process = agent.start();
        for guest in [victim, thief] {
            for answer in [guest.get(HOSTNAME), guest.get_v6(HOSTNAME)] {
                assert_eq!((answer.status, answer.text()), (200, hostname_of(guest).as_str()), "{case}");
            }
        }
        for stolen in stolen_addresses {
            if stolen.is_ipv4() && matches!((knowledge, source_check), (Knowledge::Complete, "strict")) {
                let refused = site.dial(stolen, UNANSWERED).map(drop).map_err(|e| e.kind());
                assert_eq!(refused, Err(ErrorKind::TimedOut), "{case}: {stolen}");
                assert!(process.packets(Reason::ForgedAddress) > 0);
                continue;
            }
            let mut connection = site.dial(stolen, PATIENCE).expect("a connection");
            let answer = connection.request("GET", HOSTNAME, &[], b"").expect("an answer");
            assert_eq!(answer.text(), hostname_of(thief), "{case}: {stolen}");
            let body = format!("{case} {stolen}");
            // A password can be set only once.
            site.nova.add(Instance::from_port(&thief.port));
            let mut connection = site.dial(stolen, PATIENCE).expect("a connection");
            let posted = connection.request("POST", PASSWORD, &[], body.as_bytes()).expect("an answer");
            assert_eq!(posted.status, 200, "{body}");
            assert_eq!(site.nova.password(thief.port.instance), Some(body.clone().into_bytes()), "{body}");
        }
        assert_eq!(site.nova.password(victim.port.instance), None, "{case}");
        assert!(process.stop().success());
    }
}
