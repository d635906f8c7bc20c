//! A host's Open vSwitch, of which nothing but the database is there: the rows that Nova's plugs and Neutron's agents write.

pub mod server;

use std::path::PathBuf;

use metadata_agent::ids::{MacAddress, PortId};
use serde_json::{Value, json};

use crate::netns::Netns;
use crate::port::{Port, Subport};
use server::{Schema, Server};

pub(crate) const SCHEMA: Schema =
    Schema { path: "/usr/share/openvswitch/vswitch.ovsschema", database: "Open_vSwitch" };

/// The integration bridge.
const INTEGRATION: &str = "br-int";

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
        self.insert(&name, &of_guest(port), &[("net_uuid", port.network.to_string())]);
    }

    /// Unplugs what is at a port's tap and plugs the port there, in one transaction: its row is another one.
    pub fn replug(&self, port: &Port) {
        let old = json!([["name", "==", port.tap()]]);
        let select = json!({ "op": "select", "table": "Port", "where": old, "columns": ["_uuid"] });
        let row = self.transact(&[select])[0]["rows"][0]["_uuid"].clone();
        let unplug = json!({
            "op": "mutate", "table": "Bridge", "where": [["name", "==", INTEGRATION]],
            "mutations": [["ports", "delete", ["set", [row]]]],
        });
        let interface = json!({ "name": port.tap(), "external_ids": ["map", of_guest(port)] });
        let [insert, hold, put] = insertion(INTEGRATION, &interface, &json!({ "name": port.tap() }));
        self.transact(&[unplug, insert, hold, put]);
    }

    /// Plugs a port that is the parent of a trunk: os-vif puts its tap on the trunk's bridge, and the agent connects that.
    pub fn plug_trunk(&self, port: &Port) {
        let tap = json!({ "name": port.tap(), "external_ids": ["map", of_guest(port)] });
        let name = trunk_bridge(port);
        let bridge = json!({ "op": "insert", "table": "Bridge", "row": { "name": name }, "uuid-name": "b" });
        let known = json!({
            "op": "mutate", "table": "Open_vSwitch", "where": [],
            "mutations": [["bridges", "insert", ["set", [["named-uuid", "b"]]]]],
        });
        self.transact(&[bridge, known]);
        self.insert_on(&name, &tap, &json!({ "name": port.tap() }));
        self.connect("tp", port.id, port.mac, port, &json!({}), &json!({ "net_uuid": port.network }));
    }

    /// Connects a subport of a trunk, in the steps of Neutron's agent: the tag comes last.
    pub fn connect_subport(&self, subport: &Subport, parent: &Port) {
        let network = json!({ "net_uuid": subport.network });
        self.connect("sp", subport.id, subport.mac, parent, &json!({ "tag": subport.vlan }), &network);
    }

    /// Disconnects it.
    pub fn disconnect_subport(&self, subport: &Subport) {
        for end in ["spt-", "spi-"] {
            let name = format!("{end}{}", subport.id.device_suffix());
            let select = json!({ "op": "select", "table": "Port", "where": [["name", "==", name]], "columns": ["_uuid"] });
            let port = self.transact(&[select])[0]["rows"][0]["_uuid"].clone();
            self.transact(&[json!({
                "op": "mutate", "table": "Bridge", "where": [],
                "mutations": [["ports", "delete", ["set", [port]]]],
            })]);
        }
    }

    /// Two patch ports between the bridge of a trunk and the integration bridge.
    fn connect(
        &self,
        prefix: &str,
        id: PortId,
        mac: MacAddress,
        parent: &Port,
        on_trunk: &Value,
        config: &Value,
    ) {
        let [trunk, integration] = ["t", "i"].map(|end| format!("{prefix}{end}-{}", id.device_suffix()));
        let interface = |name: &str, peer: &str| {
            let ids = [("attached-mac", mac.to_string()), ("iface-id", id.to_string())];
            json!({
                "name": name, "type": "patch", "options": ["map", [["peer", peer]]], "external_ids": ["map", ids],
            })
        };
        let config: Vec<_> = config.as_object().into_iter().flatten().collect();
        let port = json!({ "name": integration, "other_config": ["map", config] });
        self.insert_on(INTEGRATION, &interface(&integration, &trunk), &port);
        self.insert_on(&trunk_bridge(parent), &interface(&trunk, &integration), &json!({ "name": trunk }));
        if on_trunk.as_object().is_some_and(|columns| !columns.is_empty()) {
            self.transact(&[
                json!({ "op": "update", "table": "Port", "where": [["name", "==", trunk]], "row": on_trunk }),
            ]);
        }
    }

    /// Adds an interface, and the port that holds it, to the integration bridge.
    pub fn insert(&self, name: &str, external_ids: &[(&str, String)], port_config: &[(&str, String)]) {
        let interface = json!({ "name": name, "external_ids": ["map", external_ids] });
        self.insert_on(
            INTEGRATION,
            &interface,
            &json!({ "name": name, "other_config": ["map", port_config] }),
        );
    }

    fn insert_on(&self, bridge: &str, interface: &Value, port: &Value) {
        self.transact(&insertion(bridge, interface, port));
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
            json!({ "op": "insert", "table": "Bridge", "row": { "name": INTEGRATION }, "uuid-name": "b" }),
            json!({ "op": "insert", "table": "Open_vSwitch", "row": { "bridges": ["named-uuid", "b"] } }),
        ]);
    }

    fn transact(&self, operations: &[Value]) -> Value {
        self.server.transact(operations)
    }
}

/// An interface, the port that holds it, and the bridge that holds that.
fn insertion(bridge: &str, interface: &Value, port: &Value) -> [Value; 3] {
    let mut port = port.clone();
    port["interfaces"] = json!(["named-uuid", "i"]);
    [
        json!({ "op": "insert", "table": "Interface", "row": interface, "uuid-name": "i" }),
        json!({ "op": "insert", "table": "Port", "row": port, "uuid-name": "p" }),
        json!({
            "op": "mutate", "table": "Bridge", "where": [["name", "==", bridge]],
            "mutations": [["ports", "insert", ["set", [["named-uuid", "p"]]]]],
        }),
    ]
}

/// What os-vif writes about the interface of a port.
fn of_guest(port: &Port) -> [(&'static str, String); 4] {
    [
        ("iface-id", port.id.to_string()),
        ("iface-status", "active".to_owned()),
        ("attached-mac", port.mac.to_string()),
        ("vm-uuid", port.instance.to_string()),
    ]
}

/// A trunk has an id of its own, of which its bridge is called; here it is its parent's.
fn trunk_bridge(parent: &Port) -> String {
    let mut name = format!("tbr-{}", parent.id);
    name.truncate(14);
    name
}
