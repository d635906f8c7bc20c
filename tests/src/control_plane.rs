//! The real Keystone and the real neutron-server, as Debian packages them, in the namespace of a host.
//!
//! Configuration, databases, keys and logs are in a folder of this value's own, and processes, folder and namespace end
//! with it. Keystone runs in uWSGI, as the package runs it. Databases are SQLite files, and Neutron's messages to agents go
//! nowhere: there are none. A namespace of its own lets both keep their usual ports, however many tests run.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use metadata_agent::ids::{NetworkId, PortId};
use serde_json::{Value, json};
use tempfile::TempDir;
use uuid::Uuid;

use crate::netns::output_of;
use crate::port::{Port, Subport};
use crate::topology::Host;

mod api;
mod keystone;
mod neutron;
mod service;

pub use keystone::Keystone;
pub use neutron::Neutron;

/// The administrator's name, and the name of the administrator's project.
pub const ADMIN: &str = "admin";
/// The administrator's password.
pub const PASSWORD: &str = "rig-password";
/// The only region.
pub const REGION: &str = "rig";

/// `[database]`: nothing has to survive the machine, so nothing waits for a disk.
const DATABASE_OPTIONS: &str = "sqlite_synchronous = false\n";

/// A cloud without a Nova.
#[derive(Debug)]
pub struct ControlPlane {
    /// Keystone, to stop and start.
    pub keystone: Keystone,
    /// neutron-server, to stop and start.
    pub neutron: Neutron,
    host: Host,
    folder: TempDir,
}

/// What Nova or one of Neutron's agents tells about a port.
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
    /// Both, on this host's 127.0.0.1, with tokens that last an hour.
    #[must_use]
    pub fn start(host: &Host) -> Self {
        Self::start_with(host, 3600)
    }

    /// Both, with tokens that last so many seconds.
    #[must_use]
    pub fn start_with(host: &Host, token_seconds: u32) -> Self {
        let folder = tempfile::Builder::new().prefix("control-plane-").tempdir();
        let folder = folder.unwrap_or_else(|e| panic!("make a folder for a control plane: {e}"));
        // Each spends most of its start on reading Python.
        let (keystone, neutron) = thread::scope(|scope| {
            let neutron = scope.spawn(|| Neutron::install(host, folder.path()));
            let keystone = Keystone::install(host, folder.path(), token_seconds);
            (keystone, neutron.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        });
        let mut plane = Self { keystone, neutron, host: host.clone(), folder };
        plane.keystone.start();
        plane.neutron.start();
        plane
    }

    /// Keystone, as `auth_url` names it.
    #[must_use]
    pub fn auth_url(&self) -> String {
        keystone::URL.to_owned()
    }

    /// A token of the administrator's.
    #[must_use]
    pub fn token(&self) -> String {
        keystone::token(&self.host)
    }

    /// An application credential of the administrator's: its id and its secret.
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

    /// A network with one subnet.
    #[must_use]
    pub fn create_network(&self, subnet: &str) -> NetworkId {
        let made = self.network_api("POST", "/networks", &json!({ "network": { "name": "rig" } }));
        let id = text(&made["network"]["id"]);
        let subnet = json!({ "network_id": id, "ip_version": 4, "cidr": subnet, "gateway_ip": null });
        self.network_api("POST", "/subnets", &json!({ "subnet": subnet }));
        id.parse().unwrap_or_else(|e| panic!("{id}: {e}"))
    }

    /// A router with this address on a network.
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

    /// A trunk of a port that is not bound yet, with these subports, each of which becomes a port; hands back its id.
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

    /// Takes a subport off its trunk.
    pub fn remove_subport(&self, trunk: Uuid, subport: &Subport) {
        let body = json!({ "sub_ports": [{ "port_id": subport.id }] });
        self.network_api("PUT", &format!("/trunks/{trunk}/remove_subports"), &body);
    }

    /// A port with the addresses and the project of this one: the same port with the id that Neutron gave it.
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

    /// Tells Neutron about a port anew.
    pub fn bind_port(&self, port: PortId, binding: &Binding<'_>) {
        let body = json!({ "port": {
            "device_owner": binding.owner, "device_id": binding.device, "binding:host_id": binding.host,
        } });
        self.network_api("PUT", &format!("/ports/{port}"), &body);
    }

    /// Gives a port this address instead of those that it has.
    pub fn readdress_port(&self, port: PortId, address: Ipv4Addr) {
        let body = json!({ "port": { "fixed_ips": [{ "ip_address": address }] } });
        self.network_api("PUT", &format!("/ports/{port}"), &body);
    }

    /// Deletes a port.
    pub fn delete_port(&self, port: PortId) {
        self.network_api("DELETE", &format!("/ports/{port}"), &Value::Null);
    }

    /// The options by which an agent uses the administrator's password, by name and value.
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

    /// Where everything of it is.
    #[must_use]
    pub fn folder(&self) -> PathBuf {
        self.folder.path().to_owned()
    }

    fn network_api(&self, method: &str, path: &str, body: &Value) -> Value {
        let path = format!("/v2.0{path}");
        api::call(&self.host, neutron::ADDRESS, method, &path, Some(&self.token()), body).body
    }
}

/// An address of the loopback interface.
const fn local(port: u16) -> (IpAddr, u16) {
    (IpAddr::V4(Ipv4Addr::LOCALHOST), port)
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("no text where one is due: {value}")).to_owned()
}

/// Has a database keep its changes in a log, in which they do not wait for those who read (`PRAGMA journal_mode`). Without it
/// a change fails while a transaction that has read something is open, and in neutron-server, which is one thread, that
/// transaction cannot even end meanwhile. It holds for the file.
fn let_readers_be(database: &Path) {
    let script = "import sqlite3, sys\n\
         mode, = sqlite3.connect(sys.argv[1]).execute('PRAGMA journal_mode = WAL').fetchone()\n\
         sys.exit(0 if mode == 'wal' else f'journal mode {mode}')\n";
    let mut python = Command::new("/usr/bin/python3");
    output_of(python.args(["-c", script]).arg(database));
}

fn write(path: &Path, text: &str) {
    fs::write(path, text).unwrap_or_else(|e| panic!("write {}: {e}", path.display()));
}
