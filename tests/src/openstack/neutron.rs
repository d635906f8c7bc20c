//! neutron-server as its package runs it, with ML2 and a router service but without authentication.

use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::mariadb::MariaDb;
use super::process::Process;
use super::{PYTHON, local, rabbitmq, write};
use crate::netns::{Netns, output_of};

pub(super) const PORT: u16 = 9696;
pub(super) const DATABASE: &str = "neutron";
const RECORDS: &str = include_str!("neutron_records.py");

/// The configuration and the database.
#[derive(Debug)]
pub(super) struct Installed {
    config: PathBuf,
    records: PathBuf,
    folder: PathBuf,
}

#[derive(Debug)]
pub(super) struct Neutron {
    process: Process,
    installed: Installed,
}

impl Installed {
    /// Runs all migrations.
    pub(super) fn new(folder: &Path, database: &MariaDb) -> Self {
        let folder = folder.join("neutron");
        std::fs::create_dir(&folder).unwrap_or_else(|e| panic!("make {}: {e}", folder.display()));
        let (config, records) = (folder.join("neutron.conf"), folder.join("records.py"));
        let at = folder.display();
        let text = format!(
            "[DEFAULT]\nbind_host = 127.0.0.1\nbind_port = {PORT}\ncore_plugin = ml2\nservice_plugins = router\n\
             auth_strategy = noauth\nstate_path = {at}\n\
             transport_url = rabbit://guest:guest@127.0.0.1:{}/\n\
             notify_nova_on_port_status_changes = false\nnotify_nova_on_port_data_changes = false\n\
             [database]\nconnection = {}\n\
             [oslo_concurrency]\nlock_path = {at}\n\
             [ml2]\nmechanism_drivers = openvswitch\n",
            rabbitmq::PORT,
            database.url(DATABASE),
        );
        write(&config, &text);
        write(&records, RECORDS);
        let mut migrate = Command::new("/usr/bin/neutron-db-manage");
        output_of(migrate.arg("--config-file").arg(&config).args(["upgrade", "heads"]));
        Self { config, records, folder }
    }

    /// Runs the server. RabbitMQ must be running.
    pub(super) fn start(self, netns: &Netns) -> Neutron {
        let mut server = netns.command("/usr/bin/neutron-server");
        // Otherwise the package's configuration would be read as well.
        server.arg("--config-file").arg(&self.config).arg("--config-dir").arg(&self.folder);
        let listens = || netns.enter(|| TcpStream::connect(local(PORT)).is_ok());
        let process = Process::start("neutron-server", server, self.folder.join("log"), listens);
        Neutron { process, installed: self }
    }
}

impl Neutron {
    /// Creates networks, routers and ports from the records in this file.
    pub(super) fn add(&self, records: &Path) {
        let mut make = Command::new(PYTHON);
        output_of(make.arg(&self.installed.records).arg(&self.installed.config).arg(records));
    }

    pub(super) fn processes(&self) -> Vec<u32> {
        self.process.with_children()
    }
}
