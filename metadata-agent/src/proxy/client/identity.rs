//! The identity in each request to the metadata API: the instance, with a signature, or the
//! network. Neutron's metadata agent finds the instance by the network.
//!
//! The header values are the same in each request of a client, so they are built once.

use std::net::IpAddr;

use hyper::header::{HeaderName, HeaderValue};
use metadata_ebpf::identity::ClientAddress;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use uuid::Uuid;

use super::forwarded::ForwardedAddresses;
use super::lookup::guest_ip;
use super::signatures::{SecretStatus, Signatures, SignaturesRecord};
use crate::ids::{InstanceId, NetworkId, ProjectId};

/// The header by which a Neutron metadata agent learns the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
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
    fixed_ips: Vec<AddressValue>,
    signatures: Signatures,
}

#[derive(Debug)]
pub(crate) struct NetworkIdentity {
    network: NetworkId,
    kind: NetworkHeader,
    addresses: ForwardedAddresses,
    pub(crate) header: HeaderName,
    pub(crate) value: HeaderValue,
    for_ipv4: HeaderValue,
    for_ipv6: HeaderValue,
    /// Used for limits only: the agent finds the instance itself.
    instance: Option<InstanceId>,
}

impl ClientIdentity {
    /// Creates the identity of an instance, with signatures of its id.
    #[must_use]
    pub fn new(
        instance: InstanceId,
        project: &ProjectId,
        fixed_ips: Vec<IpAddr>,
        signatures: Signatures,
    ) -> Self {
        let kind = IdentityKind::Signed(SignedIdentity {
            instance_value: text_value(&instance.to_string()),
            project_value: text_value(project.as_str()),
            fixed_ips: fixed_ips.into_iter().map(AddressValue::new).collect(),
            signatures,
            instance,
        });
        Self { kind }
    }

    /// Creates the identity of a port of which the network and an address are known, and perhaps
    /// the instance.
    #[must_use]
    pub fn on_network(
        network: NetworkId,
        header: NetworkHeader,
        addresses: ForwardedAddresses,
        instance: Option<InstanceId>,
    ) -> Self {
        let network = NetworkIdentity {
            network,
            kind: header,
            addresses,
            header: header.name(),
            value: text_value(&network.to_string()),
            for_ipv4: text_value(&addresses.ipv4.to_string()),
            for_ipv6: text_value(&addresses.ipv6.to_string()),
            instance,
        };
        Self { kind: IdentityKind::ByNetwork(network) }
    }

    /// Returns the instance, if it is known.
    #[must_use]
    pub(crate) fn instance(&self) -> Option<InstanceId> {
        match &self.kind {
            IdentityKind::Signed(signed) => Some(signed.instance),
            IdentityKind::ByNetwork(network) => network.instance,
        }
    }

    pub(crate) fn kind(&self) -> &IdentityKind {
        &self.kind
    }

    /// Returns whether the identity was signed with secrets that are not in force any more. One
    /// without signatures never was.
    pub(crate) fn is_outdated(&self, secrets: &SecretStatus) -> bool {
        match &self.kind {
            IdentityKind::Signed(signed) => !secrets.is_in_force(signed.signatures.generation()),
            IdentityKind::ByNetwork(_) => false,
        }
    }

    /// Returns the one address of `X-Forwarded-For`.
    pub(super) fn forwarded_for<'a>(&'a self, client: &'a AddressValue) -> &'a HeaderValue {
        match &self.kind {
            IdentityKind::Signed(signed) => signed.forwarded_for(client),
            IdentityKind::ByNetwork(network) if client.address.is_ipv4() => &network.for_ipv4,
            IdentityKind::ByNetwork(network) => &network.for_ipv6,
        }
    }
}

/// A [`ClientIdentity`] in a message.
#[derive(Deserialize, Serialize)]
enum IdentityRecord {
    Signed {
        instance: InstanceId,
        project: String,
        fixed_ips: Vec<IpAddr>,
        signatures: SignaturesRecord,
    },
    ByNetwork {
        network: NetworkId,
        header: NetworkHeader,
        addresses: ForwardedAddresses,
        instance: Option<InstanceId>,
    },
}

impl Serialize for ClientIdentity {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let record = match &self.kind {
            IdentityKind::Signed(signed) => IdentityRecord::Signed {
                instance: signed.instance,
                project: String::from_utf8_lossy(signed.project_value.as_bytes()).into_owned(),
                fixed_ips: signed.fixed_ips.iter().map(|fixed| fixed.address).collect(),
                signatures: SignaturesRecord::from(&signed.signatures),
            },
            IdentityKind::ByNetwork(network) => IdentityRecord::ByNetwork {
                network: network.network,
                header: network.kind,
                addresses: network.addresses,
                instance: network.instance,
            },
        };
        record.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for ClientIdentity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(match IdentityRecord::deserialize(deserializer)? {
            IdentityRecord::Signed { instance, project, fixed_ips, signatures } => {
                let signatures = Signatures::try_from(signatures).map_err(de::Error::custom)?;
                let project = project.parse().map_err(de::Error::custom)?;
                Self::new(instance, &project, fixed_ips, signatures)
            }
            IdentityRecord::ByNetwork { network, header, addresses, instance } => {
                Self::on_network(network, header, addresses, instance)
            }
        })
    }
}

impl SignedIdentity {
    /// Creates the identity of an instance that does not exist, with the nil UUID.
    pub(crate) fn of_no_instance(sign: impl FnOnce(&InstanceId) -> Signatures) -> Self {
        let instance = InstanceId::new(Uuid::nil());
        Self {
            instance_value: text_value(&instance.to_string()),
            project_value: text_value("none"),
            fixed_ips: Vec::new(),
            signatures: sign(&instance),
            instance,
        }
    }

    pub(crate) fn instance(&self) -> InstanceId {
        self.instance
    }

    /// Returns the client's own address if the port has it, else the port's first address of the
    /// same family, else the client's own. Nova finds the instance by its signed id, and this
    /// address appears only in the instance's own metadata.
    fn forwarded_for<'a>(&'a self, client: &'a AddressValue) -> &'a HeaderValue {
        let own = || self.fixed_ips.iter().find(|fixed| fixed.address == client.address);
        let family = || self.fixed_ips.iter().find(|fixed| fixed.has_family_of(client));
        &own().or_else(family).unwrap_or(client).value
    }

    pub(crate) fn signatures(&self) -> &Signatures {
        &self.signatures
    }
}

/// An address, also as a header value.
#[derive(Clone, Debug)]
pub(super) struct AddressValue {
    address: IpAddr,
    value: HeaderValue,
}

impl AddressValue {
    pub(super) fn new(address: IpAddr) -> Self {
        Self { address, value: text_value(&address.to_string()) }
    }

    pub(super) fn from_guest(client: &ClientAddress) -> Self {
        Self::new(guest_ip(client))
    }

    fn has_family_of(&self, other: &Self) -> bool {
        self.address.is_ipv4() == other.address.is_ipv4()
    }
}

fn text_value(text: &str) -> HeaderValue {
    let Ok(value) = HeaderValue::from_str(text) else { unreachable!("addresses and ids are visible ASCII") };
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::client::signatures::samples::signatures;
    use metadata_ebpf::identity::AttachmentId;

    fn clients() -> (AddressValue, AddressValue) {
        let attachment = AttachmentId::new(7).unwrap();
        let ipv4 = ClientAddress::ipv4(attachment, [10, 0, 0, 5]);
        let (interface_id, mac) = ([0xf8, 0x16, 0x3e, 0xff, 0xfe, 0, 0, 1], [0xfa, 0x16, 0x3e, 0, 0, 1]);
        let ipv6 = ClientAddress::from_link_local(attachment, interface_id, mac);
        (AddressValue::from_guest(&ipv4), AddressValue::from_guest(&ipv6))
    }

    #[test]
    fn nova_gets_one_address_of_the_guests_family() {
        let (v4, v6) = clients();
        for (client, fixed_ips, want) in [
            (&v4, &["10.0.0.9", "10.0.0.5"][..], "10.0.0.5"),
            (&v4, &["2001:db8::1", "10.0.0.9"], "10.0.0.9"),
            (&v4, &["2001:db8::1"], "10.0.0.5"),
            (&v4, &[], "10.0.0.5"),
            (&v6, &["10.0.0.9", "2001:db8::1"], "2001:db8::1"),
            (&v6, &["10.0.0.9"], "fe80::f816:3eff:fe00:1"),
        ] {
            let identity = ClientIdentity::new(
                "3b0e5c6e-9a1f-4d0a-8f0b-1c2d3e4f5a6b".parse().unwrap(),
                &"acme".parse().unwrap(),
                fixed_ips.iter().map(|ip| ip.parse().unwrap()).collect(),
                signatures(1),
            );
            assert_eq!(identity.forwarded_for(client), want, "{client:?} {fixed_ips:?}");
        }
    }

    /// Both clients send from addresses that the port does not have.
    #[test]
    fn a_neutron_agent_gets_an_address_of_the_port() {
        let (v4, v6) = clients();
        let mac = "fa:16:3e:00:00:77".parse().unwrap();
        for (confirmed, of_ipv4) in [(&["10.0.0.9"][..], "10.0.0.9"), (&[], "fe80::f816:3eff:fe00:77")] {
            let confirmed: Vec<IpAddr> = confirmed.iter().map(|ip| ip.parse().unwrap()).collect();
            let header = NetworkHeader::Neutron;
            let addresses = ForwardedAddresses::new(header, &confirmed, Some(mac)).unwrap();
            let network = "11111111-1111-4111-8111-111111111111".parse().unwrap();
            let identity = ClientIdentity::on_network(network, header, addresses, None);
            assert_eq!(identity.forwarded_for(&v4), of_ipv4);
            assert_eq!(identity.forwarded_for(&v6), "fe80::f816:3eff:fe00:77");
        }
    }
}
