//! The real `ovsdb-server` with a database of any schema, alone or as a member of a cluster.
//!
//! Data are written by the server's own `ovsdb-client`. Nothing of a database that the machine may run is used: files,
//! sockets and process are this value's own and end with it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;

use serde_json::Value;
use tempfile::TempDir;

use crate::netns::{Netns, output_of};
use crate::wait::{self, PATIENCE};

/// A schema, and the database that has it.
#[derive(Clone, Copy, Debug)]
pub struct Schema {
    /// The file.
    pub path: &'static str,
    /// The name in it.
    pub database: &'static str,
}

/// A database, and a server of it while that runs.
#[derive(Debug)]
pub struct Server {
    schema: Schema,
    folder: TempDir,
    options: Vec<String>,
    process: Option<Child>,
}

impl Server {
    /// An empty database that nobody serves yet.
    #[must_use]
    pub fn alone(schema: Schema) -> Self {
        let server = Self::without_database(schema);
        server.create();
        server
    }

    /// The members of a cluster, which run.
    #[must_use]
    pub fn cluster(schema: Schema, size: usize) -> Vec<Self> {
        let mut members: Vec<Self> = Vec::new();
        for _ in 0..size {
            let mut member = Self::without_database(schema);
            let (database, own) = (member.database(), member.address_in_cluster());
            let mut tool = Command::new("ovsdb-tool");
            match members.first() {
                None => tool.arg("create-cluster").args([&database, Path::new(schema.path)]).arg(own),
                Some(first) => tool.arg("join-cluster").arg(&database).args([
                    schema.database,
                    &own,
                    &first.address_in_cluster(),
                ]),
            };
            output_of(&mut tool);
            member.start(None);
            members.push(member);
        }
        members
    }

    fn without_database(schema: Schema) -> Self {
        let folder = tempfile::Builder::new().prefix("ovsdb-").tempdir();
        let folder = folder.unwrap_or_else(|e| panic!("make a folder for a database: {e}"));
        Self { schema, folder, options: Vec::new(), process: None }
    }

    /// Gives the server a further option, such as a remote to listen on, from its next start on.
    pub fn set(&mut self, option: String) {
        self.options.push(option);
    }

    /// The server, as an agent's options name it.
    #[must_use]
    pub fn remote(&self) -> String {
        format!("unix:{}", self.socket().display())
    }

    /// The server's socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.path("db.sock")
    }

    /// Whether it was started and not stopped.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.process.is_some()
    }

    /// Serves the database; what it listens on besides its socket is in the namespace.
    pub fn start(&mut self, netns: Option<&Netns>) {
        let log = File::create(self.path("stderr")).unwrap_or_else(|e| panic!("make the server's log: {e}"));
        let program = "ovsdb-server";
        let mut command = netns.map_or_else(|| Command::new(program), |netns| netns.command(program));
        command
            .arg(format!("--remote=p{}", self.remote()))
            .arg(format!("--unixctl={}", self.path("ctl").display()))
            .arg("--no-chdir")
            .args(&self.options)
            .arg(self.database())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        self.process = Some(command.spawn().unwrap_or_else(|e| panic!("run {command:?}: {e}")));
        let serves = wait::poll(PATIENCE, || {
            let mut wait = Command::new("ovsdb-client");
            wait.args(["wait", &self.remote(), self.schema.database, "connected"]);
            wait.arg("--timeout=1").output().ok()?.status.success().then_some(())
        });
        serves.unwrap_or_else(|| panic!("ovsdb-server does not serve\n{}", self.log()));
    }

    /// Kills the server.
    pub fn stop(&mut self) {
        let Some(mut process) = self.process.take() else { return };
        if let Err(e) = process.kill().and_then(|()| process.wait()) {
            eprintln!("kill ovsdb-server: {e}");
        }
    }

    /// Empties the database while no server runs.
    pub fn replace(&mut self) {
        assert!(self.process.is_none(), "a database is replaced while a server has it");
        self.create();
    }

    /// Does these operations and hands back their results.
    pub fn transact(&self, operations: &[Value]) -> Value {
        transact(&self.remote(), self.schema, operations)
    }

    fn create(&self) {
        let path = self.database();
        if path.exists() {
            fs::remove_file(&path).unwrap_or_else(|e| panic!("remove {}: {e}", path.display()));
        }
        output_of(Command::new("ovsdb-tool").arg("create").args([&path, Path::new(self.schema.path)]));
    }

    fn address_in_cluster(&self) -> String {
        format!("unix:{}", self.path("raft").display())
    }

    fn database(&self) -> PathBuf {
        self.path("conf.db")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("stderr")).unwrap_or_default()
    }
}

/// Does these operations on the leader of these servers, which are separated by commas. A cluster may be about to choose
/// one.
pub fn transact(remotes: &str, schema: Schema, operations: &[Value]) -> Value {
    let mut request = vec![Value::from(schema.database)];
    request.extend_from_slice(operations);
    let request = Value::from(request).to_string();
    let mut last = String::new();
    let answer = wait::poll(PATIENCE, || {
        let mut client = Command::new("ovsdb-client");
        client.args(["--timeout=2", "transact", remotes, &request]);
        let output = client.output().unwrap_or_else(|e| panic!("run {client:?}: {e}"));
        last = String::from_utf8_lossy(&output.stderr).into_owned();
        output.status.success().then_some(output.stdout)
    });
    let answer = answer.unwrap_or_else(|| panic!("{request} was not done: {last}"));
    let results: Value = serde_json::from_slice(&answer)
        .unwrap_or_else(|e| panic!("{request}: {e}: {}", String::from_utf8_lossy(&answer)));
    let failed = results.as_array().is_none_or(|results| results.iter().any(|one| !one["error"].is_null()));
    assert!(!failed, "{request}: {results}");
    results
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
        if thread::panicking() {
            eprintln!("--- ovsdb-server said\n{}", self.log());
        }
    }
}
