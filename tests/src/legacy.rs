//! The path that Neutron itself would have set up, reduced to what a test can observe. It is a
//! namespace behind the network's bridge with the addresses of the gateway and of the metadata
//! service, and it responds there.
//!
//! Packets that our programs pass on arrive here, and only here.

use std::net::{Ipv6Addr, SocketAddr};

use metadata_ebpf::identity::METADATA_PORT;

use crate::gateway::Gateway;
use crate::http_server::{Answer, HttpServer, Mode, Recorded};
use crate::netns::Netns;
use crate::topology::Network;

/// The response of a legacy path to every request, followed by the network's id.
pub const GREETING: &str = "legacy path of network ";

/// A legacy path. It exists as long as the value.
#[derive(Debug)]
pub struct Legacy {
    server: HttpServer,
    gateway: Gateway,
}

impl Legacy {
    pub(crate) fn start(network: &Network) -> Self {
        let gateway = Gateway::plug(network);
        let greeting = format!("{GREETING}{}", network.id);
        let listen = SocketAddr::from((Ipv6Addr::UNSPECIFIED, METADATA_PORT));
        let server = HttpServer::start(gateway.netns(), listen, move |_| Answer::text(200, &greeting));
        Self { server, gateway }
    }

    #[must_use]
    pub fn netns(&self) -> &Netns {
        self.gateway.netns()
    }

    /// Returns the requests up to now.
    #[must_use]
    pub fn requests(&self) -> Vec<Recorded> {
        self.server.requests()
    }

    pub fn set_mode(&self, mode: Mode) {
        self.server.set_mode(mode);
    }
}
