//! `haproxy`: one per network, in the namespace that has 169.254.169.254, with the configuration
//! that Neutron renders. It forwards straight to the upstream with the headers that Neutron's agent
//! would have computed. Nothing listens at /dev/log.

use metadata_tests::haproxy::rendered;
use metadata_tests::nova::{SECRET, signature};
use metadata_tests::{Gateway, Guest, Haproxy, Host, Netns, Network, Port};

use super::super::interrupt;
use super::super::upstream::{Upstream, open_ports};
use super::{Caller, Crowd, Peer};

/// Plugs guests into existing networks, in the order of [`Crowd`]: one after the other on each
/// network in turn.
pub fn plug(host: &Host, crowd: Crowd) -> (Vec<Network>, Vec<Guest>) {
    let networks: Vec<_> = (0..crowd.networks).map(|_| host.network()).collect();
    let mut guests = Vec::new();
    for number in 0..crowd.guests {
        let last = u8::try_from(5 + number / crowd.networks).unwrap_or(u8::MAX);
        let guest = networks[number % crowd.networks].guest([10, 0, 0, last]);
        open_ports(guest.netns());
        guests.push(guest);
    }
    (networks, guests)
}

/// Returns the configuration lines that add this port's identity headers.
pub fn identity(port: &Port) -> String {
    let instance = port.instance.to_string();
    format!(
        "http-request set-header X-Instance-ID {instance}\n    \
         http-request set-header X-Tenant-ID {}\n    \
         http-request set-header X-Instance-ID-Signature {}",
        port.project,
        signature(SECRET, &instance)
    )
}

/// Fields are in drop order.
pub struct PerNetwork {
    haproxies: Vec<(Haproxy, Gateway)>,
    guests: Vec<Guest>,
    _host: Host,
}

impl PerNetwork {
    pub fn start(upstream: &Upstream, crowd: Crowd) -> Self {
        let host = Host::new();
        let (networks, guests) = plug(&host, crowd);
        let haproxies = networks.iter().zip(&guests).map(|(network, first)| {
            let gateway = Gateway::plug(network);
            let server = upstream.cable(gateway.netns()).to_string();
            let config = rendered(&network.id.to_string(), &server, &identity(&first.port));
            (Haproxy::serve(gateway.netns(), &config), gateway)
        });
        Self { haproxies: haproxies.collect(), guests, _host: host }
    }
}

impl Peer for PerNetwork {
    fn callers(&self) -> Vec<Caller<'_>> {
        self.guests.iter().map(Caller::of).collect()
    }

    fn processes(&self) -> Vec<u32> {
        self.haproxies.iter().map(|(haproxy, _)| haproxy.pid()).collect()
    }
}

/// Idle haproxies of many networks, each in its own namespace.
pub struct Idle {
    haproxies: Vec<(Haproxy, Netns)>,
}

impl Idle {
    /// Starts them one after the other, each until it listens.
    pub fn start(networks: usize) -> anyhow::Result<Self> {
        let mut haproxies = Vec::new();
        for _ in 0..networks {
            interrupt::check()?;
            let netns = Netns::new("network");
            netns.ip("link add eth0 type veth peer name eth1\n\
                 link set eth1 up\n\
                 link set eth0 up\n\
                 address add 169.254.169.254/32 dev eth0\n\
                 address add fe80::a9fe:a9fe/64 dev eth0 nodad");
            let config = rendered(&uuid::Uuid::new_v4().to_string(), "198.18.0.1:80", "");
            haproxies.push((Haproxy::serve(&netns, &config), netns));
        }
        Ok(Self { haproxies })
    }

    pub fn processes(&self) -> Vec<u32> {
        self.haproxies.iter().map(|(haproxy, _)| haproxy.pid()).collect()
    }
}
