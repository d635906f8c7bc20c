//! OVN's Southbound database, without the rest of OVN: the rows that northd writes for Neutron's
//! ports.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU32, Ordering};

use metadata_agent::ids::{NetworkId, PortId};
use serde_json::{Map, Value, json};

use crate::netns::Netns;
use crate::ovsdb::server::{Schema, Server, transact};
use crate::port::Port;

const SCHEMA: Schema = Schema { path: "/usr/share/ovn/ovn-sb.ovsschema", database: "OVN_Southbound" };
/// The number of foreign ports per transaction, which is an argument of a program.
const AT_ONCE: usize = 100;

/// The database and its servers, if they run.
#[derive(Debug)]
pub struct Southbound {
    servers: Vec<Server>,
    keys: AtomicU32,
}

impl Southbound {
    /// Serves an empty database with one server.
    #[must_use]
    pub fn start() -> Self {
        let mut server = Server::alone(SCHEMA);
        server.start(None);
        Self::from_servers(vec![server])
    }

    /// Serves an empty database after `prepare`. All listeners besides its socket are in the
    /// namespace.
    #[must_use]
    pub fn start_with(netns: &Netns, prepare: impl FnOnce(&mut Server)) -> Self {
        let mut server = Server::alone(SCHEMA);
        prepare(&mut server);
        server.start(Some(netns));
        Self::from_servers(vec![server])
    }

    /// Serves an empty database with a cluster.
    #[must_use]
    pub fn cluster(size: usize) -> Self {
        Self::from_servers(Server::cluster(SCHEMA, size))
    }

    fn from_servers(servers: Vec<Server>) -> Self {
        Self { servers, keys: AtomicU32::new(1) }
    }

    pub fn servers(&mut self) -> &mut [Server] {
        &mut self.servers
    }

    /// Returns the servers' addresses for `ovn_sb_connection`.
    #[must_use]
    pub fn remotes(&self) -> String {
        self.servers.iter().map(Server::remote).collect::<Vec<_>>().join(",")
    }

    /// Writes the row of an instance's port without a chassis.
    pub fn bind(&self, port: &Port) {
        self.insert(&[row(port)]);
    }

    /// Writes the row of a VLAN on a port of a trunk.
    pub fn bind_subport(&self, subport: &Port, parent: &Port, vlan: u16) {
        let mut row = row(subport);
        row["parent_port"] = parent.id.to_string().into();
        row["tag"] = vlan.into();
        row["external_ids"][1][0][1] = "".into();
        row["external_ids"][1][1][1] = "trunk:subport".into();
        self.insert(&[row]);
    }

    /// Writes the row of a chassis and returns a reference to it.
    pub fn add_chassis(&self, name: &str) -> Value {
        let encapsulation = json!({ "type": "geneve", "ip": "192.0.2.1", "chassis_name": name });
        let chassis = json!({ "name": name, "hostname": name, "encaps": ["named-uuid", "encapsulation"] });
        let done = self.transact(&[
            json!({ "op": "insert", "table": "Encap", "uuid-name": "encapsulation", "row": encapsulation }),
            json!({ "op": "insert", "table": "Chassis", "row": chassis }),
        ]);
        done[1]["uuid"].clone()
    }

    /// Writes the rows of a network's ports on a chassis and of the network's datapath, as northd
    /// names it.
    pub fn bind_at(&self, chassis: &Value, network: NetworkId, ports: &[&Port]) {
        let rows = ports.iter().map(|port| {
            let mut row = row(port);
            row["chassis"] = chassis.clone();
            row
        });
        let name = ["name".to_owned(), format!("neutron-{network}")];
        self.insert_into(&json!({ "external_ids": ["map", [name]] }), &rows.collect::<Vec<_>>());
    }

    /// Writes rows of ports on other hosts and returns their ids.
    pub fn bind_foreign(&self, like: &Port, count: usize) -> Vec<PortId> {
        let address = like.ipv4().unwrap_or(Ipv4Addr::LOCALHOST);
        let ports: Vec<_> = (0..count).map(|_| Port::new(like.network, address)).collect();
        for ports in ports.chunks(AT_ONCE) {
            self.insert(&ports.iter().map(row).collect::<Vec<_>>());
        }
        ports.iter().map(|port| port.id).collect()
    }

    /// Changes entries in the external ids of a port's row.
    pub fn set_external_ids(&self, port: &Port, ids: &[(&str, &str)]) {
        let keys: Vec<_> = ids.iter().map(|(key, _)| *key).collect();
        self.transact(&[json!({
            "op": "mutate", "table": "Port_Binding", "where": matching(port),
            "mutations": [
                ["external_ids", "delete", ["set", keys]],
                ["external_ids", "insert", ["map", ids]],
            ],
        })]);
    }

    /// Sets a column of a port's row.
    pub fn set_column(&self, port: &Port, column: &str, value: &Value) {
        self.transact(&[json!({
            "op": "update", "table": "Port_Binding", "where": matching(port), "row": { column: value },
        })]);
    }

    /// Gives a port other fixed addresses, or other allowed address pairs.
    pub fn readdress(&self, port: &Port) {
        let row = row(port);
        let columns = ["mac", "port_security", "external_ids"];
        let row: Map<_, _> =
            columns.map(|column| (column.to_owned(), row[column].clone())).into_iter().collect();
        // One transaction, as northd's: the addresses and what they allow change together.
        self.transact(&[json!({
            "op": "update", "table": "Port_Binding", "where": matching(port), "row": row,
        })]);
    }

    /// Removes a port's row.
    pub fn unbind(&self, port: &Port) {
        self.transact(&[json!({ "op": "delete", "table": "Port_Binding", "where": matching(port) })]);
    }

    fn insert(&self, rows: &[Value]) {
        self.insert_into(&json!({}), rows);
    }

    fn insert_into(&self, datapath: &Value, rows: &[Value]) {
        let mut row = datapath.clone();
        row["tunnel_key"] = self.keys.fetch_add(1, Ordering::Relaxed).into();
        let datapath =
            json!({ "op": "insert", "table": "Datapath_Binding", "uuid-name": "datapath", "row": row });
        let bindings = rows.iter().zip(1..).map(|(row, key)| {
            let mut row = row.clone();
            row["datapath"] = json!(["named-uuid", "datapath"]);
            row["tunnel_key"] = key.into();
            json!({ "op": "insert", "table": "Port_Binding", "row": row })
        });
        self.transact(&std::iter::once(datapath).chain(bindings).collect::<Vec<_>>());
    }

    fn transact(&self, operations: &[Value]) -> Value {
        let running = self.servers.iter().filter(|server| server.is_running());
        let remotes: Vec<_> = running.map(Server::remote).collect();
        transact(&remotes.join(","), SCHEMA, operations)
    }
}

fn matching(port: &Port) -> Value {
    json!([["logical_port", "==", port.id.to_string()]])
}

/// Returns the relevant columns as Neutron's OVN driver fills them.
fn row(port: &Port) -> Value {
    let join = |texts: Vec<String>| texts.join(" ");
    let addresses = join(port.fixed_ips.iter().map(ToString::to_string).collect());
    let ids = [
        ("neutron:device_id", port.instance.to_string()),
        ("neutron:device_owner", "compute:nova".to_owned()),
        ("neutron:project_id", port.project.to_string()),
        ("neutron:cidrs", join(port.fixed_ips.iter().map(|ip| format!("{ip}/24")).collect())),
        ("neutron:network_name", format!("neutron-{}", port.network)),
        ("neutron:revision_number", "4".to_owned()),
    ];
    let own = format!("{} {addresses}", port.mac);
    json!({
        "logical_port": port.id.to_string(),
        "mac": ["set", [own.trim(), "unknown"]],
        "port_security": ["set", port_security(port, own)],
        "external_ids": ["map", ids],
    })
}

/// Returns the entries of a port, whose own entry without address pairs this is.
fn port_security(port: &Port, own: String) -> Vec<String> {
    if port.port_security_enabled == Some(false) {
        return Vec::new();
    }
    let own = port.allowed_addresses.iter().fold(own, |own, prefix| format!("{own} {prefix}"));
    let pairs = port.allowed_address_pairs.iter();
    let pairs = pairs.map(|pair| format!("{} {}", pair.mac_address, pair.ip_address));
    std::iter::once(own.trim().to_owned()).chain(pairs).collect()
}
