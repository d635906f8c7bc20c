//! `metadata-agent run`: all wiring, and the order in which things start and stop.
//!
//! Two runtimes. The control runtime, on the main thread, runs sources, inventory, attachments and the admin socket; the data
//! runtime runs the proxy and the heartbeat. A scrape or a slow source never delays a guest.

mod data_plane;
mod feeds;
mod haproxies;
mod systemd;

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use metadata_ebpf::identity::ClientAddress;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use prometheus_client::registry::Registry;
use serde_json::json;
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use crate::admin::logging;
use crate::admin::state::{Liveness, Overview, Running, Startup};
use crate::admin::{AdminSocket, AdminState};
use crate::attach::Guests;
use crate::commands::detach;
use crate::config::Config;
use crate::datapath::heartbeat::{self, LastBeat};
use crate::datapath::{Counters, Datapath, Hook, PortalLink};
use crate::directory::clients::{HostLookup, InventoryLookup, NeutronLookup};
use crate::directory::presence::Presence;
use crate::directory::{ClientDirectory, Directory};
use crate::ids::MacAddress;
use crate::inventory::Inventory;
use crate::namespaces::{Namespaces, Tallies};
use crate::net::netlink::{self, Netlink};
use crate::net::portal::{self, Portal};
use crate::process::capabilities;
use crate::process::supervisor::CriticalTasks;
use crate::proxy::UpstreamAuth;
use crate::proxy::metrics::Metrics;
use crate::secrets::SecretFiles;
use data_plane::DataPlane;
use feeds::{SourceHandles, SourceTasks};
use haproxies::HaproxySocket;
use systemd::{feed_watchdog, notify};

/// Events that sources may be ahead of the inventory.
const EVENT_QUEUE: usize = 1024;
/// The step of the start that readiness waits for.
const GUEST_INTERFACES: &str = "guest interfaces";
/// The same, where there are any to serve.
const NAMESPACES: &str = "namespaces";
/// How long tasks may take to end once nothing keeps them.
const END: Duration = Duration::from_secs(5);

/// Serves until SIGTERM or SIGINT, then leaves the host as it was.
///
/// # Errors
/// What keeps the agent from serving: another agent, missing rights, a kernel that refuses.
pub fn run(config: &Config) -> Result<()> {
    logging::init(config.debug, config.log_format)?;
    for warning in config.warnings() {
        warn!("{warning}");
    }
    for notice in config.notices() {
        if notice.is_warning() { warn!("{notice}") } else { info!("{notice}") }
    }
    capabilities::require(&capabilities::TO_RUN)?;
    raise_descriptor_limit();
    let data = data_runtime(config)?;
    let control = Builder::new_current_thread().enable_all().build().context("start the control runtime")?;
    let served = control.block_on(serve(config, &data));
    data.shutdown_timeout(END);
    served
}

/// Each connection of a guest takes a descriptor or two, and the usual soft limit is 1024.
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        warn!(%error, "the limit of open files stays as it is");
    }
}

fn data_runtime(config: &Config) -> Result<Runtime> {
    let mut builder = Builder::new_multi_thread();
    if let Some(workers) = config.metadata_workers {
        builder.worker_threads(workers.get() as usize);
    }
    builder.enable_all().thread_name("md-data").build().context("start the data runtime")
}

async fn serve(config: &Config, data: &Runtime) -> Result<()> {
    // First of all: two agents must not work on one host unawares, and from here on a signal ends things in order.
    let admin_socket = AdminSocket::bind(&config.admin_socket)?;
    let mut signals = StopSignals::watch()?;
    let mut vital = CriticalTasks::default();
    let stop = CancellationToken::new();
    let tasks = TaskTracker::new();
    let startup = Startup::default();
    startup.awaits(GUEST_INTERFACES);
    if config.namespaces.is_some() {
        startup.awaits(NAMESPACES);
    }

    let (inventory, publisher) = Inventory::new();
    let (events, event_queue) = mpsc::channel(EVENT_QUEUE);
    let (presence, present) = watch::channel(Presence::default());
    let mut feeds = SourceTasks::new(events, present, &vital, &tasks, &stop);
    feeds.start(config);
    let fed = feeds.fed();
    let source_states = fed.states.clone();
    let haproxies = HaproxySocket::bind(config)?;
    tasks.spawn(vital.task("the inventory", publisher.run(event_queue, stop.clone())));

    let mut registry = Registry::default();
    let metrics = Arc::new(Metrics::register(&mut registry));
    let last_beat = LastBeat::default();
    let (running, running_now) = watch::channel(None);
    let overview: Arc<dyn AdminState> = Arc::new(Overview::new(
        json!(config.settings()),
        startup.clone(),
        Liveness { last_beat: last_beat.clone(), stale_after: config.heartbeat_stale_after },
        Arc::clone(&inventory),
        source_states,
        registry,
        running_now,
    ));
    let admin = tasks.spawn(vital.task("the admin socket", admin_socket.serve(overview, stop.clone())));

    let host = HostSide { config, data, vital: &vital, tasks: &tasks, startup: &startup, fed };
    let serving = tokio::select! {
        serving = host.start(inventory, presence, metrics, last_beat.clone(), haproxies, &running) => serving.map(Some),
        () = signals.received() => Ok(None),
    };
    let result = match serving {
        Ok(Some(serving)) => {
            startup.is_done(GUEST_INTERFACES);
            info!(host = config.host_name(), portal = config.portal_namespace, "serving");
            notify(&[sd_notify::NotifyState::Ready]);
            let result = tokio::select! {
                () = signals.received() => Ok(()),
                name = vital.first_end() => Err(anyhow!("{name} ended by itself; guests would not be served any more")),
                never = feed_watchdog(&last_beat, config.heartbeat_stale_after) => match never {},
            };
            info!("stopping");
            notify(&[sd_notify::NotifyState::Stopping]);
            serving.end(config.drain_timeout).await;
            result
        }
        Ok(None) => Ok(()),
        Err(error) => Err(error),
    };

    running.send_replace(None);
    stop.cancel();
    let cleaned = detach::remove(config).await;
    if let Ok(Err(error)) = admin.await {
        warn!(%error, "the admin socket ended badly");
    }
    tasks.close();
    if timeout(END, tasks.wait()).await.is_err() {
        warn!("a task did not end in time");
    }
    result.and(cleaned)
}

/// What the start of serving works with.
struct HostSide<'a> {
    config: &'a Config,
    data: &'a Runtime,
    vital: &'a CriticalTasks,
    tasks: &'a TaskTracker,
    startup: &'a Startup,
    fed: SourceHandles,
}

impl HostSide<'_> {
    /// Adopts or makes everything on the host, and serves. Whoever drops this halfway removes what there is then.
    async fn start(
        self,
        inventory: Arc<Inventory>,
        presence: watch::Sender<Presence>,
        metrics: Arc<Metrics>,
        last_beat: LastBeat,
        haproxies: Option<HaproxySocket>,
        running: &watch::Sender<Option<Running>>,
    ) -> Result<Serving> {
        let Self { config, data, vital, tasks, startup, fed } = self;
        let mut datapath = Datapath::open(&config.bpffs_dir, config.attach_mode)?;
        if !datapath.is_adopted() {
            Portal::remove(&config.portal_namespace).await?;
        }
        let portal = Portal::establish(&config.portal_namespace, u32::from(config.portal_mtu)).await?;
        let netlink = Netlink::connect()?;
        let portal_events = netlink::watch_links()?;
        if datapath.hook() == Hook::Clsact {
            netlink.add_ingress_qdisc(portal.host_ifindex).await?;
        }
        datapath.connect_portal(portal::HOST_END, portal_link(&portal), config.datapath_limits())?;
        let (mut heartbeat, counters) = (datapath.heartbeat()?, Arc::new(datapath.counters()?));

        let directory = Arc::new(Directory::default());
        let secrets =
            SecretFiles::open(config.metadata_proxy_shared_secret.clone(), &config.shared_secret_files)?;
        let signer = secrets.signer();
        let (beating, leave) = (CancellationToken::new(), CancellationToken::new());
        tasks.spawn(secrets.keep(signer.clone(), leave.clone()));
        let introduction = config.upstream_auth(signer);
        let callers = Arc::new(callers(fed, &inventory, &introduction));
        let mut data_plane = DataPlane::start(
            data,
            config,
            &portal,
            ClientDirectory::new(Arc::clone(&directory), Arc::clone(&callers), seen_by(&counters)),
            &metrics,
            vital,
        )?;
        if let Some(socket) = haproxies {
            data_plane.answer_haproxies(data, config, socket, callers, metrics, vital)?;
        }
        // Before the first guest is attached: else its first packets would go aside.
        heartbeat.beat()?;
        let beats = heartbeat::run(heartbeat, config.heartbeat_stale_after, last_beat, beating.clone());
        let heart = data.spawn(vital.task("the heartbeat", beats));

        let (link_events, hook_events) = (netlink::watch_links()?, netlink::watch_hooks()?);
        let hook = datapath.hook();
        let rules = config.guest_rules();
        let branches = config.namespaces.is_some().then(|| datapath.netns_datapaths()).transpose()?;
        let mut guests = Guests::new(
            datapath,
            netlink.clone(),
            rules,
            Arc::clone(&inventory),
            Arc::clone(&directory),
            introduction,
            presence,
        );
        guests.resync().await?;
        let failures = guests.failures();
        let lost = portal::wait_until_lost(portal.host_ifindex, portal_events, netlink);
        let (mut namespaces, mut tallies) = (None, Tallies::default());
        if let (Some(rules), Some(branches)) = (config.namespace_rules(), branches) {
            let watch = Namespaces::new(rules, portal, branches, inventory, Arc::clone(&directory))?;
            tallies = watch.tallies();
            let startup = startup.clone();
            let watch = watch.run(move || startup.is_done(NAMESPACES), leave.clone());
            namespaces = Some(tasks.spawn(vital.task("the watch over namespaces", watch)));
        }
        running.send_replace(Some(Running { counters, directory, failures, tallies, hook }));
        let guests = guests.run(link_events, hook_events, leave.clone());
        let guests = tasks.spawn(vital.task("the watch over guests' interfaces", guests));
        tasks.spawn(vital.task("the portal's interface", leave.clone().run_until_cancelled_owned(lost)));
        Ok(Serving { data_plane, guests, namespaces, leave, heart, beating })
    }
}

fn portal_link(portal: &Portal) -> PortalLink {
    PortalLink { ifindex: portal.host_ifindex, nsid: portal.nsid, mac: portal.mac }
}

/// Tells from which MAC address a client sent its last SYN.
fn seen_by(counters: &Arc<Counters>) -> impl Fn(&ClientAddress) -> Option<MacAddress> + use<> {
    let counters = Arc::clone(counters);
    move |client| match counters.client(client) {
        Ok(record) => record.map(|record| MacAddress(record.guest_mac)),
        Err(error) => {
            debug!(%error, "a client's MAC address cannot be told");
            None
        }
    }
}

/// Who knows the guests that are told by a place and an address.
fn callers(fed: SourceHandles, inventory: &Arc<Inventory>, introduction: &UpstreamAuth) -> HostLookup {
    let local = InventoryLookup::new(Arc::clone(inventory), fed.states, introduction.clone());
    match fed.lookup {
        None => HostLookup::Local(local),
        Some(lookup) => HostLookup::Anywhere((local, NeutronLookup::new(lookup, introduction.clone()))),
    }
}

/// All that serves guests.
struct Serving {
    data_plane: DataPlane,
    guests: JoinHandle<Datapath>,
    namespaces: Option<JoinHandle<()>>,
    leave: CancellationToken,
    heart: JoinHandle<()>,
    beating: CancellationToken,
}

impl Serving {
    /// Requests first, then the attachments, and the heart last: until then packets of open connections find their way.
    async fn end(self, drain_timeout: Duration) {
        self.data_plane.drain(drain_timeout).await;
        self.leave.cancel();
        // A task that panicked has told so; what it kept goes with the pins.
        drop(self.guests.await);
        if let Some(namespaces) = self.namespaces {
            drop(namespaces.await);
        }
        self.beating.cancel();
        drop(self.heart.await);
    }
}

/// SIGTERM and SIGINT, which end nothing by themselves from the moment they are watched.
struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignals {
    fn watch() -> Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate()).context("watch for SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).context("watch for SIGINT")?,
        })
    }

    async fn received(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
