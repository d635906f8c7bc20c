//! What Neutron's API says of ports, and what of it are [`PortRecord`].
//!
//! Of the parent of a trunk, `trunk_details` names the subports: which port is under which tag. The rest of a subport is told
//! by its own row, which has to be asked for ([`Said::lacks`], [`Said::complete`]).

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::Deserialize;

use crate::ids::{IdError, NetworkId, PortId, ProjectId, VlanId};
use crate::inventory::{AddressPrefix, DeviceOwner, PortRecord, Tenant, TrunkBinding};

/// The attributes that are asked for, and no others: a port has three dozen.
pub(super) const FIELDS: [&str; 9] = [
    "id",
    "device_id",
    "device_owner",
    "project_id",
    "network_id",
    "mac_address",
    "fixed_ips",
    "allowed_address_pairs",
    "trunk_details",
];

/// One answer: as many ports as fit into it.
#[derive(Debug, Deserialize)]
pub(super) struct Page {
    ports: Vec<Row>,
    #[serde(default)]
    ports_links: Vec<Link>,
}

#[derive(Debug, Deserialize)]
struct Link {
    rel: String,
    href: String,
}

/// A port as it is written.
#[derive(Debug, Deserialize)]
struct Row {
    id: String,
    #[serde(default)]
    device_id: Option<String>,
    #[serde(default)]
    device_owner: Option<String>,
    #[serde(default)]
    project_id: Option<String>,
    #[serde(default)]
    network_id: Option<String>,
    #[serde(default)]
    mac_address: Option<String>,
    #[serde(default)]
    fixed_ips: Vec<Address>,
    #[serde(default)]
    allowed_address_pairs: Vec<Address>,
    #[serde(default)]
    trunk_details: Option<Trunk>,
}

/// What a trunk says of itself at its parent.
#[derive(Debug, Deserialize)]
struct Trunk {
    #[serde(default)]
    sub_ports: Vec<Subport>,
}

#[derive(Debug, Deserialize)]
struct Subport {
    port_id: String,
    segmentation_id: u64,
    segmentation_type: String,
    #[serde(default)]
    mac_address: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Address {
    #[serde(default)]
    ip_address: Option<String>,
}

/// A port's id, and what is said of it, or why that cannot be understood.
pub(super) type Told = (PortId, Result<Said, RowError>);

/// What is said of a port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Said {
    pub(super) facts: PortRecord,
    /// If it is a trunk's parent: the subports, which hold by their seats.
    pub(super) subports: Option<Result<Vec<PortRecord>, RowError>>,
}

impl Said {
    /// The subports of which nothing but the place is known.
    pub(super) fn lacks(&self) -> impl Iterator<Item = PortId> {
        let subports = self.subports.iter().flatten().flatten();
        subports.filter(|subport| subport.network.is_none()).filter_map(|subport| subport.id)
    }

    /// Takes over what rows of subports say. One that is not there any more is no subport.
    pub(super) fn complete(&mut self, rows: &BTreeMap<PortId, Result<PortRecord, RowError>>) {
        let Some(Ok(subports)) = &mut self.subports else { return };
        let known = subports.iter().filter_map(|subport| Some((subport.clone(), rows.get(&subport.id?)?)));
        let known = known.map(|(subport, row)| {
            let row = row.clone()?;
            let PortRecord { network, mac, fixed_ips, allowed_addresses, .. } = row;
            Ok(PortRecord { network, mac: mac.or(subport.mac), fixed_ips, allowed_addresses, ..subport })
        });
        self.subports = Some(known.collect());
    }

    /// All that there is to tell.
    pub(super) fn facts(&self) -> Vec<PortRecord> {
        let subports = self.subports.iter().flatten().flatten();
        std::iter::once(&self.facts).chain(subports).cloned().collect()
    }
}

/// Why a port cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RowError {
    /// One of its ids is none.
    #[error("{field}: {source}")]
    Id {
        /// The attribute.
        field: &'static str,
        /// What is wrong with it.
        source: IdError,
    },
    /// A fixed address is none.
    #[error("fixed_ips: {text:?} is no address")]
    Address {
        /// What stands there.
        text: String,
    },
}

impl Page {
    /// Where the next page begins. Only the marker is taken from what the server says, so that it cannot send us elsewhere.
    pub(super) fn next(&self) -> Option<PortId> {
        let next = self.ports_links.iter().find(|link| link.rel == "next")?;
        let (_, query) = next.href.split_once('?')?;
        query.split('&').find_map(|pair| pair.strip_prefix("marker="))?.parse().ok()
    }

    /// Whether there is said to be another page.
    pub(super) fn is_followed(&self) -> bool {
        self.ports_links.iter().any(|link| link.rel == "next")
    }

    /// What it says of each port. A port without a usable id is nobody's.
    pub(super) fn told(self) -> impl Iterator<Item = Told> {
        let said = |row: Row, id| Ok(Said { facts: row.facts()?, subports: row.subports(id) });
        self.ports.into_iter().filter_map(move |row| {
            let id = row.id.parse().ok()?;
            Some((id, said(row, id)))
        })
    }
}

impl Row {
    fn facts(&self) -> Result<PortRecord, RowError> {
        fn read<T: std::str::FromStr<Err = IdError>>(
            field: &'static str,
            text: Option<&String>,
        ) -> Result<Option<T>, RowError> {
            let text = text.filter(|text| !text.is_empty());
            text.map(|text| text.parse().map_err(|source| RowError::Id { field, source })).transpose()
        }
        let device_owner = self.device_owner.as_deref().and_then(DeviceOwner::new);
        let is_instance = device_owner.as_ref().is_some_and(DeviceOwner::is_instance);
        // What stands there of another owner's is a router, a network's DHCP server or anything at all.
        let device_id = self.device_id.as_ref().filter(|_| is_instance);
        let instance = read("device_id", device_id)?;
        Ok(PortRecord {
            id: read("id", Some(&self.id))?,
            tenant: instance.map(|instance| Tenant { instance, project: None }),
            device_owner,
            port_project: read::<ProjectId>("project_id", self.project_id.as_ref())?,
            network: read::<NetworkId>("network_id", self.network_id.as_ref())?,
            mac: read("mac_address", self.mac_address.as_ref())?,
            fixed_ips: self.fixed_ips()?,
            allowed_addresses: self.allowed_addresses(),
            ..PortRecord::default()
        })
    }

    /// Neutron knows no other kind of segmentation than VLANs, but may come to.
    fn subports(&self, parent: PortId) -> Option<Result<Vec<PortRecord>, RowError>> {
        let subports = self.trunk_details.as_ref()?.sub_ports.iter();
        let vlans = subports.filter(|subport| subport.segmentation_type == "vlan");
        Some(vlans.map(|subport| subport.facts(parent)).collect())
    }

    fn fixed_ips(&self) -> Result<Vec<IpAddr>, RowError> {
        let texts = self.fixed_ips.iter().filter_map(|one| one.ip_address.as_ref());
        texts.map(|text| text.parse().map_err(|_| RowError::Address { text: text.clone() })).collect()
    }

    /// Addresses and CIDRs.
    fn allowed_addresses(&self) -> Vec<AddressPrefix> {
        let texts = self.allowed_address_pairs.iter().filter_map(|one| one.ip_address.as_deref());
        texts.filter_map(|text| text.parse().ok()).collect()
    }
}

impl Subport {
    fn facts(&self, parent: PortId) -> Result<PortRecord, RowError> {
        let fault = |source| RowError::Id { field: "trunk_details", source };
        let mac = self.mac_address.as_deref().map(str::parse).transpose().map_err(fault)?;
        let vlan = VlanId::try_from(self.segmentation_id).map_err(fault)?;
        let id = Some(self.port_id.parse().map_err(fault)?);
        Ok(PortRecord { id, seat: Some(TrunkBinding { parent, vlan }), mac, ..PortRecord::default() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const ID: &str = "3f2a9d10-77c1-4e55-9d0c-2b6f4f1f0a01";
    const INSTANCE: &str = "7d3c6e2e-5e0b-4f0e-8a44-0d4e6c7b1f10";

    fn told(row: &Value) -> Vec<Told> {
        let page: Page = serde_json::from_value(json!({ "ports": [row] })).unwrap();
        page.told().collect()
    }

    fn port(owner: &str, device: &str) -> Value {
        json!({
            "id": ID, "device_id": device, "device_owner": owner, "project_id": "p", "network_id": INSTANCE,
            "mac_address": "fa:16:3e:00:00:01", "name": "ignored",
            "fixed_ips": [{ "subnet_id": "s", "ip_address": "10.0.0.5" }, { "ip_address": "fd00::5" }],
            "allowed_address_pairs": [{ "ip_address": "10.0.0.9", "mac_address": "x" }, { "ip_address": "10.0.0.8/32" },
                { "ip_address": "10.1.0.0/16" }],
        })
    }

    #[test]
    fn an_instances_port_names_the_instance_and_the_ports_project() {
        let [(id, Ok(Said { facts, .. }))] = &told(&port("compute:az-1", INSTANCE))[..] else {
            panic!("one port")
        };
        assert_eq!(id.to_string(), ID);
        let tenant = Tenant { instance: INSTANCE.parse().unwrap(), project: None };
        assert_eq!(facts.tenant, Some(tenant));
        assert_eq!(facts.port_project, Some("p".parse().unwrap()));
        assert_eq!(facts.fixed_ips, ["10.0.0.5", "fd00::5"].map(|ip| ip.parse::<IpAddr>().unwrap()));
        let allowed =
            ["10.0.0.9", "10.0.0.8", "10.1.0.0/16"].map(|text| text.parse::<AddressPrefix>().unwrap());
        assert_eq!(facts.allowed_addresses, allowed);
    }

    #[test]
    fn what_is_not_an_instances_names_none_whatever_its_device_id_is() {
        for (owner, device) in [
            ("network:dhcp", "dhcp-x"),
            ("network:router_interface", INSTANCE),
            ("", INSTANCE),
            ("compute", INSTANCE),
        ] {
            let [(_, Ok(Said { facts, .. }))] = &told(&port(owner, device))[..] else { panic!("one port") };
            assert_eq!(facts.tenant, None, "{owner}");
        }
    }

    #[test]
    fn a_port_that_cannot_be_understood_is_a_fault_of_its_own() {
        let [(_, Err(RowError::Id { field, .. }))] = &told(&port("compute:nova", "x"))[..] else {
            panic!("a fault")
        };
        assert_eq!(*field, "device_id");
        let mut other = port("compute:nova", INSTANCE);
        other["fixed_ips"][0]["ip_address"] = json!("10.0.0.500");
        assert!(matches!(&told(&other)[..], [(_, Err(RowError::Address { .. }))]));
        assert_eq!(told(&json!({ "id": "x" })), []);
    }

    #[test]
    fn of_the_next_page_nothing_but_the_marker_is_taken() {
        let page = |href: &str| -> Page {
            serde_json::from_value(json!({ "ports": [], "ports_links": [
                { "rel": "previous", "href": "http://a?marker=x" }, { "rel": "next", "href": href },
            ] }))
            .unwrap()
        };
        let elsewhere = page(&format!("http://evil/?limit=1&marker={ID}"));
        assert_eq!(elsewhere.next(), Some(ID.parse().unwrap()));
        let odd = page("http://neutron/v2.0/ports?marker=../../x");
        assert!(odd.is_followed() && odd.next().is_none());
    }

    #[test]
    fn a_trunks_parent_names_its_subports_and_their_own_rows_tell_the_rest() {
        const SUBPORT: &str = "b1b2b3b4-77c1-4e55-9d0c-2b6f4f1f0a02";
        let trunk = |tag: u64, kind: &str| {
            let mut row = port("compute:nova", INSTANCE);
            row["trunk_details"] = json!({ "trunk_id": INSTANCE, "sub_ports": [{
                "port_id": SUBPORT, "segmentation_id": tag, "segmentation_type": kind, "mac_address": "fa:16:3e:00:00:02",
            }] });
            told(&row).pop().unwrap().1.unwrap()
        };
        let id: PortId = SUBPORT.parse().unwrap();
        let seat = TrunkBinding { parent: ID.parse().unwrap(), vlan: VlanId::try_from(7).unwrap() };
        let mut said = trunk(7, "vlan");
        assert_eq!(said.lacks().collect::<Vec<_>>(), [id]);
        let mut row = port("trunk:subport", "");
        row["id"] = SUBPORT.into();
        let rows = told(&row).into_iter().map(|(id, row)| (id, row.map(|said| said.facts))).collect();
        said.complete(&rows);
        let [_, subport] = &said.facts()[..] else { panic!("{said:?}") };
        assert_eq!((subport.id, subport.seat, &subport.tenant), (Some(id), Some(seat), &None));
        assert_eq!(subport.network, Some(INSTANCE.parse().unwrap()));
        assert_eq!(subport.fixed_ips, ["10.0.0.5", "fd00::5"].map(|ip| ip.parse::<IpAddr>().unwrap()));
        assert_eq!(said.lacks().count(), 0);

        said.complete(&BTreeMap::new());
        assert_eq!(said.subports, Some(Ok(Vec::new())), "deleted between the two questions");
        assert_eq!(trunk(7, "vxlan").subports, Some(Ok(Vec::new())));
        // The parent itself is none the worse for it.
        let faulty = trunk(4095, "vlan");
        assert!(matches!(faulty.subports, Some(Err(RowError::Id { field: "trunk_details", .. }))));
        assert_eq!(faulty.facts().len(), 1);
        assert!(faulty.facts.tenant.is_some());
    }
}
