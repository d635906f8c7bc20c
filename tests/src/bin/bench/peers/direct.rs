//! `direct`: each guest has a veth pair to the upstream. If that is Nova, guests send their
//! identity headers themselves.

use std::net::{Ipv4Addr, SocketAddr};

use metadata_agent::ids::NetworkId;
use metadata_tests::nova::{SECRET, signature};
use metadata_tests::{Netns, Port};

use super::super::upstream::Upstream;
use super::{Caller, Crowd, Peer};

pub struct Direct {
    guests: Vec<Guest>,
}

struct Guest {
    netns: Netns,
    target: SocketAddr,
    port: Port,
    signed: String,
}

impl Direct {
    pub fn start(upstream: &Upstream, crowd: Crowd) -> Self {
        let network = NetworkId::new(uuid::Uuid::new_v4());
        let guest = |number| {
            let netns = Netns::new("direct");
            let target = upstream.cable(&netns);
            let last = u8::try_from(5 + number).unwrap_or(u8::MAX);
            let port = Port::new(network, Ipv4Addr::new(10, 0, 0, last));
            Guest {
                netns,
                target,
                signed: if upstream.wants_identity() { signed(&port) } else { String::new() },
                port,
            }
        };
        let guests: Vec<_> = (0..crowd.guests).map(guest).collect();
        upstream.introduce([network], guests.iter().map(|guest| &guest.port));
        Self { guests }
    }
}

impl Guest {
    fn caller(&self) -> Caller<'_> {
        let Self { netns, target, port, signed } = self;
        Caller { netns, target: *target, instance: Some(port.instance), signed }
    }
}

/// Returns the identity headers as Neutron's agents would write them.
fn signed(port: &Port) -> String {
    let instance = port.instance.to_string();
    let address = port.ipv4().unwrap_or(Ipv4Addr::UNSPECIFIED);
    format!(
        "X-Forwarded-For: {address}\r\nX-Instance-ID: {instance}\r\nX-Tenant-ID: {}\r\n\
         X-Instance-ID-Signature: {}\r\n",
        port.project,
        signature(SECRET, &instance)
    )
}

impl Peer for Direct {
    fn callers(&self) -> Vec<Caller<'_>> {
        self.guests.iter().map(Guest::caller).collect()
    }

    fn processes(&self) -> Vec<u32> {
        Vec::new()
    }
}
