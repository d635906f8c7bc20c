//! Parses ports from Neutron's API.
//!
//! `trunk_details` of a trunk's parent lists the subports and their VLAN ids. The other fields of a
//! subport come from its own port, which must be requested separately
//! ([`PortDetails::incomplete_subports`], [`PortDetails::complete`]).

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::Deserialize;

use crate::ids::{IdError, MacAddress, NetworkId, PortId, ProjectId, VlanId};
use crate::inventory::{
    AllowedSource, DeviceOwner, PortAddressing, PortRecord, SourcePolicy, Tenant, TrunkBinding,
};

/// Requested attributes. A port has about three dozen.
pub(super) const FIELDS: &[&str] = &[
    "id",
    "device_id",
    "device_owner",
    "project_id",
    "network_id",
    "mac_address",
    "fixed_ips",
    "allowed_address_pairs",
    "port_security_enabled",
    "trunk_details",
];
/// The fields that identify a port. None of them can be long, so no port fills up a response that
/// others share.
pub(super) const IDENTITY_FIELDS: &[&str] =
    &["id", "device_id", "device_owner", "project_id", "network_id", "mac_address", "fixed_ips"];

/// One page of a list of ports.
#[derive(Debug, Deserialize)]
pub(super) struct PortPage {
    ports: Vec<PortJson>,
    #[serde(default)]
    ports_links: Vec<LinkJson>,
}

#[derive(Debug, Deserialize)]
struct LinkJson {
    rel: String,
    href: String,
}

/// Port as it is transmitted.
#[derive(Debug, Deserialize)]
struct PortJson {
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
    fixed_ips: Vec<AddressJson>,
    #[serde(default)]
    allowed_address_pairs: Option<Vec<PairJson>>,
    /// Missing without Neutron's extension `port-security`, which then is on.
    #[serde(default)]
    port_security_enabled: Option<bool>,
    #[serde(default)]
    trunk_details: Option<TrunkJson>,
}

/// Trunk whose parent is the port.
#[derive(Debug, Deserialize)]
struct TrunkJson {
    #[serde(default)]
    sub_ports: Vec<SubportJson>,
}

#[derive(Debug, Deserialize)]
struct SubportJson {
    port_id: String,
    segmentation_id: u64,
    segmentation_type: String,
    #[serde(default)]
    mac_address: Option<String>,
}

#[derive(Debug, Deserialize)]
struct AddressJson {
    #[serde(default)]
    ip_address: Option<String>,
}

/// Allowed address pair. Neutron fills in the port's MAC address.
#[derive(Debug, Deserialize)]
struct PairJson {
    #[serde(default)]
    ip_address: Option<String>,
    #[serde(default)]
    mac_address: Option<String>,
}

/// Port id with the parsed port or an error.
pub(super) type ParsedPort = (PortId, Result<PortDetails, PortError>);

/// Parsed port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct PortDetails {
    pub(super) record: PortRecord,
    /// Subports, if the port is the parent of a trunk.
    pub(super) subports: Option<Result<Vec<PortRecord>, PortError>>,
}

impl PortDetails {
    /// Returns the subports of which only parent and VLAN id are known.
    pub(super) fn incomplete_subports(&self) -> impl Iterator<Item = PortId> {
        let subports = self.subports.iter().flatten().flatten();
        subports.filter(|subport| subport.addressing.network.is_none()).filter_map(|subport| subport.id)
    }

    /// Adds the fields of the subports' own ports. Subports that no longer exist are removed.
    pub(super) fn complete(&mut self, rows: &BTreeMap<PortId, Result<PortRecord, PortError>>) {
        let Some(Ok(subports)) = &mut self.subports else { return };
        let known = subports.iter().filter_map(|subport| Some((subport.clone(), rows.get(&subport.id?)?)));
        let known = known.map(|(subport, row)| {
            let mut addressing = row.clone()?.addressing;
            addressing.mac = addressing.mac.or(subport.addressing.mac);
            Ok(PortRecord { addressing, ..subport })
        });
        self.subports = Some(known.collect());
    }

    /// Returns the records of the port and of its subports.
    pub(super) fn records(&self) -> Vec<PortRecord> {
        let subports = self.subports.iter().flatten().flatten();
        std::iter::once(&self.record).chain(subports).cloned().collect()
    }
}

/// Error in a port.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PortError {
    #[error("{field}: {source}")]
    Id { field: &'static str, source: IdError },
    #[error("fixed_ips: {text:?} is not an IP address")]
    Address { text: String },
}

impl PortPage {
    /// Returns the marker of the next page. The rest of the link is ignored, so that a server
    /// cannot redirect requests.
    pub(super) fn next(&self) -> Option<PortId> {
        let next = self.ports_links.iter().find(|link| link.rel == "next")?;
        let (_, query) = next.href.split_once('?')?;
        query.split('&').find_map(|pair| pair.strip_prefix("marker="))?.parse().ok()
    }

    /// Returns true if the server announces another page.
    pub(super) fn has_next(&self) -> bool {
        self.ports_links.iter().any(|link| link.rel == "next")
    }

    /// Parses each port. Ports without a valid id are skipped.
    pub(super) fn into_ports(self) -> impl Iterator<Item = ParsedPort> {
        let parse = |row: PortJson, id| Ok(PortDetails { record: row.record()?, subports: row.subports(id) });
        self.ports.into_iter().filter_map(move |row| {
            let id = row.id.parse().ok()?;
            Some((id, parse(row, id)))
        })
    }
}

impl PortJson {
    fn record(&self) -> Result<PortRecord, PortError> {
        fn read<T: std::str::FromStr<Err = IdError>>(
            field: &'static str,
            text: Option<&String>,
        ) -> Result<Option<T>, PortError> {
            let text = text.filter(|text| !text.is_empty());
            text.map(|text| text.parse().map_err(|source| PortError::Id { field, source })).transpose()
        }
        let device_owner = self.device_owner.as_deref().and_then(DeviceOwner::new);
        let is_instance = device_owner.as_ref().is_some_and(DeviceOwner::is_instance);
        // For other owners, `device_id` names a router, a DHCP server or anything else.
        let device_id = self.device_id.as_ref().filter(|_| is_instance);
        let instance = read("device_id", device_id)?;
        let mac = read("mac_address", self.mac_address.as_ref())?;
        let fixed_ips = self.fixed_ips()?;
        Ok(PortRecord {
            id: read("id", Some(&self.id))?,
            tenant: instance.map(|instance| Tenant { instance, project: None }),
            device_owner,
            port_project: read::<ProjectId>("project_id", self.project_id.as_ref())?,
            addressing: PortAddressing {
                network: read::<NetworkId>("network_id", self.network_id.as_ref())?,
                mac,
                allowed_sources: self.allowed_sources(mac, &fixed_ips),
                fixed_ips,
                ..PortAddressing::default()
            },
            ..PortRecord::default()
        })
    }

    /// Returns the VLAN subports. Neutron supports no other segmentation type yet.
    fn subports(&self, parent: PortId) -> Option<Result<Vec<PortRecord>, PortError>> {
        let subports = self.trunk_details.as_ref()?.sub_ports.iter();
        let vlans = subports.filter(|subport| subport.segmentation_type == "vlan");
        Some(vlans.map(|subport| subport.record(parent)).collect())
    }

    fn fixed_ips(&self) -> Result<Vec<IpAddr>, PortError> {
        let texts = self.fixed_ips.iter().filter_map(|one| one.ip_address.as_ref());
        texts.map(|text| text.parse().map_err(|_| PortError::Address { text: text.clone() })).collect()
    }

    /// Returns the sources that the port may send from; `None` if a part is missing or unreadable,
    /// so that no guest is refused because of a pair that the agent does not understand.
    fn allowed_sources(&self, mac: Option<MacAddress>, fixed_ips: &[IpAddr]) -> Option<SourcePolicy> {
        if self.port_security_enabled == Some(false) {
            return Some(SourcePolicy::Any);
        }
        let pairs = self.allowed_address_pairs.as_ref()?.iter().map(|pair| pair.source(mac));
        Some(SourcePolicy::secured(mac?, fixed_ips, pairs.collect::<Option<Vec<_>>>()?))
    }
}

impl PairJson {
    fn source(&self, ports: Option<MacAddress>) -> Option<AllowedSource> {
        let mac = match &self.mac_address {
            Some(text) => text.parse().ok(),
            None => ports,
        };
        Some(AllowedSource { mac: mac?, prefix: self.ip_address.as_ref()?.parse().ok()? })
    }
}

impl SubportJson {
    fn record(&self, parent: PortId) -> Result<PortRecord, PortError> {
        let invalid = |source| PortError::Id { field: "trunk_details", source };
        let mac = self.mac_address.as_deref().map(str::parse).transpose().map_err(invalid)?;
        let vlan = VlanId::try_from(self.segmentation_id).map_err(invalid)?;
        let id = Some(self.port_id.parse().map_err(invalid)?);
        let addressing = PortAddressing { mac, ..PortAddressing::default() };
        Ok(PortRecord { id, trunk: Some(TrunkBinding { parent, vlan }), addressing, ..PortRecord::default() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const ID: &str = "3f2a9d10-77c1-4e55-9d0c-2b6f4f1f0a01";
    const INSTANCE: &str = "7d3c6e2e-5e0b-4f0e-8a44-0d4e6c7b1f10";

    fn parse(row: &Value) -> Vec<ParsedPort> {
        let page: PortPage = serde_json::from_value(json!({ "ports": [row] })).unwrap();
        page.into_ports().collect()
    }

    fn port(owner: &str, device: &str) -> Value {
        json!({
            "id": ID, "device_id": device, "device_owner": owner, "project_id": "p", "network_id": INSTANCE,
            "mac_address": "fa:16:3e:00:00:01", "name": "ignored",
            "fixed_ips": [{ "subnet_id": "s", "ip_address": "10.0.0.5" }, { "ip_address": "fd00::5" }],
            "allowed_address_pairs": [{ "ip_address": "10.0.0.116", "mac_address": "00:00:5e:00:01:33" },
                { "ip_address": "10.1.0.0/16" }],
            "port_security_enabled": true,
        })
    }

    #[test]
    fn an_instances_port_has_instance_and_port_project() {
        let [(id, Ok(PortDetails { record, .. }))] = &parse(&port("compute:az-1", INSTANCE))[..] else {
            panic!("one port")
        };
        assert_eq!(id.to_string(), ID);
        let tenant = Tenant { instance: INSTANCE.parse().unwrap(), project: None };
        assert_eq!(record.tenant, Some(tenant));
        assert_eq!(record.port_project, Some("p".parse().unwrap()));
        assert_eq!(
            record.addressing.fixed_ips,
            ["10.0.0.5", "fd00::5"].map(|ip| ip.parse::<IpAddr>().unwrap())
        );
    }

    /// Returns the allowed sources of a port after a change, as MAC address and prefix.
    fn allowed(change: impl FnOnce(&mut Value)) -> Option<SourcePolicy> {
        let mut row = port("compute:nova", INSTANCE);
        change(&mut row);
        let (_, details) = parse(&row).pop().unwrap();
        details.unwrap().record.addressing.allowed_sources
    }

    #[test]
    fn port_security_and_pairs_decide_which_sources_are_allowed() {
        let (own, virtual_mac) = ("fa:16:3e:00:00:01", "00:00:5e:00:01:33");
        let only = |sources: &[(&str, &str)]| {
            let source = |(mac, prefix): &(&str, &str)| AllowedSource {
                mac: mac.parse().unwrap(),
                prefix: prefix.parse().unwrap(),
            };
            Some(SourcePolicy::Only(sources.iter().map(source).collect()))
        };
        let fixed = [(own, "10.0.0.5"), (own, "fd00::5")];
        let all = [fixed[0], fixed[1], (own, "10.1.0.0/16"), (virtual_mac, "10.0.0.116")];
        assert_eq!(allowed(|_| ()), only(&all), "a pair without a MAC address has the port's");
        assert_eq!(allowed(|row| row["port_security_enabled"] = json!(false)), Some(SourcePolicy::Any));
        assert_eq!(allowed(|row| row["port_security_enabled"] = Value::Null), only(&all));
        assert_eq!(allowed(|row| row["allowed_address_pairs"] = json!([])), only(&fixed));
        let any = [(own, "0.0.0.0/0"), (own, "::/0"), (own, "10.1.0.0/16"), (virtual_mac, "10.0.0.116")];
        assert_eq!(allowed(|row| row["fixed_ips"] = json!([])), only(&any));
    }

    #[test]
    fn an_incomplete_statement_allows_any_source() {
        let pair = |pair: Value| allowed(|row| row["allowed_address_pairs"] = json!([pair]));
        assert_eq!(allowed(|row| row["allowed_address_pairs"] = Value::Null), None);
        assert_eq!(allowed(|row| row["mac_address"] = Value::Null), None);
        assert_eq!(pair(json!({ "ip_address": "10.0.0.9", "mac_address": "x" })), None);
        assert_eq!(pair(json!({ "ip_address": "x" })), None);
        assert_eq!(pair(json!({ "mac_address": "fa:16:3e:00:00:01" })), None);
    }

    #[test]
    fn a_port_with_another_owner_has_no_instance() {
        for (owner, device) in [
            ("network:dhcp", "dhcp-x"),
            ("network:router_interface", INSTANCE),
            ("", INSTANCE),
            ("compute", INSTANCE),
        ] {
            let [(_, Ok(PortDetails { record, .. }))] = &parse(&port(owner, device))[..] else {
                panic!("one port")
            };
            assert_eq!(record.tenant, None, "{owner}");
        }
    }

    #[test]
    fn an_invalid_port_is_an_error_of_its_own() {
        let [(_, Err(PortError::Id { field, .. }))] = &parse(&port("compute:nova", "x"))[..] else {
            panic!("an error")
        };
        assert_eq!(*field, "device_id");
        let mut other = port("compute:nova", INSTANCE);
        other["fixed_ips"][0]["ip_address"] = json!("10.0.0.500");
        assert!(matches!(&parse(&other)[..], [(_, Err(PortError::Address { .. }))]));
        assert_eq!(parse(&json!({ "id": "x" })), []);
    }

    #[test]
    fn only_the_marker_of_the_next_page_is_used() {
        let page = |href: &str| -> PortPage {
            serde_json::from_value(json!({ "ports": [], "ports_links": [
                { "rel": "previous", "href": "http://a?marker=x" }, { "rel": "next", "href": href },
            ] }))
            .unwrap()
        };
        let elsewhere = page(&format!("http://evil/?limit=1&marker={ID}"));
        assert_eq!(elsewhere.next(), Some(ID.parse().unwrap()));
        let odd = page("http://neutron/v2.0/ports?marker=../../x");
        assert!(odd.has_next() && odd.next().is_none());
    }

    #[test]
    fn subports_are_completed_from_their_own_ports() {
        const SUBPORT: &str = "b1b2b3b4-77c1-4e55-9d0c-2b6f4f1f0a02";
        let trunk = |tag: u64, kind: &str| {
            let mut row = port("compute:nova", INSTANCE);
            row["trunk_details"] = json!({ "trunk_id": INSTANCE, "sub_ports": [{
                "port_id": SUBPORT, "segmentation_id": tag, "segmentation_type": kind, "mac_address": "fa:16:3e:00:00:02",
            }] });
            parse(&row).pop().unwrap().1.unwrap()
        };
        let id: PortId = SUBPORT.parse().unwrap();
        let binding = TrunkBinding { parent: ID.parse().unwrap(), vlan: VlanId::try_from(7).unwrap() };
        let mut details = trunk(7, "vlan");
        assert_eq!(details.incomplete_subports().collect::<Vec<_>>(), [id]);
        let mut row = port("trunk:subport", "");
        row["id"] = SUBPORT.into();
        let rows = parse(&row).into_iter().map(|(id, row)| (id, row.map(|details| details.record))).collect();
        details.complete(&rows);
        let [_, subport] = &details.records()[..] else { panic!("{details:?}") };
        assert_eq!((subport.id, subport.trunk, &subport.tenant), (Some(id), Some(binding), &None));
        assert_eq!(subport.addressing.network, Some(INSTANCE.parse().unwrap()));
        assert_eq!(
            subport.addressing.fixed_ips,
            ["10.0.0.5", "fd00::5"].map(|ip| ip.parse::<IpAddr>().unwrap())
        );
        assert_eq!(details.incomplete_subports().count(), 0);

        details.complete(&BTreeMap::new());
        assert_eq!(details.subports, Some(Ok(Vec::new())), "deleted between the two requests");
        assert_eq!(trunk(7, "vxlan").subports, Some(Ok(Vec::new())));
        // The parent itself is still valid.
        let invalid = trunk(4095, "vlan");
        assert!(matches!(invalid.subports, Some(Err(PortError::Id { field: "trunk_details", .. }))));
        assert_eq!(invalid.records().len(), 1);
        assert!(invalid.record.tenant.is_some());
    }
}
