//! A namespace as an agent of Neutron creates it and with its names: a router with its networks on
//! `qr-*`, a network's DHCP server on `tap*` or `ns-*`, or the namespace of OVN's metadata agent.

use std::net::{Ipv6Addr, SocketAddr};

use uuid::Uuid;

use crate::http_server::{Answer, HttpServer};
use crate::netns::Netns;
use crate::port::Port;
use crate::topology::{Host, Network};

/// The port of haproxy in a router.
pub const HAPROXY_PORT: u16 = 9697;

/// The namespace. It exists as long as the value.
#[derive(Debug)]
pub struct Router {
    netns: Netns,
    host: Host,
    cables: Vec<String>,
}

impl Router {
    /// Creates a router without networks.
    #[must_use]
    pub fn new(host: &Host) -> Self {
        Self::named(host, &format!("qrouter-{}", Uuid::new_v4()))
    }

    /// Creates the DHCP server of a network, which also has the metadata address. Its interface is
    /// named as an internal port of Open vSwitch.
    #[must_use]
    pub fn dhcp(network: &Network) -> Self {
        Self::dhcp_on(network, "tap", "c").0
    }

    /// Creates the DHCP server of a network as with Linux bridge or `ovs_use_veth`: the host's end
    /// of its veth pair is named like a guest's tap. Also returns its port.
    #[must_use]
    pub fn dhcp_by_veth(network: &Network) -> (Self, Port) {
        Self::dhcp_on(network, "ns-", "tap")
    }

    fn dhcp_on(network: &Network, prefix: &str, cable: &str) -> (Self, Port) {
        let mut server = Self::named(network.host(), &format!("qdhcp-{}", network.id));
        let port = server.plug(network, prefix, cable);
        server.netns.ip(&format!("address add 169.254.169.254/32 dev {}", port.tap()));
        (server, port)
    }

    /// Creates the namespace of OVN's metadata agent for a network
    /// (neutron/agent/ovn/metadata/agent.py, `provision_datapath`). Also returns its port, with the
    /// host's end of its veth pair as the device.
    #[must_use]
    pub fn ovn_metadata(network: &Network) -> (Self, Port) {
        let mut this = Self::named(network.host(), &format!("ovnmeta-{}", network.id));
        let pair = format!("tap{:.10}", network.id.to_string());
        let (cable, device) = (format!("{pair}0"), format!("{pair}1"));
        let port = this.connect(network, Port::new(network.id, network.gateway), device, cable.clone());
        this.netns.ip(&format!("address add 169.254.169.254/32 dev {}", port.tap()));
        (this, Port { device: Some(cable), ..port })
    }

    /// Creates a namespace with this name.
    #[must_use]
    pub fn named(host: &Host, name: &str) -> Self {
        let netns = Netns::named(name);
        netns.ip("link set lo up");
        netns.sysctl("ipv4/ip_forward", "1");
        Self { netns, host: host.clone(), cables: Vec::new() }
    }

    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Returns the names of the host's ends of its veth pairs.
    #[must_use]
    pub fn cables(&self) -> &[String] {
        &self.cables
    }

    /// Adds an interface on a network with the gateway's address. Returns the interface's own port,
    /// for an inventory that needs its network.
    pub fn add(&mut self, network: &Network) -> Port {
        self.plug(network, "qr-", "c")
    }

    /// As [`Self::add`], with Linux bridge or `ovs_use_veth`: the host's end of the veth pair is
    /// named like a guest's tap.
    pub fn add_by_veth(&mut self, network: &Network) -> Port {
        self.plug(network, "qr-", "tap")
    }

    /// Removes all interfaces on networks, as `neutron-ovs-cleanup` does, and leaves the namespace.
    pub fn unplug(&mut self) {
        for cable in self.cables.drain(..) {
            self.host.netns().ip(&format!("link del {cable}"));
        }
    }

    fn plug(&mut self, network: &Network, prefix: &str, cable: &str) -> Port {
        let port = Port::new(network.id, network.gateway);
        let suffix = port.id.device_suffix();
        let (device, cable) = (format!("{prefix}{suffix}"), format!("{cable}{suffix}"));
        self.connect(network, port, device, cable)
    }

    /// Connects a device in the namespace by a veth pair to a network.
    fn connect(&mut self, network: &Network, mut port: Port, device: String, cable: String) -> Port {
        let Network { bridge, gateway, gateway_mac, prefix: len, .. } = network;
        self.host.netns().ip(&format!(
            "link add {cable} type veth peer name {device} address {gateway_mac} netns {}\n\
             link set {cable} master {bridge}\n\
             link set {cable} up",
            self.netns.name()
        ));
        self.netns.ip(&format!("link set {device} up\naddress add {gateway}/{len} dev {device}"));
        self.cables.push(cable);
        port.device = Some(device);
        port
    }

    /// Sets the default route to an external host that responds to all requests at the metadata
    /// address, so that a packet that leaves the router is noticed.
    #[must_use]
    pub fn outside(&self, says: &'static str) -> Outside {
        let netns = Netns::new("outside");
        self.netns.ip(&format!("link add qg-0 type veth peer name eth0 netns {}", netns.name()));
        self.netns.ip("link set qg-0 up\naddress add 192.0.2.1/24 dev qg-0\nroute add default via 192.0.2.2");
        netns.ip(
            "link set eth0 up\naddress add 192.0.2.2/24 dev eth0\naddress add 169.254.169.254/32 dev eth0\n\
             route add default via 192.0.2.1",
        );
        let server = HttpServer::start(&netns, any(80), move |_| Answer::text(200, says));
        Outside { _server: server, _netns: netns }
    }

    /// Starts the legacy path of a router: a server on haproxy's port and the rule that redirects
    /// to it.
    #[must_use]
    pub fn legacy(&self, says: &'static str) -> HttpServer {
        self.netns.run(&[
            "iptables",
            "-t",
            "nat",
            "-A",
            "PREROUTING",
            "-i",
            "qr-+",
            "-d",
            "169.254.169.254/32",
            "-p",
            "tcp",
            "--dport",
            "80",
            "-j",
            "REDIRECT",
            "--to-ports",
            "9697",
        ]);
        HttpServer::start(&self.netns, any(HAPROXY_PORT), move |_| Answer::text(200, says))
    }
}

/// A host beyond the external gateway.
#[derive(Debug)]
pub struct Outside {
    _server: HttpServer,
    _netns: Netns,
}

fn any(port: u16) -> SocketAddr {
    (Ipv6Addr::UNSPECIFIED, port).into()
}

impl Drop for Router {
    fn drop(&mut self) {
        for cable in &self.cables {
            // As with a guest, the host's end must be gone at once.
            if let Err(e) = self.host.netns().command("ip").args(["link", "del", cable]).output() {
                eprintln!("unplug {cable}: {e}");
            }
        }
    }
}
