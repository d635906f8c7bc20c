//! The real Keystone and the real neutron-server, as Debian packages them, in the namespace of a
//! host.
//!
//! This value owns the folder with configuration, databases, keys and logs. Processes, folder and
//! namespace end with it. Keystone runs in uWSGI, as the package runs it. The databases are SQLite
//! files. Neutron's messages to agents are discarded because there are no agents. Each test has its
//! own namespace, so both services keep their usual ports.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::thread;

use metadata_agent::ids::{NetworkId, PortId};
use serde_json::{Value, json};
use tempfile::TempDir;
use uuid::Uuid;

use crate::port::{AddressPair, Port, Subport};
use crate::topology::Host;

mod api;
mod keystone;
mod neutron;
mod prepared;
mod service;

pub use keystone::Keystone;
pub use neutron::Neutron;

/// The name of the administrator and of the administrator's project.
pub const ADMIN: &str = "admin";
pub const PASSWORD: &str = "rig-password";
pub const REGION: &str = "rig";

const TOKEN_SECONDS: u32 = 3600;

/// `[database]`: the data need not survive a crash, so nothing is synced to disk.
const DATABASE_OPTIONS: &str = "sqlite_synchronous = false\n";

/// A cloud without Nova.
#[derive(Debug)]
pub struct ControlPlane {
    /// Keystone, which can be stopped and started.
    pub keystone: Keystone,
    /// neutron-server, which can be stopped and started.
    pub neutron: Neutron,
    host: Host,
    folder: TempDir,
}

/// The binding of a port, as Nova or one of Neutron's agents sets it.
#[derive(Clone, Copy, Debug)]
pub struct Binding<'a> {
    /// `device_owner`.
    pub owner: &'a str,
    /// `device_id`.
    pub device: &'a str,
    /// `binding:host_id`.
    pub host: &'a str,
}

impl ControlPlane {
    /// Starts both on the host's 127.0.0.1, with tokens that are valid for an hour.
    #[must_use]
    pub fn start(host: &Host) -> Self {
        Self::start_with(host, TOKEN_SECONDS)
    }

    /// Starts both, with tokens that are valid for this number of seconds.
    #[must_use]
    pub fn start_with(host: &Host, token_seconds: u32) -> Self {
        let folder = tempfile::Builder::new().prefix("control-plane-").tempdir();
        let folder = folder.unwrap_or_else(|e| panic!("create a folder for a control plane: {e}"));
        prepared::copy(folder.path());
        let mut keystone = Keystone::install(host, folder.path(), token_seconds);
        let mut neutron = Neutron::install(host, folder.path());
        // Each spends most of its start on loading Python modules, so start them in parallel.
        thread::scope(|scope| {
            scope.spawn(|| neutron.run());
            keystone.start();
        });
        neutron.warm_up();
        Self { keystone, neutron, host: host.clone(), folder }
    }

    /// Returns the URL of Keystone for `auth_url`.
    #[must_use]
    pub fn auth_url(&self) -> String {
        keystone::URL.to_owned()
    }

    /// Returns a token of the administrator.
    #[must_use]
    pub fn token(&self) -> String {
        keystone::token(&self.host)
    }

    /// Creates an application credential of the administrator. Returns its id and its secret.
    #[must_use]
    pub fn application_credential(&self) -> (String, String) {
        let token = self.token();
        let keystone = |method, path: &str, body: &Value| {
            api::call(&self.host, keystone::ADDRESS, method, path, Some(&token), body).body
        };
        let users = keystone("GET", &format!("/v3/users?name={ADMIN}"), &Value::Null);
        let user = text(&users["users"][0]["id"]);
        let path = format!("/v3/users/{user}/application_credentials");
        let made = keystone("POST", &path, &json!({ "application_credential": { "name": "agent" } }));
        let made = &made["application_credential"];
        (text(&made["id"]), text(&made["secret"]))
    }

    /// Creates a network with one subnet.
    #[must_use]
    pub fn create_network(&self, subnet: &str) -> NetworkId {
        let made = self.network_api("POST", "/networks", &json!({ "network": { "name": "rig" } }));
        let id = text(&made["network"]["id"]);
        let subnet = json!({ "network_id": id, "ip_version": 4, "cidr": subnet, "gateway_ip": null });
        self.network_api("POST", "/subnets", &json!({ "subnet": subnet }));
        id.parse().unwrap_or_else(|e| panic!("{id}: {e}"))
    }

    /// Creates a router with this address on a network.
    #[must_use]
    pub fn create_router(&self, network: NetworkId, address: Ipv4Addr) -> Uuid {
        let made = self.network_api("POST", "/routers", &json!({ "router": { "name": "rig" } }));
        let id = text(&made["router"]["id"]);
        let port = json!({ "network_id": network, "fixed_ips": [{ "ip_address": address }] });
        let port = self.network_api("POST", "/ports", &json!({ "port": port }));
        let path = format!("/routers/{id}/add_router_interface");
        self.network_api("PUT", &path, &json!({ "port_id": port["port"]["id"] }));
        id.parse().unwrap_or_else(|e| panic!("{id}: {e}"))
    }

    /// Creates a trunk for an unbound port with these subports, each of which becomes a port.
    /// Returns the trunk's id.
    #[must_use]
    pub fn create_trunk(&self, network: NetworkId, parent: &Port, subports: &mut [Subport]) -> Uuid {
        let mut entries = Vec::new();
        for subport in subports {
            let addresses: Vec<_> = subport.fixed_ips.iter().map(|ip| json!({ "ip_address": ip })).collect();
            let body = json!({ "port": {
                "network_id": network, "mac_address": subport.mac, "tenant_id": parent.project, "fixed_ips": addresses,
            } });
            let made = self.network_api("POST", "/ports", &body);
            let id = text(&made["port"]["id"]);
            (subport.id, subport.network) = (id.parse().unwrap_or_else(|e| panic!("{id}: {e}")), network);
            let (kind, tag) = ("vlan", subport.vlan);
            entries.push(json!({ "port_id": id, "segmentation_type": kind, "segmentation_id": tag }));
        }
        let body = json!({ "trunk": { "port_id": parent.id, "sub_ports": entries } });
        let made = self.network_api("POST", "/trunks", &body);
        let id = text(&made["trunk"]["id"]);
        id.parse().unwrap_or_else(|e| panic!("{id}: {e}"))
    }

    /// Removes a subport from its trunk.
    pub fn remove_subport(&self, trunk: Uuid, subport: &Subport) {
        let body = json!({ "sub_ports": [{ "port_id": subport.id }] });
        self.network_api("PUT", &format!("/trunks/{trunk}/remove_subports"), &body);
    }

    /// Creates a port with the addresses and the project of `port`. Returns that port with the id
    /// that Neutron assigned.
    #[must_use]
    pub fn create_port(&self, network: NetworkId, port: &Port, binding: &Binding<'_>) -> Port {
        let addresses: Vec<_> = port
            .fixed_ips
            .iter()
            .filter(|address| address.is_ipv4())
            .map(|ip| json!({ "ip_address": ip }))
            .collect();
        let body = json!({ "port": {
            "network_id": network, "mac_address": port.mac, "tenant_id": port.project, "fixed_ips": addresses,
            "device_owner": binding.owner, "device_id": binding.device, "binding:host_id": binding.host,
        } });
        let made = self.network_api("POST", "/ports", &body);
        let id = text(&made["port"]["id"]);
        Port { id: id.parse().unwrap_or_else(|e| panic!("{id}: {e}")), network, ..port.clone() }
    }

    /// Creates these ports of instances in one request, and sets the ids that Neutron assigned.
    /// They are not bound to a host, which would take a second for each.
    pub fn create_ports(&self, network: NetworkId, ports: &mut [Port]) {
        let wanted = ports.iter().map(|port| {
            let addresses = port.ipv4().map(|address| json!({ "ip_address": address }));
            json!({
                "network_id": network, "mac_address": port.mac, "tenant_id": port.project,
                "fixed_ips": Vec::from_iter(addresses), "device_owner": "compute:nova",
                "device_id": port.instance,
            })
        });
        let body = json!({ "ports": wanted.collect::<Vec<_>>() });
        let made = self.network_api("POST", "/ports", &body);
        for port in ports {
            let mac = port.mac.to_string();
            let mut found = made["ports"].as_array().into_iter().flatten();
            let found = found.find(|made| made["mac_address"] == *mac);
            let id = text(&found.unwrap_or_else(|| panic!("no port with {mac}: {made}"))["id"]);
            (port.id, port.network) = (id.parse().unwrap_or_else(|e| panic!("{id}: {e}")), network);
        }
    }

    /// Updates the binding of a port.
    pub fn bind_port(&self, port: PortId, binding: &Binding<'_>) {
        let body = json!({ "port": {
            "device_owner": binding.owner, "device_id": binding.device, "binding:host_id": binding.host,
        } });
        self.network_api("PUT", &format!("/ports/{port}"), &body);
    }

    /// Replaces the addresses of a port by this one.
    pub fn readdress_port(&self, port: PortId, address: Ipv4Addr) {
        let body = json!({ "port": { "fixed_ips": [{ "ip_address": address }] } });
        self.network_api("PUT", &format!("/ports/{port}"), &body);
    }

    /// Replaces the allowed address pairs of a port.
    pub fn set_address_pairs(&self, port: PortId, pairs: &[AddressPair]) {
        let body = json!({ "port": { "allowed_address_pairs": pairs } });
        self.network_api("PUT", &format!("/ports/{port}"), &body);
    }

    /// Disables port security of a port, and removes what depends on it.
    pub fn disable_port_security(&self, port: PortId) {
        let body = json!({ "port": {
            "port_security_enabled": false, "security_groups": [], "allowed_address_pairs": [],
        } });
        self.network_api("PUT", &format!("/ports/{port}"), &body);
    }

    pub fn delete_port(&self, port: PortId) {
        self.network_api("DELETE", &format!("/ports/{port}"), &Value::Null);
    }

    /// Returns the names and values of the options with which an agent uses the administrator's
    /// password.
    #[must_use]
    pub fn password_options(&self) -> [(&'static str, String); 6] {
        [
            ("neutron_auth_url", self.auth_url()),
            ("neutron_username", ADMIN.to_owned()),
            ("neutron_password", PASSWORD.to_owned()),
            ("neutron_user_domain_name", "Default".to_owned()),
            ("neutron_project_name", ADMIN.to_owned()),
            ("neutron_project_domain_name", "Default".to_owned()),
        ]
    }

    #[must_use]
    pub fn folder(&self) -> PathBuf {
        self.folder.path().to_owned()
    }

    fn network_api(&self, method: &str, path: &str, body: &Value) -> Value {
        let path = format!("/v2.0{path}");
        api::call(&self.host, neutron::ADDRESS, method, &path, Some(&self.token()), body).body
    }
}

/// Returns an address of the loopback interface.
const fn local(port: u16) -> (IpAddr, u16) {
    (IpAddr::V4(Ipv4Addr::LOCALHOST), port)
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("expected text: {value}")).to_owned()
}

fn write(path: &Path, text: &str) {
    fs::write(path, text).unwrap_or_else(|e| panic!("write {}: {e}", path.display()));
}
