//! A host's Open vSwitch, of which nothing but the database is there: the rows that Nova's plugs and Neutron's agents write.

pub mod server;

use std::path::PathBuf;

use serde_json::{Value, json};

use crate::netns::Netns;
use crate::port::Port;
use server::{Schema, Server};

const SCHEMA: Schema = Schema { path: "/usr/share/openvswitch/vswitch.ovsschema", database: "Open_vSwitch" };

/// The database, and a server of it while that runs.
#[derive(Debug)]
pub struct Ovsdb {
    server: Server,
}

/// How a guest is plugged into Open vSwitch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plug {
    /// The tap is on the bridge.
    Direct,
    /// The tap is on a Linux bridge of its own, and what is on Open vSwitch's is called `qvo`.
    Hybrid,
}

impl Ovsdb {
    /// An empty database that is served.
    #[must_use]
    pub fn start() -> Self {
        Self::of(Server::alone(SCHEMA), None)
    }

    /// The same, served as it was prepared.
    #[must_use]
    pub fn start_with(netns: &Netns, prepare: impl FnOnce(&mut Server)) -> Self {
        let mut server = Server::alone(SCHEMA);
        prepare(&mut server);
        Self::of(server, Some(netns))
    }

    fn of(mut server: Server, netns: Option<&Netns>) -> Self {
        server.start(netns);
        let ovsdb = Self { server };
        ovsdb.ensure_bridge();
        ovsdb
    }

    /// The server, as `ovsdb_connection` names it.
    #[must_use]
    pub fn remote(&self) -> String {
        self.server.remote()
    }

    /// The server's socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.server.socket()
    }

    /// Plugs a port of a guest, as os-vif does, on a network of Neutron's OVS agent.
    pub fn plug(&self, port: &Port, plug: Plug) {
        let prefix = match plug {
            Plug::Direct => "tap",
            Plug::Hybrid => "qvo",
        };
        let name = format!("{prefix}{}", port.id.device_suffix());
        let ids = [
            ("iface-id", port.id.to_string()),
            ("iface-status", "active".to_owned()),
            ("attached-mac", port.mac.to_string()),
            ("vm-uuid", port.instance.to_string()),
        ];
        self.insert(&name, &ids, &[("net_uuid", port.network.to_string())]);
    }

    /// Adds an interface, and the port that holds it, to the integration bridge.
    pub fn insert(&self, name: &str, external_ids: &[(&str, String)], port_config: &[(&str, String)]) {
        let interface = json!({ "name": name, "external_ids": ["map", external_ids] });
        let port =
            json!({ "name": name, "interfaces": ["named-uuid", "i"], "other_config": ["map", port_config] });
        self.transact(&[
            json!({ "op": "insert", "table": "Interface", "row": interface, "uuid-name": "i" }),
            json!({ "op": "insert", "table": "Port", "row": port, "uuid-name": "p" }),
            json!({
                "op": "mutate", "table": "Bridge", "where": [],
                "mutations": [["ports", "insert", ["set", [["named-uuid", "p"]]]]],
            }),
        ]);
    }

    /// Changes one entry of an interface's external ids.
    pub fn set_external_id(&self, interface: &str, key: &str, value: &str) {
        self.transact(&[json!({
            "op": "mutate", "table": "Interface", "where": [["name", "==", interface]],
            "mutations": [
                ["external_ids", "delete", ["set", [key]]],
                ["external_ids", "insert", ["map", [[key, value]]]],
            ],
        })]);
    }

    /// Takes all ports off the bridge, and with them their rows, which nothing refers to any more.
    pub fn clear(&self) {
        self.transact(&[
            json!({ "op": "update", "table": "Bridge", "where": [], "row": { "ports": ["set", []] } }),
        ]);
    }

    /// Kills the server.
    pub fn stop(&mut self) {
        self.server.stop();
    }

    /// Serves the database again, as it was.
    pub fn restart(&mut self) {
        self.stop();
        self.server.start(None);
        self.ensure_bridge();
    }

    /// Empties the database while no server runs.
    pub fn replace(&mut self) {
        self.server.replace();
    }

    fn ensure_bridge(&self) {
        let select = json!({ "op": "select", "table": "Bridge", "where": [], "columns": ["name"] });
        if self.transact(&[select])[0]["rows"].as_array().is_some_and(|rows| !rows.is_empty()) {
            return;
        }
        self.transact(&[
            json!({ "op": "insert", "table": "Bridge", "row": { "name": "br-int" }, "uuid-name": "b" }),
            json!({ "op": "insert", "table": "Open_vSwitch", "row": { "bridges": ["named-uuid", "b"] } }),
        ]);
    }

    fn transact(&self, operations: &[Value]) -> Value {
        self.server.transact(operations)
    }
}
