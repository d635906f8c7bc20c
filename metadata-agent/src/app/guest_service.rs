//! Components that serve guests: datapath, proxy, heartbeat and attachments.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{Notify, broadcast, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::control::{Control, Inputs};
use super::data_plane::{DataPlane, DataPlaneInputs};
use super::haproxy_socket::HaproxySocket;
use super::source_tasks::SourceHandles;
use crate::admin::readiness::StartupStep;
use crate::admin::state::Running;
use crate::attach::{Failures, HostWatcher, RefusalEpisodes, RefusalWatcher, Subscribers};
use crate::config::Config;
use crate::data_path_probe::Prober;
use crate::datapath::heartbeat::{ControlProgress, beat_control};
use crate::datapath::{Counters, Datapath, FromGuestProgram, Heartbeat, Hook, NetnsDatapaths, PortalLink};
use crate::directory::clients::{HostLookup, InventoryLookup, NeutronLookup};
use crate::directory::{Credentials, Directory, UpstreamAuth};
use crate::ids::IfIndex;
use crate::inventory::Inventory;
use crate::inventory::presence::Presence;
use crate::inventory::refused::RefusedSource;
use crate::namespaces::{NamespaceReports, NamespaceWatcher};
use crate::net::netlink::{self, Netlink};
use crate::net::portal::{self, HostEndUser, Portal, PortalGuard};
use crate::net::probe_pair::ProbeInterface;
use crate::process::blocking::blocking;
use crate::secrets::SecretFiles;

/// The running components.
pub(super) struct GuestService {
    data_plane: DataPlane,
    guests: JoinHandle<Datapath>,
    namespaces: Option<JoinHandle<()>>,
    /// The task that sends probes, if there is one.
    probe: Option<(JoinHandle<()>, CancellationToken)>,
    /// Cancels the tasks that keep attachments.
    stop_attachments: CancellationToken,
    heartbeat: ControlHeartbeat,
}

impl GuestService {
    /// Adopts what an earlier agent left on the host, or creates it, and serves guests. If the
    /// future is dropped halfway, teardown removes what it made.
    pub(super) async fn start(
        config: &Config,
        link: &Runtime,
        control: &Control,
        inputs: Inputs,
        haproxy_socket: Option<HaproxySocket>,
    ) -> Result<Self> {
        let boot = Boot { config, control, stop_attachments: control.stop.child_token() };
        let Inputs { inventory, presence, sources, refused, metrics, namespaces } = inputs;
        let mut host = boot.open_host().await?;
        let credentials = boot.open_secrets().await?;
        let auth = credentials.auth();
        let signer = credentials.signer().cloned();
        let lookup = Arc::new(host_lookup(sources, &inventory, &credentials, config.identity_grace));
        let directory = boot.open_directory(credentials);
        let resumed = Arc::new(Notify::new());
        // Without a heartbeat, the first packets of the first guest would bypass the agent.
        let heartbeat = boot.start_heartbeat(&host.datapath, Arc::clone(&resumed))?;
        let inputs = DataPlaneInputs {
            datapath: &host.datapath,
            portal: &host.portal,
            directory: &directory,
            lookup,
            signer,
            metrics,
            haproxy_socket,
            resumed,
        };
        let stop = boot.stop_attachments.clone();
        let data_plane = DataPlane::start(config, link, control, inputs, stop).await?;
        let netns_datapaths =
            config.namespaces.is_some().then(|| host.datapath.netns_datapaths()).transpose()?;

        let refusals = boot.follow_refusals(&host.datapath, &directory, refused)?;

        // From here on, packets of guests are redirected.
        let Host { datapath, portal, portal_end, netlink, counters } = host;
        let hook = datapath.hook();
        let program = datapath.guest_program()?;
        let (probe_interface, probe) = ProbeInterface::channel();
        let known = Known { inventory, directory: Arc::clone(&directory), probe };
        let (guests, failures) =
            boot.attach_guests(datapath, netlink, portal_end, &known, auth, presence).await?;
        let probe = boot.start_probes(probe_interface, program, &known.directory)?;
        let (namespaces, reports) = boot.watch_namespaces(netns_datapaths, portal, known, namespaces)?;
        control.running.send_replace(Some(Running {
            counters,
            directory,
            failures,
            refusals,
            namespaces: reports,
            hook,
            restarts: control.restarts.clone(),
        }));
        Ok(Self { data_plane, guests, namespaces, probe, stop_attachments: boot.stop_attachments, heartbeat })
    }

    /// Ends requests first, then the attachments. The heartbeat ends last: until then packets of
    /// open connections reach the agent.
    pub(super) async fn end(mut self, drain_timeout: Duration) {
        // The listener closes, so probes would fail from here on.
        if let Some((probe, stop)) = self.probe {
            stop.cancel();
            drop(probe.await);
        }
        self.data_plane.drain(drain_timeout).await;
        self.stop_attachments.cancel();
        // A task that panicked has been reported. Teardown removes what it kept.
        drop(self.guests.await);
        if let Some(namespaces) = self.namespaces {
            drop(namespaces.await);
        }
        self.data_plane.end().await;
        self.heartbeat.end();
    }
}

/// The heartbeat of this process. Dropping it leaves packets to the host's own path.
struct ControlHeartbeat {
    heartbeat: Arc<Heartbeat>,
    stop: CancellationToken,
}

impl ControlHeartbeat {
    fn end(self) {
        drop(self);
    }
}

impl Drop for ControlHeartbeat {
    fn drop(&mut self) {
        self.stop.cancel();
        self.heartbeat.stop();
    }
}

/// The context of the boot steps.
struct Boot<'a> {
    config: &'a Config,
    control: &'a Control,
    stop_attachments: CancellationToken,
}

/// The agent's part of the host's kernel state.
struct Host {
    datapath: Datapath,
    portal: Arc<Portal>,
    portal_end: HostEndUser,
    netlink: Netlink,
    counters: Arc<Counters>,
}

/// Ports from sources, bindings of attachments to ports, and the agent's own interface.
struct Known {
    inventory: Arc<Inventory>,
    directory: Arc<Directory>,
    probe: ProbeInterface,
}

impl Boot<'_> {
    /// Opens the datapath and the portal, and guards the portal.
    async fn open_host(&self) -> Result<Host> {
        let config = self.config;
        let mut datapath = Datapath::open(&config.bpffs_dir, config.attach_mode)?;
        // A portal without adopted maps belongs to an agent of another version.
        if !datapath.is_adopted() {
            Portal::remove(&config.portal_namespace).await?;
        }
        let portal = Portal::establish(&config.portal_namespace, u32::from(config.portal_mtu)).await?;
        let (portal, netlink) = (Arc::new(portal), Netlink::connect()?);

        // Without TCX, the program that returns packets to guests needs a qdisc.
        if datapath.hook() == Hook::Clsact {
            netlink.add_ingress_qdisc(portal.host_ifindex()).await?;
        }
        datapath.connect_portal(portal::HOST_END, portal_link(&portal), config.datapath_limits())?;
        let counters = Arc::new(datapath.counters()?);
        let (for_guard, portal_end) = portal::host_end(portal.host_ifindex());
        let guard = PortalGuard::new(Arc::clone(&portal), for_guard, self.control.damage.clone());
        let guard = guard.start(self.stop_attachments.clone())?;
        self.control.tasks.spawn(self.control.critical.task("the portal guard", guard));
        Ok(Host { datapath, portal, portal_end, netlink, counters })
    }

    /// Reads the shared secrets, and keeps them up to date.
    async fn open_secrets(&self) -> Result<Credentials> {
        let secret = self.config.metadata_proxy_shared_secret.clone();
        let paths = self.config.shared_secret_files.clone();
        let secrets = blocking(move || SecretFiles::open(secret, &paths)).await;
        let secrets = secrets.context("read the shared secrets")??;
        let signer = secrets.signer();
        let own = self.control.live.secret.subscribe();
        self.control.tasks.spawn(secrets.keep(own, signer.clone(), self.stop_attachments.clone()));
        Ok(self.config.credentials(signer))
    }

    /// Creates the directory, and keeps its identities signed with the secrets in force.
    fn open_directory(&self, credentials: Credentials) -> Arc<Directory> {
        let directory = Arc::new(Directory::new(credentials));
        let (signed, stop) = (Arc::clone(&directory), self.stop_attachments.clone());
        let follow = async move { signed.follow_secrets(stop).await };
        self.control.tasks.spawn(self.control.critical.task("the signing of identities", follow));
        directory
    }

    /// Writes the first heartbeat of this process, and keeps writing on a thread that watches its
    /// runtime. Notifies `resumed` when traffic may flow again.
    fn start_heartbeat(&self, datapath: &Datapath, resumed: Arc<Notify>) -> Result<ControlHeartbeat> {
        let (control, heartbeat) = (self.control, Arc::new(datapath.heartbeat()?));
        heartbeat.beat_control();
        let (stale_after, stop) = (self.config.heartbeat_stale_after, CancellationToken::new());
        let progress = ControlProgress::default();
        control.tasks.spawn(progress.clone().count(stop.clone()));
        let damage = control.damage.subscribe();
        let beats =
            beat_control(Arc::clone(&heartbeat), stale_after, progress, damage, resumed, stop.clone());
        let beats = control.critical.task("the heartbeat of the control runtime", beats);
        let runtime = Builder::new_current_thread().enable_time().build();
        let runtime = runtime.context("start the runtime of the heartbeat")?;
        let thread = thread::Builder::new().name("md-beat".to_owned());
        thread.spawn(move || runtime.block_on(beats)).context("start the thread of the heartbeat")?;
        Ok(ControlHeartbeat { heartbeat, stop })
    }

    /// Logs refused packets, and reports their sources to the sources of ports.
    fn follow_refusals(
        &self,
        datapath: &Datapath,
        directory: &Arc<Directory>,
        refused: broadcast::Sender<RefusedSource>,
    ) -> Result<RefusalEpisodes> {
        let watcher = RefusalWatcher::new(datapath.refusals()?, Arc::clone(directory), refused);
        let episodes = watcher.episodes();
        let watch = watcher.run(self.stop_attachments.clone());
        self.control.tasks.spawn(self.control.critical.task("the refusal watcher", watch));
        Ok(episodes)
    }

    /// Attaches the program to every guest interface, and keeps the attachments.
    async fn attach_guests(
        &self,
        datapath: Datapath,
        netlink: Netlink,
        portal_end: HostEndUser,
        known: &Known,
        auth: UpstreamAuth,
        presence: watch::Sender<Presence>,
    ) -> Result<(JoinHandle<Datapath>, Failures)> {
        // Watch first, so that no change after the first scan is missed.
        let (link_events, hook_events) = (netlink::watch_links()?, netlink::watch_hooks()?);
        let rules = self.config.guest_rules();
        let inventory = Arc::clone(&known.inventory);
        let (directory, damage) = (Arc::clone(&known.directory), self.control.damage.clone());
        let progress = self.control.progress.clone();
        let subscribers = Subscribers { directory, presence, damage, progress };
        let mut guests =
            HostWatcher::new(datapath, netlink, rules, inventory, auth, subscribers, known.probe.clone());
        guests.resync().await?;
        let failures = guests.failures();
        let watch = guests.run(link_events, hook_events, portal_end, self.stop_attachments.clone());
        let watch = self.control.critical.task("the guest interface watcher", watch);
        Ok((self.control.tasks.spawn(watch), failures))
    }

    /// Sends requests through the datapath, if these are configured.
    fn start_probes(
        &self,
        interface: watch::Sender<Option<IfIndex>>,
        program: FromGuestProgram,
        directory: &Arc<Directory>,
    ) -> Result<Option<(JoinHandle<()>, CancellationToken)>> {
        let Some(interval) = self.config.probe_interval() else { return Ok(None) };
        let control = self.control;
        let prober = Prober {
            interval,
            host: Netlink::connect()?,
            interface,
            directory: Arc::clone(directory),
            program,
            last_beat: control.last_beat.clone(),
            stale_after: self.config.heartbeat_stale_after,
            damage: control.damage.clone(),
            reports: control.readiness.probes().clone(),
        };
        let stop = self.stop_attachments.child_token();
        let probing = control.critical.task("the data path probe", prober.run(stop.clone()));
        Ok(Some((control.tasks.spawn(probing), stop)))
    }

    /// Serves the namespaces of routers and DHCP servers, if any are configured.
    fn watch_namespaces(
        &self,
        datapaths: Option<NetnsDatapaths>,
        portal: Arc<Portal>,
        known: Known,
        step: Option<StartupStep>,
    ) -> Result<(Option<JoinHandle<()>>, NamespaceReports)> {
        let (Some(rules), Some(datapaths)) = (self.config.namespace_rules(), datapaths) else {
            return Ok((None, NamespaceReports::default()));
        };
        let Known { inventory, directory, .. } = known;
        let damage = self.control.damage.clone();
        let namespaces = NamespaceWatcher::new(rules, portal, datapaths, inventory, directory, damage)?;
        let reports = namespaces.reports();
        let watch = namespaces.run(move || drop(step), self.stop_attachments.clone());
        let watch = self.control.critical.task("the namespace watcher", watch);
        Ok((Some(self.control.tasks.spawn(watch)), reports))
    }
}

fn portal_link(portal: &Portal) -> PortalLink {
    PortalLink { ifindex: portal.host_ifindex(), nsid: portal.nsid, mac: portal.mac }
}

/// Finds guests by network or router and address: in the inventory, and in Neutron if it is
/// configured.
fn host_lookup(
    sources: SourceHandles,
    inventory: &Arc<Inventory>,
    credentials: &Credentials,
    grace: Duration,
) -> HostLookup {
    HostLookup {
        inventory: InventoryLookup::new(Arc::clone(inventory), sources.states, credentials.clone(), grace),
        neutron: sources.lookup.map(|lookup| NeutronLookup::new(lookup, credentials.clone())),
    }
}
