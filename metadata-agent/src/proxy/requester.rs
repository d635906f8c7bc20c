//! Whose request it is, as the metadata API is told: to Nova the instance, with a signature; to Neutron's metadata agent, which
//! finds the instance itself, the network. What is said in every request is computed once, here.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use arc_swap::ArcSwap;
use hyper::header::{HeaderName, HeaderValue};
use metadata_ebpf::identity::{ClientAddress, GuestAddress};

use super::sign::{Signatures, Signer};
use crate::ids::{InstanceId, NetworkId, ProjectId};

/// How the metadata API is told whose request it is.
#[derive(Clone, Debug)]
pub enum UpstreamAuth {
    /// By instance and project, signed: to Nova.
    Signed(Signer),
    /// By network and address: to Neutron's metadata agent.
    ByNetwork(NetworkHeader),
}

/// The header by which a metadata agent of Neutron's is told the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NetworkHeader {
    /// That of the metadata agent beside the L3 and DHCP agents (neutron/agent/metadata/driver.py).
    Neutron,
    /// That of OVN's metadata agent (neutron/agent/ovn/metadata/driver.py).
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

/// Whose request it is.
#[derive(Debug)]
pub struct ClientIdentity {
    credentials: Credentials,
    fixed_ips: Vec<IpAddr>,
    fixed_ip_values: Vec<HeaderValue>,
}

/// What proves or tells it.
#[derive(Debug)]
pub(super) enum Credentials {
    Signed(Signed),
    ByNetwork(Network),
}

/// An instance of Nova's.
#[derive(Debug)]
pub(super) struct Signed {
    instance: InstanceId,
    pub(super) instance_value: HeaderValue,
    pub(super) project_value: HeaderValue,
    signer: Signer,
    signatures: ArcSwap<Signatures>,
}

/// A network of Neutron's.
#[derive(Debug)]
pub(super) struct Network {
    pub(super) header: HeaderName,
    pub(super) value: HeaderValue,
}

impl ClientIdentity {
    /// An instance. Signs for it, once for as long as the signer's secrets stay the same.
    #[must_use]
    pub fn new(instance: InstanceId, project: &ProjectId, fixed_ips: Vec<IpAddr>, signer: &Signer) -> Self {
        let credentials = Credentials::Signed(Signed {
            instance_value: text_value(&instance.to_string()),
            project_value: text_value(project.as_str()),
            signatures: ArcSwap::from_pointee(signer.sign(&instance)),
            signer: signer.clone(),
            instance,
        });
        Self::with(credentials, fixed_ips)
    }

    /// Somebody on a network, by the address alone.
    #[must_use]
    pub fn on_network(network: NetworkId, fixed_ips: Vec<IpAddr>, header: NetworkHeader) -> Self {
        let network = Network { header: header.name(), value: text_value(&network.to_string()) };
        Self::with(Credentials::ByNetwork(network), fixed_ips)
    }

    fn with(credentials: Credentials, fixed_ips: Vec<IpAddr>) -> Self {
        let fixed_ip_values = fixed_ips.iter().map(|ip| text_value(&ip.to_string())).collect();
        Self { credentials, fixed_ips, fixed_ip_values }
    }

    /// The instance, where it is known.
    #[must_use]
    pub fn instance(&self) -> Option<InstanceId> {
        match &self.credentials {
            Credentials::Signed(signed) => Some(signed.instance),
            Credentials::ByNetwork(_) => None,
        }
    }

    pub(super) fn credentials(&self) -> &Credentials {
        &self.credentials
    }

    /// The one address of `X-Forwarded-For`: the guest's own if the port has it, else the port's first of the
    /// same family, else the guest's own.
    pub(super) fn forwarded_for(&self, guest: &GuestOrigin) -> HeaderValue {
        let own = self.fixed_ips.iter().position(|ip| *ip == guest.address);
        let family = || self.fixed_ips.iter().position(|ip| ip.is_ipv4() == guest.address.is_ipv4());
        match own.or_else(family) {
            Some(at) => self.fixed_ip_values[at].clone(),
            None => guest.value.clone(),
        }
    }
}

impl Signed {
    /// The signatures with the secrets in force. Signs only if they were replaced since.
    pub(super) fn signatures(&self) -> Arc<Signatures> {
        let made = self.signatures.load_full();
        if self.signer.made(&made) {
            return made;
        }
        let fresh = Arc::new(self.signer.sign(&self.instance));
        self.signatures.store(Arc::clone(&fresh));
        fresh
    }

    /// Tells whoever keeps the secrets that Nova took none of them.
    pub(super) fn all_refused(&self) {
        self.signer.all_refused();
    }
}

/// The address a guest asks from, also as a header's value.
#[derive(Clone, Debug)]
pub(super) struct GuestOrigin {
    address: IpAddr,
    value: HeaderValue,
}

impl GuestOrigin {
    pub(super) fn of(client: &ClientAddress) -> Self {
        Self::at(match client.guest {
            GuestAddress::Ipv4(octets) => IpAddr::V4(Ipv4Addr::from(octets)),
            GuestAddress::Ipv6LinkLocal(interface_id) => {
                let mut octets = [0; 16];
                octets[..2].copy_from_slice(&[0xfe, 0x80]);
                octets[8..].copy_from_slice(&interface_id);
                IpAddr::V6(Ipv6Addr::from(octets))
            }
        })
    }

    pub(super) fn at(address: IpAddr) -> Self {
        Self { address, value: text_value(&address.to_string()) }
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

    fn requester(fixed_ips: &[&str]) -> ClientIdentity {
        ClientIdentity::new(
            "3b0e5c6e-9a1f-4d0a-8f0b-1c2d3e4f5a6b".parse().unwrap(),
            &"acme".parse().unwrap(),
            fixed_ips.iter().map(|ip| ip.parse().unwrap()).collect(),
            &Signer::new("secret".into()),
        )
    }

    #[test]
    fn forwarded_for_is_one_address_of_the_guests_family() {
        let v6 = ClientAddress {
            attachment: AttachmentId::new(7).unwrap(),
            guest: GuestAddress::Ipv6LinkLocal([0xf8, 0x16, 0x3e, 0xff, 0xfe, 0, 0, 1]),
        };
        let v4 = ClientAddress::ipv4(AttachmentId::new(7).unwrap(), [10, 0, 0, 5]);
        for (client, fixed_ips, want) in [
            (v4, &["10.0.0.9", "10.0.0.5"][..], "10.0.0.5"),
            (v4, &["2001:db8::1", "10.0.0.9"], "10.0.0.9"),
            (v4, &["2001:db8::1"], "10.0.0.5"),
            (v4, &[], "10.0.0.5"),
            (v6, &["10.0.0.9", "2001:db8::1"], "2001:db8::1"),
            (v6, &["10.0.0.9"], "fe80::f816:3eff:fe00:1"),
        ] {
            let value = requester(fixed_ips).forwarded_for(&GuestOrigin::of(&client));
            assert_eq!(value, want, "{client:?} {fixed_ips:?}");
        }
    }
}
