//! Turns owners into the identities under which the proxy sends requests.
//!
//! Only the directory does this. Attachments know ports without identities, and the proxy gets
//! identities without the means to make one.

use std::sync::Arc;

use super::Owner;
use crate::ids::{InstanceId, NetworkId};
use crate::inventory::PortAddressing;
use crate::proxy::{ClientIdentity, ForwardedAddresses, NetworkHeader, SecretStatus};
use crate::secrets::Signer;

/// The kind of identity that the upstream needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum UpstreamAuth {
    /// Nova: instance and project, signed.
    Signed,
    /// Neutron's metadata agent: network and address.
    ByNetwork(NetworkHeader),
}

/// The means to make identities of a kind.
#[derive(Clone, Debug)]
pub enum Credentials {
    Signed(Signer),
    ByNetwork(NetworkHeader),
}

impl Credentials {
    pub(crate) fn auth(&self) -> UpstreamAuth {
        match self {
            Self::Signed(_) => UpstreamAuth::Signed,
            Self::ByNetwork(header) => UpstreamAuth::ByNetwork(*header),
        }
    }

    /// Returns what signs identities, if they are signed.
    pub(crate) fn signer(&self) -> Option<&Signer> {
        match self {
            Self::Signed(signer) => Some(signer),
            Self::ByNetwork(_) => None,
        }
    }

    /// Returns what the proxy may know of the secrets.
    pub(super) fn secret_status(&self) -> Arc<SecretStatus> {
        match self {
            Self::Signed(signer) => signer.status(),
            Self::ByNetwork(_) => Arc::default(),
        }
    }

    /// Makes the identity of an owner; `None` if requests cannot be made for it.
    pub(super) fn identity(&self, owner: &Owner) -> Option<Arc<ClientIdentity>> {
        let identity = match (self, owner) {
            (Self::Signed(signer), Owner::Known(port)) => {
                let addresses = port.addressing.fixed_ips.clone();
                let signatures = signer.sign(&port.instance);
                ClientIdentity::new(port.instance, &port.project, addresses, signatures)
            }
            (Self::ByNetwork(header), Owner::Known(port)) => {
                on_network(&port.addressing, *header, Some(port.instance))?
            }
            (Self::ByNetwork(header), Owner::OnNetwork(record)) => {
                let instance = record.tenant.as_ref().map(|tenant| tenant.instance);
                on_network(&record.addressing, *header, instance)?
            }
            (Self::Signed(_), Owner::OnNetwork(_)) | (_, Owner::Unknown | Owner::Disputed) => return None,
        };
        Some(Arc::new(identity))
    }
}

/// Returns the network and the addresses by which Neutron's agent finds a port, if they are known.
pub(super) fn forwarded(
    addressing: &PortAddressing,
    header: NetworkHeader,
) -> Option<(NetworkId, ForwardedAddresses)> {
    let addresses = ForwardedAddresses::new(header, addressing.confirmed_ips(), addressing.mac)?;
    Some((addressing.network?, addresses))
}

fn on_network(
    addressing: &PortAddressing,
    header: NetworkHeader,
    instance: Option<InstanceId>,
) -> Option<ClientIdentity> {
    let (network, addresses) = forwarded(addressing, header)?;
    Some(ClientIdentity::on_network(network, header, addresses, instance))
}
