//! What Neutron's API says of ports, and what of it are [`Facts`].

use std::net::IpAddr;

use serde::Deserialize;

use crate::ids::{IdError, NetworkId, PortId, ProjectId};
use crate::inventory::{DeviceOwner, Facts, Tenant};

/// The attributes that are asked for, and no others: a port has three dozen.
pub(super) const FIELDS: [&str; 8] = [
    "id",
    "device_id",
    "device_owner",
    "project_id",
    "network_id",
    "mac_address",
    "fixed_ips",
    "allowed_address_pairs",
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
}

#[derive(Debug, Deserialize)]
struct Address {
    #[serde(default)]
    ip_address: Option<String>,
}

/// A port's id, and what is said of it, or why that cannot be understood.
pub(super) type Told = (PortId, Result<Facts, RowError>);

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
        self.ports.into_iter().filter_map(|row| Some((row.id.parse().ok()?, row.facts())))
    }
}

impl Row {
    fn facts(&self) -> Result<Facts, RowError> {
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
        Ok(Facts {
            id: read("id", Some(&self.id))?,
            tenant: instance.map(|instance| Tenant { instance, project: None }),
            device_owner,
            port_project: read::<ProjectId>("project_id", self.project_id.as_ref())?,
            network: read::<NetworkId>("network_id", self.network_id.as_ref())?,
            mac: read("mac_address", self.mac_address.as_ref())?,
            fixed_ips: self.fixed_ips()?,
            allowed_addresses: self.allowed_addresses(),
            ..Facts::default()
        })
    }

    fn fixed_ips(&self) -> Result<Vec<IpAddr>, RowError> {
        let texts = self.fixed_ips.iter().filter_map(|one| one.ip_address.as_ref());
        texts.map(|text| text.parse().map_err(|_| RowError::Address { text: text.clone() })).collect()
    }

    /// Single addresses; a pair may also be a whole range, which is no address that a guest asks from.
    fn allowed_addresses(&self) -> Vec<IpAddr> {
        let texts = self.allowed_address_pairs.iter().filter_map(|one| one.ip_address.as_deref());
        let bare =
            texts.map(|text| text.strip_suffix("/32").or_else(|| text.strip_suffix("/128")).unwrap_or(text));
        bare.filter_map(|text| text.parse().ok()).collect()
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
        let [(id, Ok(facts))] = &told(&port("compute:az-1", INSTANCE))[..] else { panic!("one port") };
        assert_eq!(id.to_string(), ID);
        let tenant = Tenant { instance: INSTANCE.parse().unwrap(), project: None };
        assert_eq!(facts.tenant, Some(tenant));
        assert_eq!(facts.port_project, Some("p".parse().unwrap()));
        assert_eq!(facts.fixed_ips, ["10.0.0.5", "fd00::5"].map(|ip| ip.parse::<IpAddr>().unwrap()));
        assert_eq!(facts.allowed_addresses, ["10.0.0.9", "10.0.0.8"].map(|ip| ip.parse::<IpAddr>().unwrap()));
    }

    #[test]
    fn what_is_not_an_instances_names_none_whatever_its_device_id_is() {
        for (owner, device) in [
            ("network:dhcp", "dhcp-x"),
            ("network:router_interface", INSTANCE),
            ("", INSTANCE),
            ("compute", INSTANCE),
        ] {
            let [(_, Ok(facts))] = &told(&port(owner, device))[..] else { panic!("one port") };
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
}
