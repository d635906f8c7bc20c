//! The identity in each request to the metadata API: the instance, with a signature, or the
//! network. Neutron's metadata agent finds the instance by the network.
//!
//! The header values are the same in each request of a client, so they are built once.

use std::net::IpAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use hyper::header::{HeaderName, HeaderValue};
use metadata_ebpf::identity::ClientAddress;

use super::lookup::guest_ip;
use super::sign::{Signatures, Signer};
use crate::ids::{InstanceId, NetworkId, ProjectId};

/// The kind of credentials that identify a client to the metadata API.
#[derive(Clone, Debug)]
pub(crate) enum UpstreamAuth {
    /// Nova: instance and project, signed.
    Signed(Signer),
    /// Neutron's metadata agent: network and address.
    ByNetwork(NetworkHeader),
}

/// The header by which a Neutron metadata agent learns the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NetworkHeader {
    /// For the metadata agent beside the L3 and DHCP agents (neutron/agent/metadata/driver.py).
    Neutron,
    /// For OVN's metadata agent (neutron/agent/ovn/metadata/driver.py).
    Ovn,
}

impl NetworkHeader {
    pub(super) const fn name(self) -> HeaderName {
        match self {
            Self::Neutron => HeaderName::from_static("x-neutron-network-id"),
            Self::Ovn => HeaderName::from_static("x-ovn-network-id"),
        }
    }
}

/// Identity of a client in requests to the metadata API.
#[derive(Debug)]
pub struct ClientIdentity {
    kind: IdentityKind,
    fixed_ips: Vec<IpAddr>,
    fixed_ip_values: Vec<HeaderValue>,
}

#[derive(Debug)]
pub(crate) enum IdentityKind {
    Signed(SignedIdentity),
    ByNetwork(NetworkIdentity),
}

/// A Nova instance, its project, and the signatures that prove it.
#[derive(Debug)]
pub(crate) struct SignedIdentity {
    instance: InstanceId,
    pub(crate) instance_value: HeaderValue,
    pub(crate) project_value: HeaderValue,
    signer: Signer,
    signatures: ArcSwap<Signatures>,
}

#[derive(Debug)]
pub(crate) struct NetworkIdentity {
    pub(crate) header: HeaderName,
    pub(crate) value: HeaderValue,
}

impl ClientIdentity {
    /// Creates and signs the identity of an instance.
    #[must_use]
    pub fn new(instance: InstanceId, project: &ProjectId, fixed_ips: Vec<IpAddr>, signer: &Signer) -> Self {
        let kind = IdentityKind::Signed(SignedIdentity {
            instance_value: text_value(&instance.to_string()),
            project_value: text_value(project.as_str()),
            signatures: ArcSwap::from_pointee(signer.sign(&instance)),
            signer: signer.clone(),
            instance,
        });
        Self::from_kind(kind, fixed_ips)
    }

    /// Creates the identity of a port of which the network is known.
    #[must_use]
    pub fn on_network(network: NetworkId, fixed_ips: Vec<IpAddr>, header: NetworkHeader) -> Self {
        let network = NetworkIdentity { header: header.name(), value: text_value(&network.to_string()) };
        Self::from_kind(IdentityKind::ByNetwork(network), fixed_ips)
    }

    fn from_kind(kind: IdentityKind, fixed_ips: Vec<IpAddr>) -> Self {
        let fixed_ip_values = fixed_ips.iter().map(|ip| text_value(&ip.to_string())).collect();
        Self { kind, fixed_ips, fixed_ip_values }
    }

    /// Returns the instance, if it is known.
    #[must_use]
    pub(crate) fn instance(&self) -> Option<InstanceId> {
        match &self.kind {
            IdentityKind::Signed(signed) => Some(signed.instance),
            IdentityKind::ByNetwork(_) => None,
        }
    }

    pub(crate) fn kind(&self) -> &IdentityKind {
        &self.kind
    }

    /// Returns the one address of `X-Forwarded-For`: the guest's own if the port has it, else the
    /// port's first address of the same family, else the guest's own.
    pub(super) fn forwarded_for<'a>(&'a self, origin: &'a ClientOrigin) -> &'a HeaderValue {
        let own = self.fixed_ips.iter().position(|ip| *ip == origin.address);
        let family = || self.fixed_ips.iter().position(|ip| ip.is_ipv4() == origin.address.is_ipv4());
        match own.or_else(family) {
            Some(at) => &self.fixed_ip_values[at],
            None => &origin.value,
        }
    }
}

impl SignedIdentity {
    /// Returns signatures with the secrets in force. Signs only if the secrets were replaced.
    pub(crate) fn signatures(&self) -> Arc<Signatures> {
        let current = self.signatures.load_full();
        if self.signer.made(&current) {
            return current;
        }
        let fresh = Arc::new(self.signer.sign(&self.instance));
        self.signatures.store(Arc::clone(&fresh));
        fresh
    }

    /// Reports that Nova accepted none of the secrets.
    pub(crate) fn all_refused(&self) {
        self.signer.all_refused();
    }
}

/// The source address of a client, also as a header value.
#[derive(Clone, Debug)]
pub(super) struct ClientOrigin {
    address: IpAddr,
    value: HeaderValue,
}

impl ClientOrigin {
    pub(super) fn new(address: IpAddr) -> Self {
        Self { address, value: text_value(&address.to_string()) }
    }

    pub(super) fn from_guest(client: &ClientAddress) -> Self {
        Self::new(guest_ip(client))
    }
}

fn text_value(text: &str) -> HeaderValue {
    let Ok(value) = HeaderValue::from_str(text) else { unreachable!("addresses and ids are visible ASCII") };
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use metadata_ebpf::identity::AttachmentId;

    fn identity(fixed_ips: &[&str]) -> ClientIdentity {
        ClientIdentity::new(
            "3b0e5c6e-9a1f-4d0a-8f0b-1c2d3e4f5a6b".parse().unwrap(),
            &"acme".parse().unwrap(),
            fixed_ips.iter().map(|ip| ip.parse().unwrap()).collect(),
            &Signer::new("secret".into()),
        )
    }

    #[test]
    fn forwarded_for_is_one_address_of_the_guests_family() {
        let interface_id = [0xf8, 0x16, 0x3e, 0xff, 0xfe, 0, 0, 1];
        let mac = [0xfa, 0x16, 0x3e, 0, 0, 1];
        let v6 = ClientAddress::from_link_local(AttachmentId::new(7).unwrap(), interface_id, mac);
        let v4 = ClientAddress::ipv4(AttachmentId::new(7).unwrap(), [10, 0, 0, 5]);
        for (client, fixed_ips, want) in [
            (v4, &["10.0.0.9", "10.0.0.5"][..], "10.0.0.5"),
            (v4, &["2001:db8::1", "10.0.0.9"], "10.0.0.9"),
            (v4, &["2001:db8::1"], "10.0.0.5"),
            (v4, &[], "10.0.0.5"),
            (v6, &["10.0.0.9", "2001:db8::1"], "2001:db8::1"),
            (v6, &["10.0.0.9"], "fe80::f816:3eff:fe00:1"),
        ] {
            let (identity, origin) = (identity(fixed_ips), ClientOrigin::from_guest(&client));
            assert_eq!(identity.forwarded_for(&origin), want, "{client:?} {fixed_ips:?}");
        }
    }
}
