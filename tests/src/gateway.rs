//! A namespace behind a network's bridge with the addresses of the gateway and of the metadata
//! service, as Neutron's router and DHCP namespaces have them. Packets that our programs pass on
//! arrive here, and only here.

use crate::netns::Netns;
use crate::topology::{Host, Network};

/// The namespace and its veth pair to the bridge.
#[derive(Debug)]
pub struct Gateway {
    netns: Netns,
    host: Host,
    device: String,
}

impl Gateway {
    /// Plugs a gateway into a network that does not have one yet.
    #[must_use]
    pub fn plug(network: &Network) -> Self {
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
        Self { netns, host: network.host().clone(), device }
    }

    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.netns
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        // As with a guest, the host's end must be gone at once.
        let unplugged = self.host.netns().command("ip").args(["link", "del", &self.device]).output();
        if let Err(e) = unplugged {
            eprintln!("unplug {}: {e}", self.device);
        }
    }
}
