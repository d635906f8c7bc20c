//! The real `ovsdb-server` with a database of any schema, standalone or as a member of a cluster.
//!
//! Data are written with its own `ovsdb-client`. A database that the machine may run is not
//! touched: this value owns its files, sockets and process, which end with it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;

use serde_json::Value;
use tempfile::TempDir;

use crate::netns::{Netns, output_of};
use crate::wait::{self, PATIENCE};

/// A schema and the name of its database.
#[derive(Clone, Copy, Debug)]
pub struct Schema {
    pub path: &'static str,
    pub database: &'static str,
}

/// A database and its server, if it runs.
#[derive(Debug)]
pub struct Server {
    schema: Schema,
    folder: TempDir,
    options: Vec<String>,
    process: Option<Child>,
}

impl Server {
    /// Creates an empty database without starting its server.
    #[must_use]
    pub fn alone(schema: Schema) -> Self {
        let server = Self::without_database(schema);
        server.create();
        server
    }

    /// Starts the members of a cluster.
    #[must_use]
    pub fn cluster(schema: Schema, size: usize) -> Vec<Self> {
        let mut members: Vec<Self> = Vec::new();
        for _ in 0..size {
            let mut member = Self::without_database(schema);
            let (database, own) = (member.database(), member.address_in_cluster());
            let mut tool = Command::new("/usr/bin/ovsdb-tool");
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
        let folder = folder.unwrap_or_else(|e| panic!("create a folder for a database: {e}"));
        Self { schema, folder, options: Vec::new(), process: None }
    }

    /// Adds an option to the server, such as a remote to listen on. It applies from the next start.
    pub fn set(&mut self, option: String) {
        self.options.push(option);
    }

    /// Returns the server's address for the options of an agent.
    #[must_use]
    pub fn remote(&self) -> String {
        format!("unix:{}", self.socket().display())
    }

    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.path("db.sock")
    }

    /// Returns true between start and stop.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.process.is_some()
    }

    /// Serves the database. All listeners besides its socket are in the namespace.
    pub fn start(&mut self, netns: Option<&Netns>) {
        let log =
            File::create(self.path("stderr")).unwrap_or_else(|e| panic!("create the server's log: {e}"));
        let program = "/usr/sbin/ovsdb-server";
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
            let mut wait = Command::new("/usr/bin/ovsdb-client");
            wait.args(["wait", &self.remote(), self.schema.database, "connected"]);
            wait.arg("--timeout=1").output().ok()?.status.success().then_some(())
        });
        serves.unwrap_or_else(|| panic!("ovsdb-server does not serve\n{}", self.log()));
    }

    pub fn stop(&mut self) {
        let Some(mut process) = self.process.take() else { return };
        if let Err(e) = process.kill().and_then(|()| process.wait()) {
            eprintln!("kill ovsdb-server: {e}");
        }
    }

    /// Empties the database while its server is stopped.
    pub fn replace(&mut self) {
        assert!(self.process.is_none(), "a database is replaced while a server has it");
        self.create();
    }

    /// Executes these operations and returns their results.
    pub fn transact(&self, operations: &[Value]) -> Value {
        transact(&self.remote(), self.schema, operations)
    }

    fn create(&self) {
        let path = self.database();
        if path.exists() {
            fs::remove_file(&path).unwrap_or_else(|e| panic!("remove {}: {e}", path.display()));
        }
        output_of(
            Command::new("/usr/bin/ovsdb-tool").arg("create").args([&path, Path::new(self.schema.path)]),
        );
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

/// Executes these operations on the leader of these servers, separated by commas. Retries while a
/// cluster elects its leader.
pub fn transact(remotes: &str, schema: Schema, operations: &[Value]) -> Value {
    let mut request = vec![Value::from(schema.database)];
    request.extend_from_slice(operations);
    let request = Value::from(request).to_string();
    let mut last = String::new();
    let answer = wait::poll(PATIENCE, || {
        let mut client = Command::new("/usr/bin/ovsdb-client");
        client.args(["--timeout=2", "transact", remotes, &request]);
        let output = client.output().unwrap_or_else(|e| panic!("run {client:?}: {e}"));
        last = String::from_utf8_lossy(&output.stderr).into_owned();
        output.status.success().then_some(output.stdout)
    });
    let answer = answer.unwrap_or_else(|| panic!("{request} failed: {last}"));
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
            eprintln!("--- output of ovsdb-server\n{}", self.log());
        }
    }
}
