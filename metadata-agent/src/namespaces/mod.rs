//! Guests that are met in the namespaces of routers and DHCP servers: on network nodes, and on hypervisors with distributed
//! routers.
//!
//! In: the named namespaces of the host, as they come and go. Out: a [`site`] in each that is [a place](place) guests come
//! by, and what the proxy is told of their attachments. No process and no thread lives in any of them. Whatever else
//! there is under `/run/netns`, and whatever is left there of namespaces that are gone, is passed over.
//!
//! Here many guests share an attachment, so who asks is told by the place and by the address, as Neutron does it. The kernel
//! checks the address against the subnets of the interface that it came by, and answers go to whoever has the address by the
//! namespace's own neighbour table, so that nobody profits from another one's.
//!
//! A mount is what gives a namespace its name and an unmount what takes it (iproute2 ip/ipnetns.c), and the kernel tells of
//! both by a priority event on `/proc/self/mountinfo`. inotify would tell of the file, which is there before.

mod lost;
mod place;
mod reconcile;
mod site;

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
use tracing::{debug, info, warn};

use crate::attach::Failure;
use crate::datapath::{DatapathError, NetnsDatapaths};
use crate::directory::{BindingChanges, Directory};
use crate::ids::NetworkOrRouter;
use crate::inventory::Inventory;
use crate::net::name_pattern::NamePattern;
use crate::net::netns::Netns;
use crate::net::portal::Portal;
use place::scope_of;
use site::{NamespaceContext, Site};

/// How often everything is looked at without an event, and what failed is tried again.
const RECHECK: Duration = Duration::from_secs(5);
/// Mounts mostly come in numbers: one look is for all of so long.
const SETTLE: Duration = Duration::from_millis(20);
/// Sites that may wait for their turn.
const CHANGE_QUEUE: usize = 1024;

/// Which namespaces are served, and how.
#[derive(Clone, Debug)]
pub struct NamespaceRules {
    /// Patterns of names.
    pub names: Vec<NamePattern>,
    /// Where the legacy path of a router listens.
    pub legacy_port: u16,
    /// Whether packets stay in a router that has none.
    pub confine_routers: bool,
}

/// What there is, for `status`.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Namespaces that are served.
    pub served: usize,
    /// Names under `/run/netns` that fit but are no namespace, or no place that guests come by.
    pub passed_over: usize,
    /// Namespaces of which not everything is served.
    pub failures: Vec<Failure>,
}

/// Where the tally can be read.
pub type Tallies = Arc<ArcSwap<Tally>>;

/// What keeps the watch from starting.
#[derive(Debug, thiserror::Error)]
pub enum NamespacesError {
    /// The mounts cannot be watched.
    #[error("cannot watch /proc/self/mountinfo: {source}")]
    Mounts {
        /// Why not.
        source: io::Error,
    },
    /// What an earlier agent left cannot be read.
    #[error(transparent)]
    Datapath(#[from] DatapathError),
}

/// The task that keeps sites in step with the host's namespaces.
pub struct Namespaces {
    rules: NamespaceRules,
    workshop: NamespaceContext,
    changes: mpsc::Receiver<Arc<str>>,
    mounts: AsyncFd<File>,
    inventory: Arc<Inventory>,
    directory: Arc<Directory>,
    sites: BTreeMap<Arc<str>, Site>,
    failed: BTreeMap<Arc<str>, String>,
    passed_over: usize,
    /// The last site that was looked at for its programs, unless all were.
    seen: Option<Arc<str>>,
    tallies: Tallies,
}

impl Namespaces {
    /// Nothing is served yet.
    ///
    /// # Errors
    /// `/proc` is not mounted.
    pub fn new(
        rules: NamespaceRules,
        portal: Portal,
        branches: NetnsDatapaths,
        inventory: Arc<Inventory>,
        directory: Arc<Directory>,
    ) -> Result<Self, NamespacesError> {
        let mounts = watch_mounts().map_err(|source| NamespacesError::Mounts { source })?;
        let (sender, changes) = mpsc::channel(CHANGE_QUEUE);
        let NamespaceRules { legacy_port, confine_routers, .. } = rules;
        let workshop = NamespaceContext { portal, branches, legacy_port, confine_routers, changes: sender };
        Ok(Self {
            rules,
            workshop,
            changes,
            mounts,
            inventory,
            directory,
            sites: BTreeMap::new(),
            failed: BTreeMap::new(),
            passed_over: 0,
            seen: None,
            tallies: Tallies::default(),
        })
    }

    /// Where the tally can be read.
    #[must_use]
    pub fn tallies(&self) -> Tallies {
        Arc::clone(&self.tallies)
    }

    /// Serves until cancelled. `started` is called once everything that was there has been looked at.
    pub async fn run(mut self, started: impl FnOnce(), cancel: CancellationToken) {
        if cancel.run_until_cancelled(self.look()).await.is_none() {
            return;
        }
        started();
        self.forget_strays();
        let mut snapshots = self.inventory.subscribe();
        let mut recheck = interval(RECHECK);
        recheck.set_missed_tick_behavior(MissedTickBehavior::Delay);
        recheck.reset();
        let mut patrol = interval(lost::PATROL);
        patrol.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // What is begun when the agent stops is removed with all the rest.
        while let Some(()) =
            cancel.run_until_cancelled(self.step(&mut snapshots, &mut recheck, &mut patrol)).await
        {}
    }

    /// Waits for one thing to happen, and does what follows from it.
    async fn step(
        &mut self,
        snapshots: &mut watch::Receiver<u64>,
        recheck: &mut Interval,
        patrol: &mut Interval,
    ) {
        tokio::select! {
            mounts = self.mounts.ready(Interest::PRIORITY) => {
                if let Ok(mut mounts) = mounts {
                    mounts.clear_ready();
                }
                sleep(SETTLE).await;
                self.look().await;
            }
            Some(name) = self.changes.recv() => {
                let mut changed = BTreeSet::from([name]);
                while let Ok(name) = self.changes.try_recv() {
                    changed.insert(name);
                }
                self.settle_all(changed).await;
            }
            _ = patrol.tick() => {
                self.patrol();
                self.settle_all(lost::due(&self.sites)).await;
            }
            Ok(()) = snapshots.changed() => self.publish(),
            _ = recheck.tick() => {
                for name in self.failed.keys().cloned().collect::<Vec<_>>() {
                    self.settle(&name).await;
                }
                self.look().await;
            }
        }
    }

    /// Opens a site in each namespace that has none, and closes those whose namespace is gone or another one by now.
    async fn look(&mut self) {
        let names = match Netns::names() {
            Ok(names) => names,
            Err(error) => return warn!(%error, "the named namespaces cannot be listed"),
        };
        let fitting = names.iter().filter(|name| self.rules.names.iter().any(|rule| rule.matches(name)));
        let mut found = BTreeMap::new();
        self.passed_over = 0;
        for name in fitting {
            match (scope_of(name), Netns::named(name)) {
                (Some(scope), Ok(Some(netns))) => {
                    found.insert(Arc::<str>::from(name.as_str()), (scope, netns));
                }
                (scope, netns) => {
                    self.passed_over += 1;
                    debug!(name, ?scope, ?netns, "not a namespace that guests come by");
                }
            }
        }
        let is_gone = |(name, site): (&Arc<str>, &Site)| {
            let inode = found.get(name).and_then(|(_, netns)| netns.inode().ok());
            (inode != Some(site.inode)).then(|| Arc::clone(name))
        };
        for name in self.sites.iter().filter_map(is_gone).collect::<Vec<_>>() {
            self.close(&name);
        }
        self.failed.retain(|name, _| found.contains_key(name));
        for (name, (scope, netns)) in found {
            if !self.sites.contains_key(&name) {
                self.open(name, scope, netns).await;
                // Signals and the admin socket have their turn between two.
                yield_now().await;
            }
        }
        self.publish();
    }

    async fn open(&mut self, name: Arc<str>, scope: NetworkOrRouter, netns: Netns) {
        match Site::open(Arc::clone(&name), scope, netns, &mut self.workshop).await {
            Ok(site) => {
                info!(namespace = %name, "namespace served");
                self.sites.insert(Arc::clone(&name), site);
                self.settle(&name).await;
            }
            Err(error) => self.failed(&name, error.to_string()),
        }
    }

    fn patrol(&mut self) {
        match lost::patrol(&mut self.sites, self.seen.as_ref()) {
            Ok(seen) => self.seen = seen,
            Err(error) => warn!(%error, "programs cannot be looked for"),
        }
    }

    /// Brings sites in step. Where one lost its way it gets another at once.
    async fn settle_all(&mut self, names: BTreeSet<Arc<str>>) {
        if names.is_empty() {
            return;
        }
        let sites = self.sites.len();
        for name in names {
            self.settle(&name).await;
        }
        if self.sites.len() < sites {
            self.look().await;
        } else {
            self.publish();
        }
    }

    /// Brings one site in step. One that lost its way is opened anew with the next look.
    async fn settle(&mut self, name: &Arc<str>) {
        let Some(site) = self.sites.get_mut(name) else { return };
        match site.reconcile().await {
            Ok(()) => drop(self.failed.remove(name)),
            Err(error) => {
                self.failed(name, error.to_string());
                if matches!(error, site::SiteError::WayLost) {
                    self.close(name);
                }
            }
        }
    }

    fn failed(&mut self, name: &Arc<str>, error: String) {
        if self.failed.get(name).is_none_or(|before| *before != error) {
            warn!(namespace = %name, error, "namespace cannot be served as it should; trying again");
        }
        self.failed.insert(Arc::clone(name), error);
    }

    /// Our sockets go, or they would keep the namespace alive.
    fn close(&mut self, name: &Arc<str>) {
        let Some(site) = self.sites.remove(name) else { return };
        info!(namespace = %name, "namespace let go");
        let inode = site.inode;
        drop(site);
        self.forget(inode);
    }

    fn forget(&mut self, inode: u32) {
        if let Err(error) = self.workshop.branches.remove(inode) {
            warn!(inode, %error, "something of a namespace that is gone stays behind");
        }
    }

    /// What a dead agent left of namespaces that went meanwhile.
    fn forget_strays(&mut self) {
        let served: BTreeSet<u32> = self.sites.values().map(|site| site.inode).collect();
        match self.workshop.branches.inodes() {
            Ok(known) => {
                for inode in known.into_iter().filter(|inode| !served.contains(inode)) {
                    self.forget(inode);
                }
            }
            Err(error) => warn!(%error, "what an earlier agent left cannot be looked at"),
        }
    }

    fn publish(&self) {
        let snapshot = self.inventory.load();
        let bindings = self.sites.values().flat_map(|site| site.bindings(&snapshot));
        let now: BTreeMap<_, _> = bindings.map(|(id, binding)| (id, Arc::new(binding))).collect();
        let before = self.directory.shared();
        let gone = before.into_iter().map(|(id, _)| id).filter(|id| !now.contains_key(id)).collect();
        self.directory.publish_shared(&BindingChanges { removed: gone, updated: now.into_iter().collect() });
        let failure = |(name, error): (&Arc<str>, &String)| Failure {
            interface: name.to_string(),
            error: error.clone(),
        };
        self.tallies.store(Arc::new(Tally {
            served: self.sites.len(),
            passed_over: self.passed_over,
            failures: self.failed.iter().map(failure).collect(),
        }));
    }
}

#[expect(
    deprecated,
    reason = "what takes its place is unsafe, for descriptors that may change hands; a file keeps its own"
)]
fn watch_mounts() -> io::Result<AsyncFd<File>> {
    AsyncFd::with_interest(File::open("/proc/self/mountinfo")?, Interest::PRIORITY)
}
