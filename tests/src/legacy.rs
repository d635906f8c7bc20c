//! The path that Neutron itself would have set up, reduced to what a test can see: someone behind the network's
//! bridge who owns the gateway's and the metadata service's addresses and answers there.
//!
//! A packet that our programs leave alone arrives here, and only here.

use std::net::{Ipv6Addr, SocketAddr};

use metadata_ebpf::identity::METADATA_PORT;

use crate::http_server::{Answer, HttpServer, Mode, Recorded};
use crate::netns::Netns;
use crate::topology::{Host, Network};

/// What a legacy path answers to everything, before the network's id.
pub const GREETING: &str = "legacy path of network ";

/// A legacy path, alive as long as the value.
#[derive(Debug)]
pub struct Legacy {
    server: HttpServer,
    netns: Netns,
    host: Host,
    device: String,
}

impl Legacy {
    pub(crate) fn start(network: &Network) -> Self {
        let netns = Netns::new("legacy");
        let Network { gateway, prefix, gateway_mac, bridge, id, .. } = network;
        let device = format!("leg{}", &id.to_string()[..11]);
        network.host().netns().ip(&format!(
            "link add {device} type veth peer name eth0 address {gateway_mac} netns {}\n\
             link set {device} master {bridge}\n\
             link set {device} up",
            netns.name()
        ));
        netns.ip(&format!(
            "link set eth0 up\n\
             address add {gateway}/{prefix} dev eth0\n\
             address add 169.254.169.254/32 dev eth0\n\
             address add fe80::a9fe:a9fe/64 dev eth0 nodad"
        ));
        let greeting = format!("{GREETING}{id}");
        let listen = SocketAddr::from((Ipv6Addr::UNSPECIFIED, METADATA_PORT));
        let server = HttpServer::start(&netns, listen, move |_| Answer::text(200, &greeting));
        Self { server, netns, host: network.host().clone(), device }
    }

    /// Its namespace.
    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// What arrived so far.
    #[must_use]
    pub fn requests(&self) -> Vec<Recorded> {
        self.server.requests()
    }

    /// Changes how it behaves.
    pub fn set_mode(&self, mode: Mode) {
        self.server.set_mode(mode);
    }
}

impl Drop for Legacy {
    fn drop(&mut self) {
        // As with a guest: the host's end must be gone at once.
        let unplugged = self.host.netns().command("ip").args(["link", "del", &self.device]).output();
        if let Err(e) = unplugged {
            eprintln!("unplug {}: {e}", self.device);
        }
    }
}
