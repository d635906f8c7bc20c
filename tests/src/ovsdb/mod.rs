//! The database of a host's Open vSwitch, without a switch: the rows that Nova's plugs and
//! Neutron's agents write.

pub mod server;

use std::path::PathBuf;

use metadata_agent::ids::{MacAddress, PortId};
use serde_json::{Value, json};

use crate::netns::Netns;
use crate::port::{Port, Subport};
use server::{Schema, Server};

pub(crate) const SCHEMA: Schema =
    Schema { path: "/usr/share/openvswitch/vswitch.ovsschema", database: "Open_vSwitch" };

const INTEGRATION: &str = "br-int";

/// The database and its server, if it runs.
#[derive(Debug)]
pub struct Ovsdb {
    server: Server,
}

/// The way in which a guest is plugged into Open vSwitch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plug {
    /// The tap is on the bridge.
    Direct,
    /// The tap is on a private Linux bridge, and the interface in Open vSwitch is named `qvo`.
    Hybrid,
}

impl Ovsdb {
    /// Serves an empty database.
    #[must_use]
    pub fn start() -> Self {
        Self::serve(Server::alone(SCHEMA), None)
    }

    /// Serves an empty database after `prepare`.
    #[must_use]
    pub fn start_with(netns: &Netns, prepare: impl FnOnce(&mut Server)) -> Self {
        let mut server = Server::alone(SCHEMA);
        prepare(&mut server);
        Self::serve(server, Some(netns))
    }

    fn serve(mut server: Server, netns: Option<&Netns>) -> Self {
        server.start(netns);
        let ovsdb = Self { server };
        ovsdb.ensure_bridge();
        ovsdb
    }

    /// Returns the server's address for `ovsdb_connection`.
    #[must_use]
    pub fn remote(&self) -> String {
        self.server.remote()
    }

    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.server.socket()
    }

    /// Plugs a guest's port as os-vif does, on a network of Neutron's OVS agent.
    pub fn plug(&self, port: &Port, plug: Plug) {
        let prefix = match plug {
            Plug::Direct => "tap",
            Plug::Hybrid => "qvo",
        };
        let name = format!("{prefix}{}", port.id.device_suffix());
        self.insert(&name, &of_guest(port), &[("net_uuid", port.network.to_string())]);
    }

    /// Unplugs the interface of a port's tap and plugs the port there in one transaction, which
    /// creates a new row.
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

    /// Plugs the parent port of a trunk: os-vif puts its tap on the trunk's bridge, and the agent
    /// connects the bridge.
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

    /// Connects a subport of a trunk in the order of Neutron's agent: the tag comes last.
    pub fn connect_subport(&self, subport: &Subport, parent: &Port) {
        let network = json!({ "net_uuid": subport.network });
        self.connect("sp", subport.id, subport.mac, parent, &json!({ "tag": subport.vlan }), &network);
    }

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

    /// Connects the bridge of a trunk and the integration bridge by two patch ports.
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

    /// Adds an interface with its port to the integration bridge.
    pub fn insert(&self, name: &str, external_ids: &[(&str, String)], port_config: &[(&str, String)]) {
        let interface = json!({ "name": name, "external_ids": ["map", external_ids] });
        self.insert_on(
            INTEGRATION,
            &interface,
            &json!({ "name": name, "other_config": ["map", port_config] }),
        );
    }

    /// Adds the interface of a DHCP port, as Neutron's driver does
    /// (neutron/agent/linux/interface.py, `OVSInterfaceDriver`).
    pub fn plug_dhcp_port(&self, name: &str, port: PortId) {
        let ids = [("iface-id", port.to_string()), ("iface-status", "active".to_owned())];
        let interface = json!({ "name": name, "type": "internal", "external_ids": ["map", ids] });
        self.insert_on(INTEGRATION, &interface, &json!({ "name": name }));
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

    /// Removes all ports from the bridge. This deletes their rows, because nothing refers to them
    /// any more.
    pub fn clear(&self) {
        self.transact(&[
            json!({ "op": "update", "table": "Bridge", "where": [], "row": { "ports": ["set", []] } }),
        ]);
    }

    pub fn stop(&mut self) {
        self.server.stop();
    }

    /// Serves the database again, unchanged.
    pub fn restart(&mut self) {
        self.stop();
        self.server.start(None);
        self.ensure_bridge();
    }

    /// Empties the database while its server is stopped.
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

/// Builds the operations that insert an interface and its port and add the port to the bridge.
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

/// Returns the external ids that os-vif writes for a port.
fn of_guest(port: &Port) -> [(&'static str, String); 4] {
    [
        ("iface-id", port.id.to_string()),
        ("iface-status", "active".to_owned()),
        ("attached-mac", port.mac.to_string()),
        ("vm-uuid", port.instance.to_string()),
    ]
}

/// Returns the name of a trunk's bridge. A trunk has its own id; here it is the id of its parent.
fn trunk_bridge(parent: &Port) -> String {
    let mut name = format!("tbr-{}", parent.id);
    name.truncate(14);
    name
}
