//! Serves guests through the namespaces of routers and DHCP servers: on network nodes, and on
//! hypervisors with distributed routers.
//!
//! Watches the named namespaces of the host, and opens and closes one [`WatchedNamespace`] for each
//! that belongs to a router or a DHCP server. No process and no thread lives in any of them.
//! Everything else under `/run/netns` is ignored, and so are the files of namespaces that are gone.
//! A namespace without an interface that guests are behind is left as Neutron made it, so that
//! Neutron can remove it ([`uplink_schedule`]).
//!
//! Many guests share an attachment there. A client is identified by the router or network in the
//! namespace name and by its address, as Neutron does it. The program checks the address against
//! the subnets of the ingress interface. Answers go to the owner of the address in the namespace's
//! own neighbour table, so a guest gains nothing by spoofing another guest's address.
//!
//! A mount gives a namespace its name, and an unmount takes it (iproute2 ip/ipnetns.c). The kernel
//! reports both by a priority event on `/proc/self/mountinfo`. inotify would report the file, which
//! is there before the mount.

mod patrol;
mod scope;
mod uplink_schedule;
mod watched;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, watch};
use tokio::task::yield_now;
use tokio::time::{Interval, MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::attach::{Attacher, Failure, PATROL, REATTACH};
use crate::datapath::NetnsDatapaths;
use crate::directory::Directory;
use crate::ids::NetworkOrRouter;
use crate::inventory::Inventory;
use crate::net::damage::DamageReports;
use crate::net::name_pattern::NamePattern;
use crate::net::netns::Netns;
use crate::net::portal::Portal;
use scope::scope_of;
use watched::{NamespaceContext, NamespaceError, WatchedNamespace};

/// The interval at which the namespaces are listed without an event, and failed ones are tried
/// again.
const RECHECK: Duration = Duration::from_secs(5);
/// The debounce time for mount events, which come in bursts.
const SETTLE: Duration = Duration::from_millis(20);
/// The capacity of the queue of changed namespaces.
const CHANGE_QUEUE: usize = 1024;

/// The namespaces that are served, and how.
#[derive(Clone, Debug)]
pub(crate) struct NamespaceRules {
    /// Patterns of namespace names.
    pub names: Vec<NamePattern>,
    /// The port of a router's legacy metadata path.
    pub legacy_port: u16,
    /// Drops packets in a router without a legacy path.
    pub confine_routers: bool,
}

/// The state of all namespaces, for `status`.
#[derive(Clone, Debug, Default)]
pub(crate) struct NamespaceReport {
    /// The number of namespaces that are served.
    pub served: usize,
    /// The namespaces that no guest can be behind, and why.
    pub idle: Vec<IdleNamespace>,
    /// The number of names under `/run/netns` that match, but are not a namespace of a router or a
    /// DHCP server.
    pub passed_over: usize,
    /// The namespaces that are not served, or not completely.
    pub failures: Vec<Failure>,
}

/// A namespace without an interface that guests are behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct IdleNamespace {
    pub name: Arc<str>,
    pub reason: String,
}

/// A handle that follows the report.
pub(crate) type NamespaceReports = Arc<ArcSwap<NamespaceReport>>;

/// A failure to start watching.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NamespacesError {
    #[error("cannot watch /proc/self/mountinfo: {source}")]
    Mounts { source: io::Error },
}

/// The task that serves the host's namespaces as they come and go.
pub(crate) struct NamespaceWatcher {
    rules: NamespaceRules,
    context: NamespaceContext,
    changes: mpsc::Receiver<Arc<str>>,
    mounts: AsyncFd<File>,
    watched: BTreeMap<Arc<str>, WatchedNamespace>,
    failed: BTreeMap<Arc<str>, String>,
    /// Namespaces in which an interface lacks its program.
    detached: BTreeSet<Arc<str>>,
    passed_over: usize,
    /// The last namespace of an unfinished patrol.
    patrolled: Option<Arc<str>>,
    reports: NamespaceReports,
}

/// The periodic timers.
struct Timers {
    recheck: Interval,
    patrol: Interval,
    reattach: Interval,
}

impl NamespaceWatcher {
    /// A watcher that serves no namespace yet.
    ///
    /// # Errors
    /// `/proc` is not mounted.
    pub(crate) fn new(
        rules: NamespaceRules,
        portal: Arc<Portal>,
        datapaths: NetnsDatapaths,
        inventory: Arc<Inventory>,
        directory: Arc<Directory>,
        damage: DamageReports,
    ) -> Result<Self, NamespacesError> {
        let mounts = watch_mounts().map_err(|source| NamespacesError::Mounts { source })?;
        let (sender, changes) = mpsc::channel(CHANGE_QUEUE);
        let NamespaceRules { legacy_port, confine_routers, .. } = rules;
        let context = NamespaceContext {
            portal,
            datapaths,
            legacy_port,
            confine_routers,
            inventory,
            directory,
            damage,
            changes: sender,
        };
        Ok(Self {
            rules,
            context,
            changes,
            mounts,
            watched: BTreeMap::new(),
            failed: BTreeMap::new(),
            detached: BTreeSet::new(),
            passed_over: 0,
            patrolled: None,
            reports: NamespaceReports::default(),
        })
    }

    /// Returns a handle that follows the report.
    #[must_use]
    pub(crate) fn reports(&self) -> NamespaceReports {
        Arc::clone(&self.reports)
    }

    /// Serves until cancelled. Calls `started` once every namespace that was there has been tried.
    pub(crate) async fn run(mut self, started: impl FnOnce(), cancel: CancellationToken) {
        if cancel.run_until_cancelled(self.sync()).await.is_none() {
            return;
        }
        started();
        self.remove_orphans();
        let mut snapshots = self.context.inventory.subscribe();
        let mut timers = Timers { recheck: ticks(RECHECK), patrol: ticks(PATROL), reattach: ticks(REATTACH) };
        timers.recheck.reset();
        // If shutdown interrupts a step, teardown removes what it created.
        while let Some(()) = cancel.run_until_cancelled(self.step(&mut snapshots, &mut timers)).await {}
    }

    /// Waits for one event, and handles it.
    async fn step(&mut self, snapshots: &mut watch::Receiver<u64>, timers: &mut Timers) {
        tokio::select! {
            mounts = self.mounts.ready(Interest::PRIORITY) => {
                if let Ok(mut mounts) = mounts {
                    mounts.clear_ready();
                }
                sleep(SETTLE).await;
                self.sync().await;
            }
            Some(name) = self.changes.recv() => {
                let mut changed = BTreeSet::from([name]);
                while let Ok(name) = self.changes.try_recv() {
                    changed.insert(name);
                }
                self.on_changes(changed).await;
            }
            _ = timers.patrol.tick() => self.patrol(),
            _ = timers.reattach.tick(), if !self.detached.is_empty() => self.reattach_due().await,
            Ok(()) = snapshots.changed() => self.follow_inventory().await,
            _ = timers.recheck.tick() => {
                let lost = self.watched.iter().filter(|(_, namespace)| namespace.has_lost_uplink());
                let failed = self.failed.keys().chain(lost.map(|(name, _)| name));
                for name in failed.cloned().collect::<BTreeSet<_>>() {
                    self.reconcile(&name).await;
                }
                self.sync().await;
            }
        }
    }

    /// Opens each namespace that is not watched yet, and closes those that are gone or replaced.
    async fn sync(&mut self) {
        let names = match Netns::names() {
            Ok(names) => names,
            Err(error) => return warn!(%error, "cannot list named namespaces"),
        };

        // The namespaces that should be served.
        let matching = names.iter().filter(|name| self.rules.names.iter().any(|rule| rule.matches(name)));
        let mut found = BTreeMap::new();
        self.passed_over = 0;
        for name in matching {
            match (scope_of(name), Netns::named(name)) {
                (Some(scope), Ok(Some(netns))) => {
                    found.insert(Arc::<str>::from(name.as_str()), (scope, netns));
                }
                (scope, netns) => {
                    self.passed_over += 1;
                    debug!(name, ?scope, ?netns, "not a namespace of a router or DHCP server");
                }
            }
        }

        // Close namespaces that are gone, or whose name now refers to another inode.
        let is_gone = |(name, namespace): (&Arc<str>, &WatchedNamespace)| {
            let inode = found.get(name).and_then(|(_, netns)| netns.inode().ok());
            (inode != Some(namespace.inode)).then(|| Arc::clone(name))
        };
        for name in self.watched.iter().filter_map(is_gone).collect::<Vec<_>>() {
            self.close(&name);
        }
        self.failed.retain(|name, _| found.contains_key(name));

        // Those that are new.
        for (name, (scope, netns)) in found {
            if !self.watched.contains_key(&name) {
                self.open(name, scope, netns).await;
                // Yield, so that signals and the admin socket are served.
                yield_now().await;
            }
        }
        self.report();
    }

    async fn open(&mut self, name: Arc<str>, scope: NetworkOrRouter, netns: Netns) {
        match WatchedNamespace::open(Arc::clone(&name), scope, netns, &self.context) {
            Ok(namespace) => {
                self.watched.insert(Arc::clone(&name), namespace);
                self.reconcile(&name).await;
            }
            Err(error) => self.record(&name, Err(error)),
        }
    }

    /// Closes every descriptor in a namespace, because an open one keeps it alive.
    fn close(&mut self, name: &Arc<str>) {
        let Some(mut namespace) = self.watched.remove(name) else { return };
        self.detached.remove(name);
        namespace.disconnect(&mut self.context);
    }

    /// Removes what an earlier agent left for namespaces that are gone or idle since.
    fn remove_orphans(&mut self) {
        let served = self.watched.values().filter(|namespace| namespace.attacher.is_some());
        let served: BTreeSet<u32> = served.map(|namespace| namespace.inode).collect();
        match self.context.datapaths.inodes() {
            Ok(known) => {
                for inode in known.into_iter().filter(|inode| !served.contains(inode)) {
                    self.context.remove_state(inode);
                }
            }
            Err(error) => warn!(%error, "cannot list the state of earlier agents"),
        }
    }

    /// Reconciles the namespaces in which something changed.
    async fn on_changes(&mut self, names: BTreeSet<Arc<str>>) {
        for name in names {
            self.reconcile(&name).await;
        }
        self.report();
    }

    async fn reconcile(&mut self, name: &Arc<str>) {
        let Some(namespace) = self.watched.get_mut(name) else { return };
        let reconciled = namespace.reconcile(&mut self.context).await;
        self.record(name, reconciled);
    }

    /// Follows the networks of router ports that the inventory knows.
    async fn follow_inventory(&mut self) {
        for name in self.watched.keys().cloned().collect::<Vec<_>>() {
            let Some(namespace) = self.watched.get_mut(&name) else { continue };
            namespace.follow_inventory().await;
            self.refresh(&name);
        }
        self.report();
    }

    /// Looks for programs that were detached externally, and reattaches them.
    fn patrol(&mut self) {
        for attacher in self.watched.values_mut().filter_map(|namespace| namespace.attacher.as_mut()) {
            attacher.restore_pins();
        }
        let patrol = match patrol::patrol(&self.watched, self.patrolled.as_ref()) {
            Ok(patrol) => patrol,
            Err(error) => return warn!(%error, "cannot look for detached programs"),
        };
        self.patrolled = patrol.last;
        for (name, missing) in patrol.missing {
            let Some(attacher) = self.attacher(&name) else { continue };
            attacher.reattach_links(missing);
            self.refresh(&name);
            self.report();
        }
    }

    async fn reattach_due(&mut self) {
        for name in self.detached.clone() {
            let Some(attacher) = self.attacher(&name) else { continue };
            attacher.reattach_due().await;
            self.refresh(&name);
        }
        self.report();
    }

    fn attacher(&mut self, name: &Arc<str>) -> Option<&mut Attacher> {
        self.watched.get_mut(name)?.attacher.as_mut()
    }

    /// Records the outcome of a reconcile.
    fn record(&mut self, name: &Arc<str>, outcome: Result<(), NamespaceError>) {
        self.refresh(name);
        let Err(error) = outcome else { return };
        let text = error.to_string();
        if self.failed.get(name) != Some(&text) {
            warn!(namespace = %name, %error, "cannot serve namespace; retrying");
        }
        self.failed.insert(Arc::clone(name), text);
    }

    /// Copies the failures of a namespace's interfaces into the report, unless the namespace as a
    /// whole has failed. The attacher has logged them.
    fn refresh(&mut self, name: &Arc<str>) {
        let Some(namespace) = self.watched.get(name) else { return };
        if namespace.has_missing() {
            self.detached.insert(Arc::clone(name));
        } else {
            self.detached.remove(name);
        }
        if !namespace.is_reconciled() {
            return;
        }
        match namespace.error() {
            Some(error) => drop(self.failed.insert(Arc::clone(name), error)),
            None => drop(self.failed.remove(name)),
        }
    }

    fn report(&self) {
        let failure = |(name, error): (&Arc<str>, &String)| Failure {
            interface: name.to_string(),
            error: error.clone(),
        };
        let idle = self.watched.iter().filter_map(|(name, namespace)| {
            Some(IdleNamespace { name: Arc::clone(name), reason: namespace.idle()?.to_owned() })
        });
        let served = self.watched.values().filter(|namespace| namespace.is_served());
        self.reports.store(Arc::new(NamespaceReport {
            served: served.count(),
            idle: idle.collect(),
            passed_over: self.passed_over,
            failures: self.failed.iter().map(failure).collect(),
        }));
    }
}

/// Ticks that do not pile up while the task is busy.
fn ticks(period: Duration) -> Interval {
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

#[expect(
    deprecated,
    reason = "its replacement is unsafe, for descriptors that may change; a file keeps its own"
)]
fn watch_mounts() -> io::Result<AsyncFd<File>> {
    AsyncFd::with_interest(File::open("/proc/self/mountinfo")?, Interest::PRIORITY)
}
