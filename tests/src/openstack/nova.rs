//! nova-api-metadata in uWSGI, with one cell and the same Neutron.

use std::fs;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::mariadb::MariaDb;
use super::process::Process;
use super::{PYTHON, local, neutron, write};
use crate::netns::{Netns, output_of};

pub(super) const PORT: u16 = 8775;
pub(super) const DATABASES: [&str; 3] = ["nova_api", "nova", "nova_cell0"];
const RECORDS: &str = include_str!("nova_records.py");

/// The configuration and the databases.
#[derive(Debug)]
pub(super) struct Installed {
    folder: PathBuf,
}

#[derive(Debug)]
pub(super) struct Nova {
    process: Process,
    installed: Installed,
}

impl Installed {
    /// Runs all migrations and creates a cell.
    pub(super) fn new(folder: &Path, database: &MariaDb, secret: &str) -> Self {
        let folder = folder.join("nova");
        fs::create_dir(&folder).unwrap_or_else(|e| panic!("make {}: {e}", folder.display()));
        let at = folder.display();
        let [api, cell, cell0] = DATABASES.map(|name| database.url(name));
        let text = format!(
            "[DEFAULT]\ntransport_url = fake:/\nstate_path = {at}\n\
             [api_database]\nconnection = {api}\n\
             [database]\nconnection = {cell}\n\
             [oslo_concurrency]\nlock_path = {at}\n\
             [neutron]\nservice_metadata_proxy = true\nmetadata_proxy_shared_secret = {secret}\n\
             auth_type = none\nendpoint_override = http://127.0.0.1:{}\n",
            neutron::PORT,
        );
        let nova = Self { folder };
        write(&nova.config(), &text);
        write(&nova.records(), RECORDS);
        // Nova looks for it beside the configuration.
        let paste = nova.folder.join("api-paste.ini");
        fs::copy("/etc/nova/api-paste.ini", &paste)
            .unwrap_or_else(|e| panic!("make {}: {e}", paste.display()));
        nova.manage(&["api_db", "sync"]);
        nova.manage(&["cell_v2", "map_cell0", "--database_connection", &cell0]);
        nova.manage(&["db", "sync"]);
        nova.manage(&["cell_v2", "create_cell", "--name", "cell1"]);
        nova
    }

    pub(super) fn start(self, netns: &Netns, processes: usize) -> Nova {
        let mut uwsgi = netns.command("/usr/bin/uwsgi");
        uwsgi
            .args(["--plugin", "python3", "--wsgi-file", "/usr/bin/nova-metadata-wsgi", "--lazy-apps"])
            .args(["--http-socket", &format!(":{PORT}"), "--master", "--processes", &processes.to_string()])
            // These are the options of the package.
            .args(["--enable-threads", "--thunder-lock", "--buffer-size", "65535"])
            .args(["--listen", "100", "--rem-header", "Content-Length"])
            // uWSGI closes each connection without announcing it.
            .args(["--add-header", "Connection: close"])
            .env("OS_NOVA_CONFIG_DIR", &self.folder);
        let log = self.folder.join("log");
        // The socket exists long before each worker has loaded its application.
        let ready = || {
            let log = fs::read_to_string(&log).unwrap_or_default();
            log.matches("WSGI app 0 (mountpoint='') ready").count() == processes
                && netns.enter(|| TcpStream::connect(local(PORT)).is_ok())
        };
        let process = Process::start("nova-api-metadata", uwsgi, log.clone(), ready);
        Nova { process, installed: self }
    }

    fn config(&self) -> PathBuf {
        self.folder.join("nova.conf")
    }

    fn records(&self) -> PathBuf {
        self.folder.join("records.py")
    }

    fn manage(&self, arguments: &[&str]) {
        let mut manage = Command::new("/usr/bin/nova-manage");
        output_of(manage.arg("--config-file").arg(self.config()).args(arguments));
    }
}

impl Nova {
    /// Creates instances from the records in this file.
    pub(super) fn add(&self, records: &Path) {
        let mut make = Command::new(PYTHON);
        output_of(make.arg(self.installed.records()).arg(self.installed.config()).arg(records));
    }

    pub(super) fn processes(&self) -> Vec<u32> {
        self.process.with_children()
    }
}
