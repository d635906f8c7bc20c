//! Subports of trunks: ports that reach their guest as VLANs on another port's interface. Whose they are follows from
//! their parent, so a source that tells of a subport need not know the instance.

use std::net::IpAddr;

use serde::Serialize;

use super::prefix::AddressPrefix;
use crate::ids::{MacAddress, NetworkId, PortId, VlanId};

/// Where a subport is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct TrunkBinding {
    /// The trunk's parent port.
    pub parent: PortId,
    /// The tag under which it is there.
    pub vlan: VlanId,
}

/// A subport, as all sources together know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Subport {
    /// The tag.
    pub vlan: VlanId,
    /// Neutron's id, where a source knows it.
    pub id: Option<PortId>,
    /// Its network, where a source knows it.
    pub network: Option<NetworkId>,
    /// The guest's MAC address on it, where a source knows it.
    pub mac: Option<MacAddress>,
    /// Its addresses; empty where no source knows them.
    pub fixed_ips: Vec<IpAddr>,
    /// Further addresses that the guest may send from.
    pub allowed_addresses: Vec<AddressPrefix>,
}
