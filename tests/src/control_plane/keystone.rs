//! Keystone, in uWSGI, on SQLite.
//!
//! It has one process because two would block each other. A worker that has issued a token keeps
//! the transaction in which it read the user, and thus its lock on the file (`/proc/locks`), until
//! its next request. A change requested from the other worker meanwhile cannot be committed and
//! fails after SQLite's five seconds with "database is locked". Keystone does not catch this error,
//! so uWSGI closes the connection without a response.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use super::prepared::let_readers_be;
use super::service::Service;
use super::{ADMIN, DATABASE_OPTIONS, PASSWORD, REGION, TOKEN_SECONDS, api, local, neutron, write};
use crate::netns::output_of;
use crate::topology::Host;

pub(super) const ADDRESS: (IpAddr, u16) = local(5000);
pub(super) const URL: &str = "http://127.0.0.1:5000/v3";

const FOLDER: &str = "keystone";
const DATABASE: &str = "keystone.db";

/// Returns a token of the administrator.
pub(super) fn token(host: &Host) -> String {
    let user = json!({ "name": ADMIN, "domain": { "name": "Default" }, "password": PASSWORD });
    let project = json!({ "name": ADMIN, "domain": { "name": "Default" } });
    let identity = json!({ "methods": ["password"], "password": { "user": user } });
    let body = json!({ "auth": { "identity": identity, "scope": { "project": project } } });
    let answer = api::call(host, ADDRESS, "POST", "/v3/auth/tokens", None, &body);
    answer.token.unwrap_or_else(|| panic!("Keystone returned no token: {}", answer.body))
}

#[derive(Debug)]
pub struct Keystone {
    service: Service,
    host: Host,
    folder: PathBuf,
}

impl Keystone {
    /// Creates the database and the keys that every installation starts with.
    pub(super) fn prepare(folder: &Path) {
        let folder = folder.join(FOLDER);
        fs::create_dir(&folder).unwrap_or_else(|e| panic!("make {}: {e}", folder.display()));
        write_config(&folder, TOKEN_SECONDS);
        manage(&folder, &["db_sync"]);
        make_keys(&folder);
        manage(
            &folder,
            &[
                "bootstrap",
                "--bootstrap-username",
                ADMIN,
                "--bootstrap-project-name",
                ADMIN,
                "--bootstrap-password",
                PASSWORD,
                "--bootstrap-region-id",
                REGION,
                "--bootstrap-internal-url",
                URL,
            ],
        );
        list_neutron(&folder);
        let_readers_be(&folder.join(DATABASE));
    }

    /// Completes a copy of what [`Self::prepare`] created.
    pub(super) fn install(host: &Host, folder: &Path, token_seconds: u32) -> Self {
        let folder = folder.join(FOLDER);
        write_config(&folder, token_seconds);
        let service = Service::new("keystone", host, ADDRESS, folder.join("log"));
        Self { service, host: host.clone(), folder }
    }

    /// Runs it and waits until it responds.
    pub fn start(&mut self) {
        let mut uwsgi = self.host.netns().command("/usr/bin/uwsgi");
        uwsgi
            .args(["--plugin", "python3", "--wsgi-file", "/usr/bin/keystone-wsgi-public", "--lazy-apps"])
            .args(["--http-socket", "127.0.0.1:5000", "--master", "--processes", "1"])
            .args(["--enable-threads", "--buffer-size", "65535"])
            // For clients that are slow to send. The default of four seconds is too short on a busy
            // machine.
            .args(["--socket-timeout", "60"])
            // uWSGI closes each connection without announcing it, and Neutron would try to reuse
            // it.
            .args(["--add-header", "Connection: close"])
            .args(["--log-format", "%(method) %(uri) %(status) %(uagent)"])
            .env("OS_KEYSTONE_CONFIG_FILES", config(&self.folder));
        self.service.start(uwsgi);
    }

    pub fn stop(&mut self) {
        self.service.stop();
    }

    /// Restarts it with other keys, so that all its tokens become invalid.
    pub fn forget_tokens(&mut self) {
        self.stop();
        let keys = self.folder.join("keys");
        fs::remove_dir_all(&keys).unwrap_or_else(|e| panic!("remove {}: {e}", keys.display()));
        make_keys(&self.folder);
        self.start();
    }

    /// Returns how many tokens agents have been issued.
    #[must_use]
    pub fn logins(&self) -> usize {
        self.service.log().matches("POST /v3/auth/tokens 201 metadata-agent/").count()
    }
}

fn config(folder: &Path) -> PathBuf {
    folder.join("keystone.conf")
}

fn write_config(folder: &Path, token_seconds: u32) {
    let at = folder.display();
    let text = format!(
        "[database]\nconnection = sqlite:///{base}\n{DATABASE_OPTIONS}\
         [identity]\npassword_hash_rounds = 4\n\
         [fernet_tokens]\nkey_repository = {at}/keys\n\
         [fernet_receipts]\nkey_repository = {at}/keys\n\
         [credential]\nkey_repository = {at}/keys\n\
         [token]\nprovider = fernet\nexpiration = {token_seconds}\n\
         [oslo_concurrency]\nlock_path = {at}\n",
        base = folder.join(DATABASE).display(),
    );
    write(&config(folder), &text);
}

fn manage(folder: &Path, arguments: &[&str]) {
    let mut manage = Command::new("/usr/bin/keystone-manage");
    output_of(manage.arg("--config-file").arg(config(folder)).args(arguments));
}

fn make_keys(folder: &Path) {
    let keys = folder.join("keys");
    let made = fs::DirBuilder::new().mode(0o700).create(&keys);
    made.unwrap_or_else(|e| panic!("make {}: {e}", keys.display()));
    manage(folder, &["fernet_setup", "--keystone-user", "root", "--keystone-group", "root"]);
}

/// Adds Neutron to the catalogue. `keystone-manage bootstrap` knows only one service, and the API
/// would need a running server.
fn list_neutron(folder: &Path) {
    let script = "import sqlite3, sys, uuid\n\
         base = sqlite3.connect(sys.argv[1])\n\
         service, endpoint = uuid.uuid4().hex, uuid.uuid4().hex\n\
         base.execute('INSERT INTO service (id, type, enabled, extra) VALUES (?, ?, 1, ?)',\n\
         \x20            (service, 'network', '{\"name\": \"neutron\"}'))\n\
         base.execute('INSERT INTO endpoint (id, interface, service_id, url, extra, enabled, region_id)'\n\
         \x20            ' VALUES (?, ?, ?, ?, ?, 1, ?)',\n\
         \x20            (endpoint, 'internal', service, sys.argv[2], '{}', sys.argv[3]))\n\
         base.commit()\n";
    let mut python = Command::new("/usr/bin/python3");
    output_of(python.args(["-c", script]).arg(folder.join(DATABASE)).args([neutron::URL, REGION]));
}
