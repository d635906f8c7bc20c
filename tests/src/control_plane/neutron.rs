//! neutron-server with ML2, on SQLite. Trunks need a mechanism driver, so it has the one for Open
//! vSwitch, without an agent. It does not look for a DHCP agent, which would slow down the creation
//! of each port.
//!
//! The schema is created from Neutron's models because SQLite cannot run its migrations.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use super::prepared::let_readers_be;
use super::service::Service;
use super::{ADMIN, DATABASE_OPTIONS, PASSWORD, api, keystone, local, write};
use crate::netns::output_of;
use crate::topology::Host;

pub(super) const ADDRESS: (IpAddr, u16) = local(9696);
pub(super) const URL: &str = "http://127.0.0.1:9696";

const FOLDER: &str = "neutron";
const DATABASE: &str = "neutron.db";

const SCHEMA: &str = "import sys, sqlalchemy\n\
    from neutron.db.migration.models import head\n\
    engine = sqlalchemy.create_engine(sys.argv[1])\n\
    at_once = lambda connection, _: connection.execute('PRAGMA synchronous = OFF')\n\
    sqlalchemy.event.listen(engine, 'connect', at_once)\n\
    head.get_metadata().create_all(engine)\n";

#[derive(Debug)]
pub struct Neutron {
    service: Service,
    host: Host,
    folder: PathBuf,
}

impl Neutron {
    /// Creates the database that every installation starts with.
    pub(super) fn prepare(folder: &Path) {
        let folder = folder.join(FOLDER);
        fs::create_dir(&folder).unwrap_or_else(|e| panic!("make {}: {e}", folder.display()));
        let file = folder.join(DATABASE);
        output_of(Command::new("/usr/bin/python3").args(["-c", SCHEMA, &url(&file)]));
        let_readers_be(&file);
    }

    /// Completes a copy of what [`Self::prepare`] created.
    pub(super) fn install(host: &Host, folder: &Path) -> Self {
        let folder = folder.join(FOLDER);
        let empty = folder.join("conf.d");
        fs::create_dir(&empty).unwrap_or_else(|e| panic!("make {}: {e}", empty.display()));
        let at = folder.display();
        let database = url(&folder.join(DATABASE));
        let config = format!(
            "[DEFAULT]\nbind_host = 127.0.0.1\nbind_port = 9696\ncore_plugin = ml2\nservice_plugins = router,trunk\n\
             auth_strategy = keystone\ntransport_url = fake:/\napi_workers = 0\nrpc_workers = 0\nstate_path = {at}\n\
             notify_nova_on_port_status_changes = false\nnotify_nova_on_port_data_changes = false\n\
             dhcp_agent_notification = false\n\
             [database]\nconnection = {database}\n{DATABASE_OPTIONS}\
             [oslo_concurrency]\nlock_path = {at}\n\
             [ml2]\ntype_drivers = local\ntenant_network_types = local\nmechanism_drivers = openvswitch\nextension_drivers = port_security\n\
             [quotas]\nquota_network = -1\nquota_subnet = -1\nquota_port = -1\n\
             [keystone_authtoken]\nauth_url = {keystone}\nwww_authenticate_uri = {keystone}\nauth_type = password\n\
             username = {ADMIN}\npassword = {PASSWORD}\nproject_name = {ADMIN}\nuser_domain_name = Default\n\
             project_domain_name = Default\ninterface = internal\ntoken_cache_time = -1\n",
            keystone = keystone::URL,
        );
        write(&folder.join("neutron.conf"), &config);
        let service = Service::new("neutron-server", host, ADDRESS, folder.join("log"));
        Self { service, host: host.clone(), folder }
    }

    /// Runs it and waits until it responds. Keystone must be running.
    pub fn start(&mut self) {
        self.run();
        self.warm_up();
    }

    /// Runs it and waits until it responds, with or without Keystone.
    pub(super) fn run(&mut self) {
        let mut server = self.host.netns().command("/usr/bin/neutron-server");
        server.arg("--config-file").arg(self.folder.join("neutron.conf"));
        server.arg("--config-dir").arg(self.folder.join("conf.d"));
        self.service.start(server);
    }

    /// Sends a first query. In Zed, every query for ports is answered with 500 until something else
    /// has been queried: `get_ports` uses `Port.port_forwardings`, which SQLAlchemy adds with its
    /// first query.
    pub(super) fn warm_up(&self) {
        let token = keystone::token(&self.host);
        api::call(&self.host, ADDRESS, "GET", "/v2.0/networks?limit=1", Some(&token), &Value::Null);
    }

    pub fn stop(&mut self) {
        self.service.stop();
    }

    /// Returns the status of each response to a query for ports, in order.
    #[must_use]
    pub fn port_questions(&self) -> Vec<u16> {
        let log = self.service.log();
        let asked =
            log.lines().filter(|line| line.contains("neutron.wsgi") && line.contains("\"GET /v2.0/ports?"));
        let status = |line: &str| line.split_once(" status: ")?.1.get(..3)?.parse().ok();
        asked.filter_map(status).collect()
    }

    /// Returns the largest number of addresses that one query for ports names.
    #[must_use]
    pub fn most_addresses_in_a_query(&self) -> usize {
        let log = self.service.log();
        let queries = log.lines().filter(|line| line.contains("\"GET /v2.0/ports?"));
        queries.map(|line| line.matches("fixed_ips=ip_address").count()).max().unwrap_or_default()
    }
}

fn url(database: &Path) -> String {
    format!("sqlite:///{}", database.display())
}
