//! A Nova that vanishes without a word: no RST, no FIN, no ICMP.

use std::net::{Ipv4Addr, SocketAddr};

use metadata_tests::nova::SECRET;
use metadata_tests::two_tenants::{ADDRESS, HOSTNAME};
use metadata_tests::{Agent, AgentProcess, Answer, Guest, Host, Instance, Mode, Netns, Network, NovaStandIn};

const PORT: u16 = 8775;

/// A host of Nova's, one cable away. Fields are in drop order.
struct NovaHost {
    nova: NovaStandIn,
    netns: Netns,
    address: Ipv4Addr,
}

impl NovaHost {
    fn new(host: &Host, number: u8) -> Self {
        let netns = Netns::new("nova");
        host.netns().ip(&format!(
            "link add nova{number} type veth peer name eth0 netns {}\n\
             address add 192.0.{number}.1/24 dev nova{number}\n\
             link set nova{number} up",
            netns.name()
        ));
        let address = Ipv4Addr::new(192, 0, number, 2);
        netns.ip(&format!("address add {address}/24 dev eth0\nlink set eth0 up"));
        let listen = SocketAddr::from((address, PORT));
        Self { nova: NovaStandIn::start_with(&netns, listen, SECRET), netns, address }
    }

    /// Nothing that it sends arrives any more.
    fn silence(&self) {
        let [.., number, _] = self.address.octets();
        self.netns.ip(&format!("route add blackhole 192.0.{number}.1"));
    }

    /// Nothing that it sends on the connections of its requests arrives any more.
    fn silence_connections(&self) {
        let mut ports: Vec<_> = self.nova.requests().iter().map(|request| request.peer.port()).collect();
        ports.sort_unstable();
        ports.dedup();
        assert!(!ports.is_empty());
        for port in ports {
            self.netns.ip(&format!("rule add ipproto tcp dport {port} blackhole"));
        }
    }
}

/// Two guests with the same address on networks of their own. Fields are in drop order.
struct Served {
    process: AgentProcess,
    _agent: Agent,
    guests: [Guest; 2],
    _networks: [Network; 2],
}

impl Served {
    fn new(host: &Host, novas: &[&NovaHost]) -> Self {
        let networks = [host.network(), host.network()];
        let guests = networks.each_ref().map(|network| network.guest(ADDRESS));
        let addresses: Vec<_> = novas.iter().map(|nova| nova.address.to_string()).collect();
        let installer = Agent::forwarding_to(host, (novas[0].address, PORT).into(), SECRET)
            .set("DEFAULT", "nova_metadata_host", &addresses.join(","))
            .set("metadata_agent", "nova_connect_timeout", "1");
        let agent = guests.iter().fold(installer, |installer, guest| installer.port(&guest.port)).install();
        for nova in novas {
            for guest in &guests {
                nova.nova.add(Instance::from_port(&guest.port));
            }
        }
        Self { process: agent.start(), _agent: agent, guests, _networks: networks }
    }
}

#[test]
fn a_silent_connection_is_replaced_by_a_new_one() {
    let host = Host::new();
    let nova = NovaHost::new(&host, 2);
    let served = Served::new(&host, &[&nova]);
    let ask = || served.guests.each_ref().map(|guest| guest.get(HOSTNAME).status);
    assert_eq!(ask(), [200, 200]);
    nova.silence_connections();
    assert_eq!(ask(), [200, 200]);
    // The second guest's connection is as old as the first one's, and was not tried.
    assert_eq!(served.process.count("metadata_upstream_retries_total"), 1);
    assert_eq!(served.process.count("metadata_upstream_connections_total"), 4);
}

#[test]
fn a_silent_endpoint_is_asked_last() {
    let host = Host::new();
    let novas = [NovaHost::new(&host, 2), NovaHost::new(&host, 3)];
    let served = Served::new(&host, &[&novas[0], &novas[1]]);
    let [red, blue] = &served.guests;
    assert_eq!(red.get(HOSTNAME).status, 200);
    assert_eq!((novas[0].nova.requests().len(), novas[1].nova.requests().len()), (1, 0));
    novas[0].silence();
    // Red has a connection to the silent one, and blue has none.
    for _ in 0..5 {
        assert_eq!([blue.get(HOSTNAME).status, red.get(HOSTNAME).status], [200, 200]);
    }
    assert_eq!(novas[1].nova.requests().len(), 10);
}

#[test]
fn an_endpoint_with_errors_of_its_own_is_asked_last() {
    let host = Host::new();
    let novas = [NovaHost::new(&host, 2), NovaHost::new(&host, 3)];
    let served = Served::new(&host, &[&novas[0], &novas[1]]);
    let [red, _] = &served.guests;
    // As after the loss of its database.
    novas[0].nova.set_mode(Mode::Fixed(Answer::text(500, "")));
    assert_eq!(red.get(HOSTNAME).status, 500);
    for _ in 0..5 {
        assert_eq!(red.get(HOSTNAME).status, 200);
    }
    assert_eq!(novas[1].nova.requests().len(), 5);
}
