//! An instance as the stand-in knows it.

use std::net::Ipv4Addr;

use metadata_agent::ids::{InstanceId, MacAddress, NetworkId, PortId, ProjectId};
use uuid::Uuid;

use crate::port::Port;

#[derive(Clone, Debug)]
pub struct Instance {
    pub id: InstanceId,
    pub project: ProjectId,
    /// The name. The host name is this and `.novalocal`.
    pub name: String,
    /// The number in its EC2 ids.
    pub number: u32,
    pub port: PortId,
    pub network: NetworkId,
    pub mac: MacAddress,
    /// The address, with a prefix of 24 bits.
    pub address: Ipv4Addr,
    /// The gateway of its network.
    pub gateway: Ipv4Addr,
    /// The floating IP address.
    pub floating: Option<Ipv4Addr>,
    /// The name servers.
    pub dns: Vec<Ipv4Addr>,
    /// The user's key-value pairs.
    pub meta: Vec<(String, String)>,
    /// The name and text of its SSH key.
    pub key: Option<(String, String)>,
    /// The user data, arbitrary bytes.
    pub user_data: Option<Vec<u8>>,
    /// The cloud's vendor data in JSON.
    pub vendor_data: String,
    /// Injected files by path, served as `/openstack/content/NNNN`.
    pub files: Vec<(String, Vec<u8>)>,
    pub flavor: String,
    /// The reservation id.
    pub reservation: String,
    /// The password that it has posted.
    pub password: Option<Vec<u8>>,
}

impl Instance {
    /// Returns the instance behind a port. All its documents are unique to it.
    #[must_use]
    pub fn from_port(port: &Port) -> Self {
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

    /// Returns the host name in its documents.
    #[must_use]
    pub fn hostname(&self) -> String {
        format!("{}.novalocal", self.name)
    }
}
