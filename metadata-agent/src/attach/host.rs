//! Keeps the guest interfaces of the host attached, as links, hooks and the inventory change.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, StreamExt};
use tokio::sync::watch;
use tokio::time::{Interval, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};

use super::wanted::HostTaps;
use super::{AttachError, Attacher, Failures, GuestRules, Links, PATROL, REATTACH, Wanted};
use crate::datapath::Datapath;
use crate::directory::{Directory, UpstreamAuth};
use crate::ids::IfIndex;
use crate::inventory::Inventory;
use crate::inventory::presence::Presence;
use crate::net::damage::DamageReports;
use crate::net::netlink::{HookEvent, Link, LinkEvent, Netlink};
use crate::net::portal::HostEndUser;
use crate::net::probe_pair::{self, ProbeInterface};
use crate::process::progress::Progress;

/// The interval at which failed interfaces are tried again.
const RETRY: Duration = Duration::from_secs(1);

/// Those that are told what becomes of guest interfaces.
pub(crate) struct Subscribers {
    pub(crate) directory: Arc<Directory>,
    pub(crate) presence: watch::Sender<Presence>,
    pub(crate) damage: DamageReports,
    pub(crate) progress: Progress,
}

/// The task that keeps the host's guest interfaces attached.
pub(crate) struct HostWatcher {
    attacher: Attacher,
    taps: HostTaps,
    netlink: Netlink,
    inventory: Arc<Inventory>,
    probe: ProbeInterface,
    /// The version of the snapshot that was applied last.
    applied: u64,
}

impl HostWatcher {
    /// A watcher that has attached nothing yet.
    #[must_use]
    pub(crate) fn new(
        datapath: Datapath,
        netlink: Netlink,
        rules: GuestRules,
        inventory: Arc<Inventory>,
        auth: UpstreamAuth,
        subscribers: Subscribers,
        probe: ProbeInterface,
    ) -> Self {
        let Subscribers { directory, presence, damage, progress } = subscribers;
        Self {
            attacher: Attacher::for_host(datapath, netlink.clone(), directory, presence, damage, progress),
            taps: HostTaps::new(rules, Arc::clone(&inventory), auth, probe.clone()),
            netlink,
            inventory,
            probe,
            applied: 0,
        }
    }

    /// Returns a handle that follows the failures of single interfaces.
    #[must_use]
    pub(crate) fn failures(&self) -> Failures {
        self.attacher.failures()
    }

    /// Reconciles all links of the host. The link events must be subscribed to before, or a link
    /// could be missed.
    ///
    /// # Errors
    /// Links cannot be listed, or what an earlier agent left cannot be removed.
    pub(crate) async fn resync(&mut self) -> Result<(), AttachError> {
        let links = self.netlink.links().await?;
        self.reconcile(Links::All(links)).await
    }

    async fn reconcile(&mut self, links: Links) -> Result<(), AttachError> {
        self.taps.observe(&self.netlink, &links).await;
        let changes = self.attacher.reconcile(Wanted::HostTaps(&self.taps), links).await?;
        debug!(?changes, "guest interfaces reconciled");
        Ok(())
    }

    /// Follows links, hooks, the portal's interface and the inventory until cancelled, or until a
    /// watch ends. Returns the datapath.
    pub(crate) async fn run(
        mut self,
        mut events: impl Stream<Item = LinkEvent> + Unpin,
        mut hooks: impl Stream<Item = HookEvent> + Unpin,
        mut portal: HostEndUser,
        cancel: CancellationToken,
    ) -> Datapath {
        let mut snapshots = self.inventory.subscribe();
        let mut retry = ticks(RETRY);
        let mut patrol = ticks(PATROL);
        let mut reattach = ticks(REATTACH);
        loop {
            tokio::select! {
                () = cancel.cancelled() => break,
                event = events.next() => {
                    let Some(event) = event else { break };
                    self.on_link(event).await;
                }
                event = hooks.next() => {
                    let Some(event) = event else { break };
                    self.attacher.on_hook(event).await;
                }
                index = portal.next() => self.reconnect_portal(index, &portal).await,
                () = self.probe.changed() => self.attach_probe().await,
                Ok(()) = snapshots.changed() => self.follow_inventory().await,
                _ = retry.tick(), if self.attacher.has_failed() => self.retry().await,
                _ = patrol.tick() => self.attacher.patrol(),
                _ = reattach.tick(), if self.attacher.has_missing() => self.attacher.reattach_due().await,
            }
        }
        self.attacher.into_datapath()
    }

    /// Attaches the portal's program to a new interface. After an error, the guard asks again.
    async fn reconnect_portal(&mut self, index: IfIndex, portal: &HostEndUser) {
        match self.attacher.reconnect_portal(index).await {
            Ok(()) => portal.connected(index),
            Err(error) => warn!(%error, "cannot attach to the portal's new interface; retrying"),
        }
    }

    /// Attaches to the agent's own interface, whose link event may have come before it was known.
    async fn attach_probe(&mut self) {
        let reconciled = match self.netlink.link(probe_pair::HOST_END).await {
            Ok(Some(link)) => self.reconcile(Links::present(vec![link])).await,
            // An event follows, or has been handled.
            Ok(None) => Ok(()),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = reconciled {
            error!(%error, "cannot attach to the probe's interface");
        }
    }

    async fn on_link(&mut self, event: LinkEvent) {
        let reconciled = match event {
            LinkEvent::Present(link) => self.reconcile(Links::present(vec![link])).await,
            LinkEvent::Gone(index) => {
                self.reconcile(Links::Some { present: Vec::new(), gone: vec![index] }).await
            }
            LinkEvent::Overrun => {
                warn!("netlink overrun; resynchronising links");
                self.resync().await
            }
        };
        if let Err(error) = reconciled {
            error!(%error, "cannot reconcile guest interfaces");
        }
    }

    /// Reconciles the interfaces whose ports changed since the last snapshot.
    async fn follow_inventory(&mut self) {
        let links = {
            let snapshot = self.inventory.load();
            let since = std::mem::replace(&mut self.applied, snapshot.version());
            match snapshot.changed_since(since) {
                Some(devices) => {
                    let links = devices.filter_map(|device| self.attacher.link_named(device.as_str()));
                    let links: BTreeMap<IfIndex, Link> = links.map(|link| (link.index, link)).collect();
                    links.into_values().collect()
                }
                None => self.attacher.known_links(),
            }
        };
        if let Err(error) = self.reconcile(Links::present(links)).await {
            error!(%error, "cannot reconcile guest interfaces");
        }
    }

    /// Tries failed interfaces again. One that went while events were lost is not reported, so the
    /// links are listed.
    async fn retry(&mut self) {
        let links = match self.netlink.links().await {
            Ok(links) => links,
            Err(error) => return warn!(%error, "cannot list links"),
        };
        match self.attacher.retry(Wanted::HostTaps(&self.taps), links).await {
            Ok(changes) => debug!(?changes, "failed guest interfaces tried again"),
            Err(error) => error!(%error, "cannot reconcile guest interfaces"),
        }
    }
}

/// Ticks that do not pile up while the task is busy.
fn ticks(period: Duration) -> Interval {
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}
