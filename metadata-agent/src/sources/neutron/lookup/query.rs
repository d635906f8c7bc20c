//! What is asked, what the answer can be, and what makes an answer one that may be kept.

use std::net::IpAddr;
use std::sync::Arc;

use crate::ids::{InstanceId, MacAddress, NetworkId, NetworkOrRouter, PortId, ProjectId};

/// Who a guest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Query {
    /// Where it was met.
    pub scope: NetworkOrRouter,
    /// What shows it there.
    pub whom: Whom,
}

/// By what a port is known on its network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Whom {
    /// An address of its own, and the MAC address that it sends from where that was seen.
    Address(IpAddr, Option<MacAddress>),
    /// Its MAC address: all that a link-local address tells.
    Mac(MacAddress),
}

impl Whom {
    /// Its MAC address, if that is known.
    pub(super) fn mac(self) -> Option<MacAddress> {
        match self {
            Self::Address(_, mac) => mac,
            Self::Mac(mac) => Some(mac),
        }
    }
}

/// Who has an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// An instance.
    Instance(Arc<Found>),
    /// Something that is no instance, such as a load balancer.
    NotAnInstance,
    /// Nobody.
    NotFound,
    /// More than one port has it.
    Ambiguous,
}

/// An instance that has an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The instance.
    pub instance: InstanceId,
    /// The project of the port, as Neutron's agent takes it for the instance's.
    pub project: ProjectId,
    /// The port.
    pub port: PortId,
    /// The port's network.
    pub network: NetworkId,
    /// The port's MAC address, which no other port of its network has.
    pub mac: Option<MacAddress>,
    /// The port's addresses.
    pub fixed_ips: Vec<IpAddr>,
}

impl Answer {
    /// Whether it is the port of whoever was asked for by more than an address, which may have passed to another port:
    /// the guest sends from the MAC address of the very port that was found.
    pub(super) fn is_proven_of(&self, whom: Whom) -> bool {
        let Self::Instance(found) = self else { return false };
        found.mac.is_some() && found.mac == whom.mac()
    }
}
