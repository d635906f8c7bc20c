//! The real `ovsdb-server` with the schema of Open vSwitch, and the rows that Nova's plugs and Neutron's agents write.
//!
//! Data are written by the server's own `ovsdb-client`. Nothing of an Open vSwitch that the machine may run is used:
//! database, sockets and process are this value's own and end with it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::netns::output_of;
use crate::port::Port;
use crate::wait::{self, PATIENCE};

const SCHEMA: &str = "/usr/share/openvswitch/vswitch.ovsschema";
const DATABASE: &str = "Open_vSwitch";

/// A database, and a server of it while that runs.
#[derive(Debug)]
pub struct Ovsdb {
    folder: TempDir,
    server: Option<Child>,
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
        let folder = tempfile::Builder::new().prefix("ovsdb-").tempdir();
        let folder = folder.unwrap_or_else(|e| panic!("make a folder for a database: {e}"));
        let mut ovsdb = Self { folder, server: None };
        ovsdb.create();
        ovsdb.serve();
        ovsdb
    }

    /// The server, as `ovsdb_connection` names it.
    #[must_use]
    pub fn remote(&self) -> String {
        format!("unix:{}", self.socket().display())
    }

    /// The server's socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.path("db.sock")
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
        let Some(mut server) = self.server.take() else { return };
        if let Err(e) = server.kill().and_then(|()| server.wait()) {
            eprintln!("kill ovsdb-server: {e}");
        }
    }

    /// Serves the database again, as it was.
    pub fn restart(&mut self) {
        self.stop();
        self.serve();
    }

    /// Empties the database while no server runs.
    pub fn replace(&mut self) {
        assert!(self.server.is_none(), "a database is replaced while a server has it");
        self.create();
    }

    fn create(&self) {
        let path = self.database();
        if path.exists() {
            fs::remove_file(&path).unwrap_or_else(|e| panic!("remove {}: {e}", path.display()));
        }
        output_of(Command::new("ovsdb-tool").arg("create").args([&path, Path::new(SCHEMA)]));
    }

    fn serve(&mut self) {
        let log = File::create(self.path("stderr")).unwrap_or_else(|e| panic!("make the server's log: {e}"));
        let mut command = Command::new("ovsdb-server");
        command
            .arg(format!("--remote=p{}", self.remote()))
            .arg(format!("--unixctl={}", self.path("ctl").display()))
            .arg("--no-chdir")
            .arg(self.database())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        self.server = Some(command.spawn().unwrap_or_else(|e| panic!("run {command:?}: {e}")));
        let listening = wait::poll(PATIENCE, || {
            let mut list = Command::new("ovsdb-client");
            let output = list.args(["list-dbs", &self.remote()]).output().ok()?;
            output.status.success().then_some(())
        });
        let said = || fs::read_to_string(self.path("stderr")).unwrap_or_default();
        listening.unwrap_or_else(|| panic!("ovsdb-server does not listen\n{}", said()));
        self.ensure_bridge();
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
        let mut request = vec![json!(DATABASE)];
        request.extend_from_slice(operations);
        let request = Value::from(request).to_string();
        let answer = output_of(Command::new("ovsdb-client").args(["transact", &self.remote(), &request]));
        let results: Value =
            serde_json::from_str(&answer).unwrap_or_else(|e| panic!("{request}: {e}: {answer}"));
        let failed =
            results.as_array().is_none_or(|results| results.iter().any(|one| !one["error"].is_null()));
        assert!(!failed, "{request}: {answer}");
        results
    }

    fn database(&self) -> PathBuf {
        self.path("conf.db")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

impl Drop for Ovsdb {
    fn drop(&mut self) {
        self.stop();
        if thread::panicking() {
            eprintln!(
                "--- ovsdb-server said\n{}",
                fs::read_to_string(self.path("stderr")).unwrap_or_default()
            );
        }
    }
}
