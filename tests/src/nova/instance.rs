//! What the stand-in knows of an instance.

use std::net::Ipv4Addr;

use metadata_agent::ids::{InstanceId, MacAddress, NetworkId, PortId, ProjectId};
use uuid::Uuid;

use crate::port::Port;

/// One instance record.
#[derive(Clone, Debug)]
pub struct Instance {
    /// The instance.
    pub id: InstanceId,
    /// The project it belongs to.
    pub project: ProjectId,
    /// Its name; the host name is this and `.novalocal`.
    pub name: String,
    /// The number in its EC2 ids.
    pub number: u32,
    /// Its port.
    pub port: PortId,
    /// The port's network.
    pub network: NetworkId,
    /// The port's MAC address.
    pub mac: MacAddress,
    /// Its address, in 24 bits of prefix.
    pub address: Ipv4Addr,
    /// The router of its network.
    pub gateway: Ipv4Addr,
    /// Its floating address.
    pub floating: Option<Ipv4Addr>,
    /// Name servers.
    pub dns: Vec<Ipv4Addr>,
    /// Its own key-value pairs.
    pub meta: Vec<(String, String)>,
    /// Name and text of its SSH key.
    pub key: Option<(String, String)>,
    /// What the user gave it, any bytes.
    pub user_data: Option<Vec<u8>>,
    /// The cloud's own document, JSON.
    pub vendor_data: String,
    /// Files, by path; served as `/openstack/content/NNNN`.
    pub files: Vec<(String, Vec<u8>)>,
    /// The name of its flavor.
    pub flavor: String,
    /// Its reservation.
    pub reservation: String,
    /// The password it has posted.
    pub password: Option<Vec<u8>>,
}

impl Instance {
    /// The instance behind a port. All documents tell it from every other one.
    #[must_use]
    pub fn of(port: &Port) -> Self {
        let suffix = port.id.device_suffix();
        let name = format!("vm-{suffix}");
        let [a, b, c, d, ..] = port.instance.octets();
        let address = port.ipv4().unwrap_or(Ipv4Addr::UNSPECIFIED);
        let [net @ .., _] = address.octets();
        Self {
            id: port.instance,
            project: port.project.clone(),
            number: u32::from_be_bytes([a, b, c, d]),
            port: port.id,
            network: port.network,
            mac: port.mac,
            address,
            gateway: Ipv4Addr::new(net[0], net[1], net[2], 1),
            floating: None,
            dns: Vec::new(),
            meta: vec![("port".to_owned(), port.id.to_string())],
            key: Some((format!("key-{suffix}"), format!("ssh-ed25519 AAAA{suffix} {name}"))),
            user_data: Some(format!("#cloud-config\nhostname: {name}\n").into_bytes()),
            vendor_data: format!(r#"{{"instance": "{}"}}"#, port.instance),
            files: Vec::new(),
            flavor: "m1.tiny".to_owned(),
            reservation: format!("r-{}", &Uuid::new_v4().simple().to_string()[..8]),
            password: None,
            name,
        }
    }

    /// The host name in its documents.
    #[must_use]
    pub fn hostname(&self) -> String {
        format!("{}.novalocal", self.name)
    }
}
