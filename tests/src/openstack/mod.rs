//! The real servers behind Neutron's metadata agent, as Debian packages them: MariaDB, RabbitMQ,
//! neutron-server and nova-api-metadata. Networks, ports and instances are created through their
//! own objects.
//!
//! Everything is in one namespace and one folder, which are removed with the value. Nova and
//! Neutron run without authentication.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::thread;

use metadata_agent::ids::NetworkId;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::netns::Netns;
use crate::port::Port;

mod agent;
mod mariadb;
mod neutron;
mod nova;
mod process;
mod rabbitmq;

pub use agent::{MetadataAgent, MetadataAgentOptions};

use mariadb::MariaDb;
use neutron::Neutron;
use nova::Nova;
use rabbitmq::RabbitMq;

/// Debian's Python, for its packages of the servers.
const PYTHON: &str = "/usr/bin/python3";
/// Files that identify the installed packages, and the names of these packages.
const SIGNS: [(&str, &str); 5] = [
    ("/usr/sbin/mariadbd", "mariadb-server"),
    ("/usr/lib/rabbitmq/bin/rabbitmq-server", "rabbitmq-server"),
    ("/usr/bin/neutron-server", "neutron-server"),
    ("/usr/bin/nova-metadata-wsgi", "nova-api"),
    ("/usr/lib/python3/dist-packages/pymysql/__init__.py", "python3-pymysql"),
];

/// All servers, running. Fields are in drop order.
#[derive(Debug)]
pub struct OpenStack {
    nova: Nova,
    neutron: Neutron,
    rabbit: RabbitMq,
    maria: MariaDb,
    folder: TempDir,
}

impl OpenStack {
    /// The port of nova-api-metadata, on every address of the namespace.
    pub const NOVA_PORT: u16 = nova::PORT;

    /// Returns the first Debian package that is not installed.
    #[must_use]
    pub fn missing() -> Option<&'static str> {
        SIGNS.iter().find(|(file, _)| !Path::new(file).is_file()).map(|(_, package)| *package)
    }

    /// Installs and starts the servers in this namespace. Nova has this number of processes and
    /// this secret.
    #[must_use]
    pub fn start(netns: &Netns, nova_processes: usize, secret: &str) -> Self {
        let folder = tempfile::Builder::new().prefix("openstack-").tempdir();
        let folder = folder.unwrap_or_else(|e| panic!("create a folder for OpenStack: {e}"));
        let at = folder.path();
        let databases: Vec<_> = [neutron::DATABASE].into_iter().chain(nova::DATABASES).collect();
        let maria = MariaDb::start(at, &databases);
        let (rabbit, neutron, nova) = thread::scope(|scope| {
            let neutron = scope.spawn(|| neutron::Installed::new(at, &maria));
            let nova = scope.spawn(|| nova::Installed::new(at, &maria, secret));
            (RabbitMq::start(netns, at), joined(neutron.join()), joined(nova.join()))
        });
        let (neutron, nova) = thread::scope(|scope| {
            let neutron = scope.spawn(|| neutron.start(netns));
            (joined(neutron.join()), nova.start(netns, nova_processes))
        });
        Self { nova, neutron, rabbit, maria, folder }
    }

    /// Creates these networks with the CIDR 10.0.0.0/24, each with a router with the same id at its
    /// gateway, and these ports with their instances.
    pub fn add<'a>(
        &self,
        networks: impl IntoIterator<Item = NetworkId>,
        ports: impl IntoIterator<Item = &'a Port>,
    ) {
        let ports: Vec<_> = ports.into_iter().collect();
        let network = |id: NetworkId| {
            let on_it = ports.iter().filter(|port| port.network == id).map(|port| record(port));
            json!({ "id": id, "gateway": GATEWAY, "cidr": CIDR, "ports": on_it.collect::<Vec<_>>() })
        };
        let records: Vec<_> = networks.into_iter().map(network).collect();
        let path = self.folder.path().join("records.json");
        write(&path, &json!(records).to_string());
        self.neutron.add(&path);
        self.nova.add(&path);
    }

    /// Returns the processes that handle a query of Neutron's metadata agent.
    #[must_use]
    pub fn asked_by_neutron(&self) -> Vec<u32> {
        [vec![self.maria.pid(), self.rabbit.pid()], self.neutron.processes()].concat()
    }

    /// Returns the processes of Nova.
    #[must_use]
    pub fn nova(&self) -> Vec<u32> {
        self.nova.processes()
    }
}

/// The CIDR of every network of the rig.
const CIDR: &str = "10.0.0.0/24";
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);

fn record(port: &Port) -> Value {
    json!({
        "id": port.id,
        "tap": port.tap(),
        "mac": port.mac,
        "address": port.ipv4(),
        "instance": port.instance,
        "project": port.project,
    })
}

fn local(port: u16) -> SocketAddr {
    (IpAddr::V4(Ipv4Addr::LOCALHOST), port).into()
}

fn write(path: &Path, text: &str) {
    fs::write(path, text).unwrap_or_else(|e| panic!("write {}: {e}", path.display()));
}

fn joined<T>(thread: thread::Result<T>) -> T {
    thread.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
