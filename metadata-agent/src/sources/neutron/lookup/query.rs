//! Queries for remote ports and their results.

use std::mem::discriminant;
use std::net::IpAddr;
use std::sync::Arc;

use crate::ids::{InstanceId, MacAddress, NetworkId, NetworkOrRouter, PortId, ProjectId};

/// Query for the port of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct LookupQuery {
    pub scope: NetworkOrRouter,
    pub target: PortSelector,
}

/// Maximum number of look-ups that share a request. With the ids of 100 networks they must fit into
/// a URL of 8 KiB.
pub(super) const BATCH: usize = 32;

/// Look-ups in one scope and by the same attribute, which share a request.
#[derive(Clone, Debug)]
pub(super) struct LookupBatch {
    pub(super) scope: NetworkOrRouter,
    pub(super) targets: Vec<PortSelector>,
}

impl LookupBatch {
    pub(super) fn new(LookupQuery { scope, target }: LookupQuery) -> Self {
        Self { scope, targets: vec![target] }
    }

    /// Returns true if this look-up can join.
    pub(super) fn has_room_for(&self, LookupQuery { scope, target }: LookupQuery) -> bool {
        let is_alike = |other: &PortSelector| discriminant(other) == discriminant(&target);
        self.targets.len() < BATCH && self.scope == scope && self.targets.iter().all(is_alike)
    }
}

/// Address of a port on its network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum PortSelector {
    /// One of the port's own addresses, and the MAC address that the guest sends from, if it was
    /// seen.
    Ip(IpAddr, Option<MacAddress>),
    /// MAC address, derived from a link-local address.
    Mac(MacAddress),
}

impl PortSelector {
    pub(super) fn mac(self) -> Option<MacAddress> {
        match self {
            Self::Ip(_, mac) => mac,
            Self::Mac(mac) => Some(mac),
        }
    }
}

/// Result of a query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LookupResult {
    Instance(Arc<InstancePort>),
    /// The port belongs to something else, such as a load balancer.
    NotAnInstance,
    NotFound,
    /// Several ports match.
    Ambiguous,
}

/// Port of an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct InstancePort {
    pub instance: InstanceId,
    /// Project of the port. Like Neutron's agent, the agent uses it as the instance's.
    pub project: ProjectId,
    pub port: PortId,
    pub network: NetworkId,
    /// MAC address of the port, unique in its network.
    pub mac: Option<MacAddress>,
    pub fixed_ips: Vec<IpAddr>,
}

impl LookupResult {
    /// Returns true if the guest sends from the MAC address of the found port. An IP address alone
    /// may have moved to another port meanwhile.
    pub(super) fn is_confirmed_by(&self, target: PortSelector) -> bool {
        let Self::Instance(found) = self else { return false };
        found.mac.is_some() && found.mac == target.mac()
    }
}
