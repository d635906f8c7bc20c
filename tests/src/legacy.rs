//! The path that Neutron itself would have set up, reduced to what a test can see: someone behind the network's
//! bridge who owns the gateway's and the metadata service's addresses and answers there.
//!
//! A packet that our programs leave alone arrives here, and only here.

use std::net::{Ipv6Addr, SocketAddr};

use metadata_ebpf::identity::METADATA_PORT;

use crate::gateway::Gateway;
use crate::http_server::{Answer, HttpServer, Mode, Recorded};
use crate::netns::Netns;
use crate::topology::Network;

/// What a legacy path answers to everything, before the network's id.
pub const GREETING: &str = "legacy path of network ";

/// A legacy path, alive as long as the value.
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

    /// Its namespace.
    #[must_use]
    pub fn netns(&self) -> &Netns {
        self.gateway.netns()
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
