//! A Neutron port as the agent's static inventory represents it.

use std::net::{IpAddr, Ipv4Addr};

use metadata_agent::ids::{InstanceId, MacAddress, NetworkId, PortId, ProjectId, VlanId};
use metadata_agent::inventory::AddressPrefix;
use serde::Serialize;
use uuid::Uuid;

#[derive(Clone, Debug, Serialize)]
pub struct Port {
    pub id: PortId,
    /// The interface, if it is not the tap named after the id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The instance that owns the port.
    pub instance: InstanceId,
    pub project: ProjectId,
    pub network: NetworkId,
    pub mac: MacAddress,
    pub fixed_ips: Vec<IpAddr>,
    /// The additional addresses that it may use with its MAC address.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub allowed_addresses: Vec<AddressPrefix>,
    /// The additional addresses that it may use with other MAC addresses.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub allowed_address_pairs: Vec<AddressPair>,
    /// False if it may use any address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port_security_enabled: Option<bool>,
    /// The subports, if it is the parent port of a trunk.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub subports: Vec<Subport>,
}

/// An allowed address pair, as Neutron writes it.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct AddressPair {
    pub ip_address: AddressPrefix,
    pub mac_address: MacAddress,
}

/// A port that is a VLAN on another port's interface.
#[derive(Clone, Debug, Serialize)]
pub struct Subport {
    pub id: PortId,
    pub vlan: VlanId,
    pub network: NetworkId,
    pub mac: MacAddress,
    pub fixed_ips: Vec<IpAddr>,
}

impl Subport {
    /// Creates a subport with one address.
    #[must_use]
    pub fn new(vlan: VlanId, network: NetworkId, address: Ipv4Addr) -> Self {
        let Port { id, mac, fixed_ips, .. } = Port::new(network, address);
        Self { id, vlan, network, mac, fixed_ips }
    }
}

impl Port {
    /// Creates a port with one address for a new instance in a new project.
    #[must_use]
    pub fn new(network: NetworkId, address: Ipv4Addr) -> Self {
        let id = Uuid::new_v4();
        let [a, b, c, ..] = *id.as_bytes();
        Self {
            id: PortId::new(id),
            device: None,
            instance: InstanceId::new(Uuid::new_v4()),
            project: Uuid::new_v4()
                .simple()
                .to_string()
                .parse()
                .unwrap_or_else(|e| panic!("a UUID as project id: {e}")),
            network,
            mac: MacAddress([0xfa, 0x16, 0x3e, a, b, c]),
            fixed_ips: vec![address.into()],
            allowed_addresses: Vec::new(),
            allowed_address_pairs: Vec::new(),
            port_security_enabled: None,
            subports: Vec::new(),
        }
    }

    /// Returns the name of the interface on the host.
    #[must_use]
    pub fn tap(&self) -> String {
        self.device.clone().unwrap_or_else(|| format!("tap{}", self.id.device_suffix()))
    }

    /// Returns the first IPv4 address.
    #[must_use]
    pub fn ipv4(&self) -> Option<Ipv4Addr> {
        self.fixed_ips.iter().find_map(|address| match address {
            IpAddr::V4(address) => Some(*address),
            IpAddr::V6(_) => None,
        })
    }
}
