//! Starts each configured source as a task.

use tokio::sync::{broadcast, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::Config;
use crate::inventory::presence::Presence;
use crate::inventory::refused::RefusedSource;
use crate::inventory::{Event, SourceKind};
use crate::process::supervisor::CriticalTasks;
use crate::sources::neutron::{Lookup, NeutronChannels};
use crate::sources::{self, Reporter, SourceState};

/// Inputs of every source.
pub(super) struct SourceTasks<'a> {
    events: mpsc::Sender<Event>,
    present: watch::Receiver<Presence>,
    refused: &'a broadcast::Sender<RefusedSource>,
    critical: &'a CriticalTasks,
    tasks: &'a TaskTracker,
    stop: &'a CancellationToken,
    handles: SourceHandles,
}

/// Handles of running sources.
#[derive(Clone, Debug, Default)]
pub(super) struct SourceHandles {
    pub(super) states: Vec<watch::Receiver<SourceState>>,
    /// Looks up guests of other hosts in Neutron.
    pub(super) lookup: Option<Lookup>,
}

impl<'a> SourceTasks<'a> {
    pub(super) fn new(
        events: mpsc::Sender<Event>,
        present: watch::Receiver<Presence>,
        refused: &'a broadcast::Sender<RefusedSource>,
        critical: &'a CriticalTasks,
        tasks: &'a TaskTracker,
        stop: &'a CancellationToken,
    ) -> Self {
        Self { events, present, refused, critical, tasks, stop, handles: SourceHandles::default() }
    }

    /// Starts the sources that are configured.
    pub(super) fn start(mut self, config: &Config) -> SourceHandles {
        self.static_file(config);
        self.ovsdb(config);
        self.libvirt(config);
        self.ovn(config);
        self.neutron(config);
        self.handles
    }

    fn reporter(&mut self, kind: SourceKind) -> Reporter {
        let (reporter, state) = Reporter::new(kind);
        self.handles.states.push(state);
        reporter
    }

    fn static_file(&mut self, config: &Config) {
        let Some(file) = config.static_inventory.clone() else { return };
        let reporter = self.reporter(SourceKind::StaticFile);
        let source = sources::static_file::run(file, self.events.clone(), reporter, self.stop.clone());
        self.tasks.spawn(self.critical.task("the source static_inventory", source));
    }

    fn ovsdb(&mut self, config: &Config) {
        let reporter = self.reporter(SourceKind::Ovsdb);
        let source =
            sources::ovsdb::run(config.open_vswitch(), self.events.clone(), reporter, self.stop.clone());
        self.tasks.spawn(self.critical.task("the source ovsdb", source));
    }

    fn libvirt(&mut self, config: &Config) {
        let Some(directory) = config.libvirt() else { return };
        let reporter = self.reporter(SourceKind::Libvirt);
        let source = sources::libvirt::run(directory, self.events.clone(), reporter, self.stop.clone());
        self.tasks.spawn(self.critical.task("the source libvirt", source));
    }

    fn ovn(&mut self, config: &Config) {
        let Some(access) = config.ovn() else { return };
        let reporter = self.reporter(SourceKind::OvnSouthbound);
        let (present, events) = (self.present.clone(), self.events.clone());
        let source = sources::ovn::run(access, present, events, reporter, self.stop.clone());
        self.tasks.spawn(self.critical.task("the source ovn_southbound", source));
    }

    fn neutron(&mut self, config: &Config) {
        let Some(settings) = config.neutron_source(self.tasks.clone()) else { return };
        let (lookup, requests) = Lookup::new();
        self.handles.lookup = Some(lookup.clone());
        let channels = NeutronChannels {
            present: self.present.clone(),
            refused: self.refused.subscribe(),
            events: self.events.clone(),
            reporter: self.reporter(SourceKind::Neutron),
            requests,
            lookup,
        };
        let source = sources::neutron::run(settings, channels, self.stop.clone());
        self.tasks.spawn(self.critical.task("the source neutron", source));
    }
}
