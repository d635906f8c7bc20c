//! The network namespace that a datapath works in.

use std::sync::Arc;

use metadata_ebpf::abi::PortKey;

use super::DatapathError;
use crate::ids::{IfIndex, VlanId};
use crate::net::netns::Netns;

/// The namespace that a datapath works in.
pub(super) enum Place {
    Host,
    Netns { netns: Arc<Netns>, inode: u32 },
}

impl Place {
    /// As the keys of the kernel have it.
    pub(super) fn number(&self) -> u32 {
        match self {
            Self::Host => 0,
            Self::Netns { inode, .. } => *inode,
        }
    }

    pub(super) fn is_host(&self) -> bool {
        matches!(self, Self::Host)
    }

    pub(super) fn key(&self, index: IfIndex, vlan: Option<VlanId>) -> PortKey {
        PortKey { netns: self.number(), ifindex: index.0, vlan: vlan.map_or(0, |vlan| vlan.get().into()) }
    }

    /// Interfaces are found by name, and so by a thread that is where they are.
    pub(super) fn run<T: Send>(
        &self,
        work: impl FnOnce() -> Result<T, DatapathError> + Send,
    ) -> Result<T, DatapathError> {
        match self {
            Self::Host => work(),
            Self::Netns { netns, .. } => netns.run(work)?,
        }
    }
}
