//! The inventory's knowledge of the port behind an attachment.

use std::sync::Arc;

use super::credentials::{UpstreamAuth, forwarded};
use crate::ids::PortId;
use crate::inventory::{Entry, Port, PortAddressing, PortRecord};

/// The owner of an attachment, as far as it is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The instance is known.
    Known(Arc<Port>),
    /// The network and an address are known, but not the instance. This is enough for Neutron's
    /// metadata agent.
    OnNetwork(Arc<PortRecord>),
    /// No source knows the port.
    Unknown,
    /// Sources contradict each other.
    Disputed,
}

impl Owner {
    /// Derives the owner from an inventory entry, for this kind of upstream.
    #[must_use]
    pub(crate) fn from_entry(entry: &Entry, auth: UpstreamAuth) -> Self {
        match (entry, auth) {
            (Entry::Agreed(port), UpstreamAuth::Signed) => Self::Known(Arc::clone(port)),
            // Without an address to forward, the port is unknown, and its requests wait.
            (Entry::Agreed(port), UpstreamAuth::ByNetwork(header))
                if forwarded(&port.addressing, header).is_some() =>
            {
                Self::Known(Arc::clone(port))
            }
            (Entry::Incomplete(record), UpstreamAuth::ByNetwork(header))
                if forwarded(&record.addressing, header).is_some() =>
            {
                Self::OnNetwork(Arc::clone(record))
            }
            (Entry::Disputed(_), _) => Self::Disputed,
            (Entry::Agreed(_) | Entry::Incomplete(_) | Entry::NoInstance(_), _) => Self::Unknown,
        }
    }

    /// Returns Neutron's id of the port, if it is known.
    #[must_use]
    pub(crate) fn port_id(&self) -> Option<PortId> {
        match self {
            Self::Known(port) => port.id,
            Self::OnNetwork(record) => record.id,
            Self::Unknown | Self::Disputed => None,
        }
    }

    /// Returns the network and the addresses, if the port is known.
    pub(crate) fn addressing(&self) -> Option<&PortAddressing> {
        match self {
            Self::Known(port) => Some(&port.addressing),
            Self::OnNetwork(record) => Some(&record.addressing),
            Self::Unknown | Self::Disputed => None,
        }
    }

    /// Returns whether requests can be made for this owner.
    fn is_served(&self) -> bool {
        match self {
            Self::Known(_) | Self::OnNetwork(_) => true,
            Self::Unknown | Self::Disputed => false,
        }
    }

    /// Returns true if requests could be made for this owner and cannot for `next`.
    pub(crate) fn is_lost_in(&self, next: &Self) -> bool {
        self.is_served() && !next.is_served()
    }
}
