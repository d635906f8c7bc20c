//! Guests in every relation to two thieves, and the service behind the agent.
//!
//! | network | guests |
//! |---|---|
//! | red, 10.0.0.0/24 | a thief and its neighbour |
//! | blue, with the same CIDR | a stranger with the thief's address |
//! | green, 10.1.0.0/24 | a thief and its neighbour, behind a router |
//! | gold, 10.2.0.0/24 | a guest behind the same router |
//!
//! Every guest is of its own project. Guests of haproxies have no router.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use metadata_agent::ids::MacAddress;
use metadata_tests::agent::Installer;
use metadata_tests::haproxy::{self, Driver, Haproxy};
use metadata_tests::neutron_agent::{OriginalAgent, OvnAgent, OvnRelease};
use metadata_tests::{
    Agent, Binding, ControlPlane, Guest, Host, Instance, Network, NovaStandIn, Port, Router, Southbound,
};
use tempfile::TempDir;

const CHASSIS: &str = "chassis-1";

/// The neighbours of the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Nova,
    NeutronAgent,
    OvnAgent,
    /// Requests come from Neutron's haproxies, and go to Nova.
    Haproxies,
}

/// A guest that uses any address. Its kernel has none, so that it does not interfere.
pub(super) struct Thief {
    pub(super) guest: Guest,
    pub(super) gateway: MacAddress,
    /// The interface that serves it serves others too.
    pub(super) is_shared: bool,
}

/// All but the agent. Fields are in drop order.
pub(super) struct Cloud {
    pub(super) mode: Mode,
    pub(super) thieves: Vec<Thief>,
    pub(super) victims: Vec<Guest>,
    _haproxies: Vec<Haproxy>,
    _neutron: Option<OriginalAgent>,
    _ovn: Option<(OvnAgent, Southbound)>,
    plane: Option<ControlPlane>,
    interfaces: Vec<Port>,
    router: Router,
    folder: TempDir,
    pub(super) nova: NovaStandIn,
    host: Host,
}

impl Cloud {
    pub(super) fn new(mode: Mode) -> Self {
        let host = Host::new();
        let nova = NovaStandIn::start(host.netns());
        let (gateways, cidrs) = (["10.0.0.1", "10.0.0.1", "10.1.0.1", "10.2.0.1"], ["0", "0", "1", "2"]);
        let mut networks = gateways.map(|gateway| host.network_at(gateway.parse().expect("an address"), 24));

        // Neutron assigns the ids of networks and ports.
        let plane = (mode == Mode::Haproxies).then(|| ControlPlane::start(&host));
        if let Some(plane) = &plane {
            for (network, second) in networks.iter_mut().zip(cidrs) {
                network.id = plane.create_network(&format!("10.{second}.0.0/24"));
            }
        }
        let [red, blue, green, gold] = &networks;
        let mut router = Router::new(&host);
        let interfaces = match mode {
            Mode::Nova | Mode::NeutronAgent | Mode::OvnAgent => vec![router.add(green), router.add(gold)],
            Mode::Haproxies => Vec::new(),
        };

        // The guests.
        let guest = |network: &Network, address: [u8; 4]| {
            let mut spec = network.spec(address);
            if let Some(plane) = &plane {
                let device = spec.port.instance.to_string();
                let binding = Binding { owner: "compute:nova", device: &device, host: "another-host" };
                spec.port = plane.create_port(network.id, &spec.port, &binding);
            }
            nova.add(Instance::from_port(&spec.port));
            network.plug(spec)
        };
        let thief = |network: &Network, address, is_shared| {
            let guest = guest(network, address);
            guest.netns().ip("address flush dev eth0");
            guest.netns().sysctl("ipv6/conf/eth0/disable_ipv6", "1");
            Thief { guest, gateway: network.gateway_mac, is_shared }
        };
        let is_haproxy = mode == Mode::Haproxies;
        let thieves = vec![thief(red, [10, 0, 0, 5], is_haproxy), thief(green, [10, 1, 0, 5], true)];
        let victims = vec![
            guest(red, [10, 0, 0, 6]),
            guest(blue, [10, 0, 0, 5]),
            guest(green, [10, 1, 0, 6]),
            guest(gold, [10, 2, 0, 5]),
        ];

        // The service behind the agent, or before it.
        let folder = tempfile::Builder::new().prefix("matrix-").tempdir().expect("a folder");
        fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).expect("an open folder");
        let socket = folder.path().join("metadata_proxy");
        let ports: Vec<&Port> =
            thieves.iter().map(|thief| &thief.guest).chain(&victims).map(|guest| &guest.port).collect();
        let neutron = (mode == Mode::NeutronAgent)
            .then(|| OriginalAgent::start(host.netns(), &socket, ports.iter().copied(), &nova));
        let ovn = (mode == Mode::OvnAgent).then(|| {
            let southbound = Southbound::start();
            let chassis = southbound.add_chassis(CHASSIS);
            for network in &networks {
                let ports: Vec<_> = ports.iter().copied().filter(|port| port.network == network.id).collect();
                southbound.bind_at(&chassis, network.id, &ports);
            }
            let (netns, database) = (host.netns(), (&southbound, CHASSIS));
            let (address, secret) = (nova.address(), nova.secret());
            let agent = OvnAgent::start(&OvnRelease::Debian, netns, &socket, database, address, secret);
            (agent, southbound)
        });
        let haproxies = match mode {
            Mode::Haproxies => {
                [(red, Driver::Dhcp), (blue, Driver::Ovn), (green, Driver::Dhcp), (gold, Driver::Ovn)]
                    .map(|(network, driver)| Haproxy::start(network, driver, &socket))
                    .into()
            }
            Mode::Nova | Mode::NeutronAgent | Mode::OvnAgent => Vec::new(),
        };
        Self {
            mode,
            thieves,
            victims,
            _haproxies: haproxies,
            _neutron: neutron,
            _ovn: ovn,
            plane,
            interfaces,
            router,
            folder,
            nova,
            host,
        }
    }

    /// Installs an agent for this mode.
    pub(super) fn agent(&self, source_check: &str) -> Agent {
        let own = |agent: Installer, options: &[(&str, &str)]| {
            options.iter().fold(agent, |agent, (name, value)| agent.set("metadata_agent", name, value))
        };
        let socket = self.socket().display().to_string();
        let agent = Agent::on(&self.host, &self.nova).set("DEFAULT", "metadata_proxy_socket", &socket).set(
            "DEFAULT",
            "metadata_proxy_user",
            haproxy::USER,
        );
        let agent = own(agent, &[("source_check", source_check)]);
        let on_taps = [&self.thieves[0].guest, &self.victims[0], &self.victims[1]];
        let on_taps = on_taps.map(|guest| guest.tap.as_str()).join(",");
        let agent = match self.mode {
            Mode::Haproxies => {
                own(agent, &[("guest_interfaces", "none*"), ("serve_metadata_proxy_socket", "true")])
            }
            Mode::Nova | Mode::NeutronAgent | Mode::OvnAgent => own(
                agent,
                &[
                    ("guest_interfaces", on_taps.as_str()),
                    ("namespaces", self.router.netns().name()),
                    ("upstream", self.upstream()),
                ],
            ),
        };
        let options = self.plane.iter().flat_map(ControlPlane::password_options);
        let agent = options.fold(agent, |agent, (name, value)| agent.set("metadata_agent", name, &value));
        self.ports().iter().chain(&self.interfaces).fold(agent, Installer::port).install()
    }

    fn upstream(&self) -> &'static str {
        match self.mode {
            Mode::Nova | Mode::Haproxies => "nova",
            Mode::NeutronAgent => "neutron-agent",
            Mode::OvnAgent => "ovn-agent",
        }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("metadata_proxy")
    }

    /// Returns the ports as the static file has them. Neutron knows the guests of haproxies, so
    /// there the file has the addresses of an earlier time: those of the neighbours.
    fn ports(&self) -> Vec<Port> {
        let guests = self.thieves.iter().map(|thief| &thief.guest).chain(&self.victims);
        let mut ports: Vec<Port> = guests.map(|guest| guest.port.clone()).collect();
        if self.mode == Mode::Haproxies {
            for (one, other) in [(0, 2), (1, 4)] {
                let addresses = std::mem::take(&mut ports[one].fixed_ips);
                ports[one].fixed_ips = std::mem::replace(&mut ports[other].fixed_ips, addresses);
            }
        }
        ports
    }

    /// Returns texts that only other guests' metadata contains. No request contains them, so a
    /// thief cannot read them in a password that it has set.
    pub(super) fn secrets_of_others(&self, thief: usize) -> impl Iterator<Item = String> {
        let others = self.thieves.iter().enumerate().filter(move |(index, _)| *index != thief);
        let others = others.map(|(_, thief)| &thief.guest).chain(&self.victims);
        others.flat_map(|guest| {
            let instance = Instance::from_port(&guest.port);
            [instance.name, guest.port.id.device_suffix()]
        })
    }
}
