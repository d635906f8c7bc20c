//! A namespace as Neutron's L3 and DHCP agents create it and with their names: a router with its
//! networks on `qr-*`, or a network's DHCP server on a tap.

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

    /// Creates the DHCP server of a network, which also has the metadata address.
    #[must_use]
    pub fn dhcp(network: &Network) -> Self {
        let mut server = Self::named(network.host(), &format!("qdhcp-{}", network.id));
        let port = server.plug(network, "tap");
        server.netns.ip(&format!("address add 169.254.169.254/32 dev {}", port.tap()));
        server
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

    /// Adds an interface on a network with the gateway's address. Returns the interface's own port,
    /// for an inventory that needs its network.
    pub fn add(&mut self, network: &Network) -> Port {
        self.plug(network, "qr-")
    }

    fn plug(&mut self, network: &Network, prefix: &str) -> Port {
        let Network { id, bridge, gateway, gateway_mac, prefix: len, .. } = network;
        let mut port = Port::new(*id, *gateway);
        let device = format!("{prefix}{}", port.id.device_suffix());
        let cable = format!("c{}", port.id.device_suffix());
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
