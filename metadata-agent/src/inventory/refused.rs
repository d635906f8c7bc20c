//! Sources that the kernel refused to guests. Input of the sources of ports, whose knowledge may be
//! out of date.

use std::net::IpAddr;

use tokio::sync::broadcast;

use super::DeviceName;
use crate::ids::{IfIndex, MacAddress, PortId, VlanId};

/// Reports that may wait for a slow reader. It misses older ones, but a guest that still has no
/// answer causes new ones.
const QUEUE: usize = 64;

/// A source that the kernel refused to a guest on this host. Each attachment reports one a second
/// at most.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RefusedSource {
    pub device: DeviceName,
    pub index: IfIndex,
    /// The VLAN id of a trunk's subport.
    pub vlan: Option<VlanId>,
    /// The port, or the subport, if a source reports its id.
    pub port: Option<PortId>,
    pub mac: MacAddress,
    pub address: IpAddr,
}

/// Creates the channel of reports.
#[must_use]
pub(crate) fn channel() -> broadcast::Sender<RefusedSource> {
    broadcast::Sender::new(QUEUE)
}
