//! The sources that the configuration asks for, each started as a task.

use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::Config;
use crate::inventory::{Event, SourceKind};
use crate::ovsdb::TlsFiles;
use crate::presence::Presence;
use crate::sources::neutron::{Channels, Lookup, Settings};
use crate::sources::{self, Reporter, SourceState};
use crate::vital::Vital;

/// What every source is given.
pub(super) struct Feeds<'a> {
    events: mpsc::Sender<Event>,
    present: watch::Receiver<Presence>,
    vital: &'a Vital,
    tasks: &'a TaskTracker,
    stop: &'a CancellationToken,
    states: Vec<watch::Receiver<SourceState>>,
}

impl<'a> Feeds<'a> {
    pub(super) fn new(
        events: mpsc::Sender<Event>,
        present: watch::Receiver<Presence>,
        vital: &'a Vital,
        tasks: &'a TaskTracker,
        stop: &'a CancellationToken,
    ) -> Self {
        Self { events, present, vital, tasks, stop, states: Vec::new() }
    }

    pub(super) fn start(&mut self, config: &Config) {
        self.static_file(config);
        self.ovsdb(config);
        self.libvirt(config);
        self.ovn(config);
        self.neutron(config);
    }

    /// Where the state of each can be read.
    pub(super) fn states(self) -> Vec<watch::Receiver<SourceState>> {
        self.states
    }

    fn reporter(&mut self, kind: SourceKind) -> Reporter {
        let (reporter, state) = Reporter::new(kind);
        self.states.push(state);
        reporter
    }

    fn static_file(&mut self, config: &Config) {
        let Some(file) = config.static_inventory.clone() else { return };
        let reporter = self.reporter(SourceKind::StaticFile);
        let source = sources::static_file::run(file, self.events.clone(), reporter, self.stop.clone());
        self.tasks.spawn(self.vital.task("the source static_inventory", source));
    }

    fn ovsdb(&mut self, config: &Config) {
        let access = sources::ovsdb::Access {
            connection: config.ovsdb_connection.clone(),
            tls: TlsFiles {
                private_key: config.ovs_ssl_key_file.clone(),
                certificate: config.ovs_ssl_cert_file.clone(),
                authorities: config.ovs_ssl_ca_cert_file.clone(),
            },
            patience: config.ovsdb_connection_timeout,
        };
        let reporter = self.reporter(SourceKind::Ovsdb);
        let source = sources::ovsdb::run(access, self.events.clone(), reporter, self.stop.clone());
        self.tasks.spawn(self.vital.task("the source ovsdb", source));
    }

    fn libvirt(&mut self, config: &Config) {
        let Some(directory) = config.libvirt_dir.clone() else { return };
        let reporter = self.reporter(SourceKind::Libvirt);
        let source = sources::libvirt::run(directory, self.events.clone(), reporter, self.stop.clone());
        self.tasks.spawn(self.vital.task("the source libvirt", source));
    }

    fn ovn(&mut self, config: &Config) {
        let Some(servers) = config.ovn_southbound() else { return };
        let probe = Duration::from_millis(config.ovn_ovsdb_probe_interval.into());
        let access = sources::ovn::Access {
            servers: servers.to_vec(),
            tls: TlsFiles {
                private_key: config.ovn_sb_private_key.clone(),
                certificate: config.ovn_sb_certificate.clone(),
                authorities: config.ovn_sb_ca_cert.clone(),
            },
            patience: config.ovn_ovsdb_connection_timeout,
            longest_pause: config.ovn_ovsdb_retry_max_interval,
            probe: (!probe.is_zero()).then_some(probe),
        };
        let reporter = self.reporter(SourceKind::OvnSouthbound);
        let (present, events) = (self.present.clone(), self.events.clone());
        let source = sources::ovn::run(access, present, events, reporter, self.stop.clone());
        self.tasks.spawn(self.vital.task("the source ovn_southbound", source));
    }

    fn neutron(&mut self, config: &Config) {
        let Some(access) = config.neutron().cloned() else { return };
        let settings = Settings { access, host: config.host_name(), tasks: self.tasks.clone() };
        let (lookup, questions) = Lookup::new();
        let channels = Channels {
            present: self.present.clone(),
            events: self.events.clone(),
            reporter: self.reporter(SourceKind::Neutron),
            questions,
            lookup,
        };
        let source = sources::neutron::run(settings, channels, self.stop.clone());
        self.tasks.spawn(self.vital.task("the source neutron", source));
    }
}
