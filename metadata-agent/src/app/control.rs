//! Components that run from the beginning to the end: sources, inventory and admin socket.

use std::io;
use std::sync::Arc;

use prometheus_client::registry::Registry;
use tokio::sync::{broadcast, mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::warn;

use super::TASK_END;
use super::reload::LiveSettings;
use super::source_tasks::{SourceHandles, SourceTasks};
use crate::admin::AdminSocket;
use crate::admin::readiness::{Readiness, Startup, StartupStep};
use crate::admin::state::{AgentState, Liveness, Running};
use crate::config::Config;
use crate::data_path_probe::ProbeReports;
use crate::data_plane::{LastBeat, Restarts};
use crate::inventory::Inventory;
use crate::inventory::presence::Presence;
use crate::inventory::refused::{self, RefusedSource};
use crate::net::damage::DamageReports;
use crate::process::progress::Progress;
use crate::process::supervisor::CriticalTasks;
use crate::proxy::metrics::MetricsTotals;

/// Limit of events from sources that wait for the inventory.
const EVENT_QUEUE: usize = 1024;

/// The running components.
pub(super) struct Control {
    pub(super) critical: CriticalTasks,
    pub(super) tasks: TaskTracker,
    /// Cancels every task of this struct.
    pub(super) stop: CancellationToken,
    /// Readiness waits for this step until guests are served.
    pub(super) guest_interfaces: Option<StartupStep>,
    pub(super) readiness: Readiness,
    pub(super) damage: DamageReports,
    pub(super) last_beat: LastBeat,
    pub(super) restarts: Restarts,
    /// Published for the admin socket while guests are served.
    pub(super) running: watch::Sender<Option<Running>>,
    pub(super) live: LiveSettings,
    /// The attaching of guest interfaces at the start.
    pub(super) progress: Progress,
    /// The state that the admin socket shows.
    pub(super) state: Arc<AgentState>,
    admin: JoinHandle<io::Result<()>>,
}

/// Inputs of the guest service.
pub(super) struct Inputs {
    pub(super) inventory: Arc<Inventory>,
    pub(super) presence: watch::Sender<Presence>,
    pub(super) sources: SourceHandles,
    /// Reports refused sources to the sources of ports.
    pub(super) refused: broadcast::Sender<RefusedSource>,
    pub(super) metrics: Arc<MetricsTotals>,
    /// Readiness waits for this step until the first scan of namespaces, if any are to be served.
    pub(super) namespaces: Option<StartupStep>,
}

impl Control {
    /// Starts all components. The inputs are for the guest service.
    pub(super) fn start(config: &Config, admin_socket: AdminSocket, live: LiveSettings) -> (Self, Inputs) {
        let (critical, tasks) = (CriticalTasks::default(), TaskTracker::new());
        let stop = CancellationToken::new();
        let startup = Startup::default();
        let guest_interfaces = Some(startup.step("guest interfaces"));
        let namespaces = config.namespaces.is_some().then(|| startup.step("namespaces"));

        let refused = refused::channel();
        let (inventory, presence, sources) = start_sources(config, &refused, &critical, &tasks, &stop);

        // The admin socket and the state that it shows.
        let mut registry = Registry::default();
        let metrics = MetricsTotals::register(&mut registry);
        let (last_beat, restarts) = (LastBeat::default(), Restarts::default());
        let damage = DamageReports::default();
        let probes = match config.probe_interval() {
            Some(_) => ProbeReports::enabled(),
            None => ProbeReports::default(),
        };
        let readiness = Readiness::new(startup, sources.states.clone(), damage.clone(), probes);
        let (running, running_now) = watch::channel(None);
        let state = AgentState::new(
            live.shown.subscribe(),
            readiness.clone(),
            Liveness { last_beat: last_beat.clone(), stale_after: config.heartbeat_stale_after },
            Arc::clone(&inventory),
            sources.states.clone(),
            registry,
            running_now,
        );
        let state = Arc::new(state);
        let serving = admin_socket.serve(Arc::<AgentState>::clone(&state), damage.clone(), stop.clone());
        let admin = tasks.spawn(critical.task("the admin socket", serving));

        let control = Self {
            critical,
            tasks,
            stop,
            guest_interfaces,
            readiness,
            damage,
            last_beat,
            restarts,
            running,
            live,
            progress: Progress::default(),
            state,
            admin,
        };
        (control, Inputs { inventory, presence, sources, refused, metrics, namespaces })
    }

    /// Asks every task to stop.
    pub(super) fn stop(&self) {
        self.running.send_replace(None);
        self.stop.cancel();
    }

    /// Waits until every task has ended.
    pub(super) async fn end(self) {
        if let Ok(Err(error)) = self.admin.await {
            warn!(%error, "admin socket failed");
        }
        self.tasks.close();
        if timeout(TASK_END, self.tasks.wait()).await.is_err() {
            warn!("a task did not end in time");
        }
    }
}

/// Starts the sources and the inventory that they feed.
fn start_sources(
    config: &Config,
    refused: &broadcast::Sender<RefusedSource>,
    critical: &CriticalTasks,
    tasks: &TaskTracker,
    stop: &CancellationToken,
) -> (Arc<Inventory>, watch::Sender<Presence>, SourceHandles) {
    let (inventory, publisher) = Inventory::new();
    let (events, event_queue) = mpsc::channel(EVENT_QUEUE);
    let (presence, present) = watch::channel(Presence::default());
    let sources = SourceTasks::new(events, present, refused, critical, tasks, stop).start(config);
    tasks.spawn(critical.task("the inventory", publisher.run(event_queue, stop.clone())));
    (inventory, presence, sources)
}
