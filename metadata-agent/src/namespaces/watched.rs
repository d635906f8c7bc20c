//! One namespace of a router or DHCP server: its uplink to the portal, its programs, and the
//! attacher for its ports. It has all of these only while guests are behind one of its interfaces;
//! otherwise it is only watched.

use std::sync::Arc;
use std::time::Instant;

use futures_util::StreamExt;
use tokio::sync::mpsc;
use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, info, warn};

use super::uplink_schedule::{Step, Uplink, UplinkSchedule};
use crate::attach::{AttachError, AttachedNamespace, Attacher, Failure, Links, NamespacePorts, Wanted};
use crate::datapath::{DatapathError, NetnsDatapaths, PortalLink};
use crate::directory::Directory;
use crate::ids::NetworkOrRouter;
use crate::inventory::Inventory;
use crate::net::damage::{DamageKind, DamageReports};
use crate::net::netlink::{Link, Netlink, NetlinkError, watch_changes_in};
use crate::net::netns::{Netns, NetnsError};
use crate::net::portal::{HOST_END, Portal, PortalError, PortalUplink};

/// The most interfaces that are listed in the reason why a namespace is idle.
const LISTED: usize = 8;

/// A failure to serve a namespace.
#[derive(Debug, thiserror::Error)]
pub(super) enum NamespaceError {
    #[error(transparent)]
    Netns(#[from] NetnsError),
    #[error(transparent)]
    Datapath(#[from] DatapathError),
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    #[error(transparent)]
    Portal(#[from] PortalError),
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// The uplink was removed externally.
    #[error("{HOST_END} was removed externally")]
    UplinkLost,
}

/// The dependencies that all namespaces share.
pub(super) struct NamespaceContext {
    pub(super) portal: Arc<Portal>,
    pub(super) datapaths: NetnsDatapaths,
    pub(super) legacy_port: u16,
    pub(super) confine_routers: bool,
    pub(super) inventory: Arc<Inventory>,
    pub(super) directory: Arc<Directory>,
    pub(super) damage: DamageReports,
    /// Receives the name of each namespace in which something changed.
    pub(super) changes: mpsc::Sender<Arc<str>>,
}

impl NamespaceContext {
    /// Removes what is pinned for a namespace that is not served any more.
    pub(super) fn remove_state(&mut self, inode: u32) {
        if let Err(error) = self.datapaths.remove(inode) {
            warn!(inode, %error, "cannot remove the state of a namespace");
        }
    }
}

/// One namespace of a router or DHCP server.
pub(super) struct WatchedNamespace {
    pub(super) inode: u32,
    /// Present while the namespace has an uplink.
    pub(super) attacher: Option<Attacher>,
    name: Arc<str>,
    netns: Arc<Netns>,
    netlink: Netlink,
    ports: NamespacePorts,
    schedule: UplinkSchedule,
    /// The reason why no guest can be behind it.
    idle: Option<String>,
    is_reconciled: bool,
    _watch: AbortOnDropHandle<()>,
    /// Announces the end of a delay.
    wake: Option<AbortOnDropHandle<()>>,
}

impl WatchedNamespace {
    /// Watches a namespace for changes. It has no uplink yet.
    pub(super) fn open(
        name: Arc<str>,
        scope: NetworkOrRouter,
        netns: Netns,
        context: &NamespaceContext,
    ) -> Result<Self, NamespaceError> {
        let (inode, netns) = (netns.inode()?, Arc::new(netns));
        let netlink = Netlink::connect_in(&netns)?;
        // The watch runs before the first reconcile, so that no change is missed.
        let mut events = watch_changes_in(&netns)?;
        let (sender, changed) = (context.changes.clone(), Arc::clone(&name));
        let watch = tokio::spawn(async move {
            while events.next().await.is_some() && sender.send(Arc::clone(&changed)).await.is_ok() {}
        });
        let ports = NamespacePorts {
            scope,
            confined: context.confine_routers && scope.is_router(),
            addresses: Vec::new(),
            inventory: Arc::clone(&context.inventory),
        };
        Ok(Self {
            inode,
            attacher: None,
            name,
            netns,
            netlink,
            ports,
            schedule: UplinkSchedule::default(),
            idle: None,
            is_reconciled: false,
            _watch: AbortOnDropHandle::new(watch),
            wake: None,
        })
    }

    /// Reconciles the uplink, and all links and filters of the namespace.
    pub(super) async fn reconcile(&mut self, context: &mut NamespaceContext) -> Result<(), NamespaceError> {
        let reconciled = self.try_reconcile(context).await;
        self.is_reconciled = reconciled.is_ok();
        reconciled
    }

    async fn try_reconcile(&mut self, context: &mut NamespaceContext) -> Result<(), NamespaceError> {
        let links = self.netlink.links().await?;
        self.ports.addresses = self.netlink.ipv4_addresses().await?;
        let is_needed = links.iter().any(|link| self.ports.includes(link));
        self.set_idle((!is_needed).then(|| why_idle(self.ports.interface_prefixes(), &links)));

        // The uplink.
        let uplink = self.uplink(&links);
        match self.schedule.next(uplink, is_needed, Instant::now()) {
            Step::Keep => self.restore_uplink(&links, &context.damage).await?,
            Step::Wait(delay) => {
                let (sender, name) = (context.changes.clone(), Arc::clone(&self.name));
                self.wake = Some(AbortOnDropHandle::new(tokio::spawn(async move {
                    sleep(delay).await;
                    // A closed queue means that the agent stops.
                    drop(sender.send(name).await);
                })));
                // Its programs stay, so that confined packets still go nowhere.
                if uplink == Uplink::Lost {
                    return Err(NamespaceError::UplinkLost);
                }
            }
            Step::Connect => self.connect(context).await?,
            Step::Disconnect => self.disconnect(context),
            Step::Reconnect => {
                self.disconnect(context);
                self.connect(context).await?;
            }
        }
        if self.attacher.is_none() {
            return self.remove_uplink().await;
        }

        // The interfaces and their programs.
        let attached = self.attach(Links::All(links)).await;
        if let Some(attacher) = &mut self.attacher {
            // The event that led here may be about a filter.
            attacher.check_filters().await;
            attacher.reattach_due().await;
        }
        Ok(attached?)
    }

    fn uplink(&self, links: &[Link]) -> Uplink {
        let Some(attacher) = &self.attacher else { return Uplink::Absent };
        let portal = attacher.portal();
        let is_there = links.iter().any(|link| Some(link.index) == portal && link.name == HOST_END);
        if is_there && !self.has_lost_uplink() { Uplink::Connected } else { Uplink::Lost }
    }

    /// Returns true if the portal's end of the uplink is gone, which no event outside it shows.
    pub(super) fn has_lost_uplink(&self) -> bool {
        self.attacher.as_ref().and_then(Attacher::uplink).is_some_and(PortalUplink::is_lost)
    }

    /// Brings the uplink up again if other software changed it.
    async fn restore_uplink(&self, links: &[Link], damage: &DamageReports) -> Result<(), NamespaceError> {
        let Some(uplink) = self.attacher.as_ref().and_then(Attacher::uplink) else { return Ok(()) };
        let Some(link) = links.iter().find(|link| link.index == uplink.outer) else { return Ok(()) };
        if let Some(found) = uplink.damage(link) {
            damage.count(DamageKind::Link);
            uplink.restore_outer(&self.netlink).await?;
            warn!(namespace = %self.name, found, "portal uplink was damaged externally; repaired");
        }
        Ok(())
    }

    /// Connects the namespace to the portal. Nothing is attached yet.
    async fn connect(&mut self, context: &mut NamespaceContext) -> Result<(), NamespaceError> {
        // The uplink, and the programs on it.
        let uplink = context.portal.add_uplink(&self.netlink, self.inode).await?;
        self.netlink.add_ingress_qdisc(uplink.outer).await?;
        let link = PortalLink { ifindex: uplink.outer, nsid: uplink.nsid, mac: uplink.mac };
        let netns = Arc::clone(&self.netns);
        let datapath = context.datapaths.open(Arc::clone(&netns), HOST_END, link, context.legacy_port)?;

        let namespace = AttachedNamespace { name: Arc::clone(&self.name), netns, uplink };
        let (directory, damage) = (Arc::clone(&context.directory), context.damage.clone());
        let netlink = self.netlink.clone();
        self.attacher = Some(Attacher::for_namespace(datapath, netlink, namespace, directory, damage));
        info!(namespace = %self.name, "namespace served");
        Ok(())
    }

    /// Takes all programs off, but leaves the uplink.
    pub(super) fn disconnect(&mut self, context: &mut NamespaceContext) {
        let Some(attacher) = self.attacher.take() else { return };
        info!(namespace = %self.name, reason = self.idle, "namespace not served any more");
        attacher.close();
        context.remove_state(self.inode);
    }

    /// Removes the uplink, which an earlier agent may have left.
    async fn remove_uplink(&self) -> Result<(), NamespaceError> {
        if let Some(uplink) = self.netlink.link(HOST_END).await? {
            self.netlink.delete_link(uplink.index).await?;
        }
        Ok(())
    }

    /// Returns whether the last reconcile succeeded, failures of single interfaces aside.
    pub(super) fn is_reconciled(&self) -> bool {
        self.is_reconciled
    }

    /// Returns true if the namespace has an uplink and an interface that guests are behind.
    pub(super) fn is_served(&self) -> bool {
        self.attacher.is_some() && self.idle.is_none()
    }

    /// Returns the reason why no guest can be behind the namespace.
    pub(super) fn idle(&self) -> Option<&str> {
        self.idle.as_deref()
    }

    fn set_idle(&mut self, idle: Option<String>) {
        if let Some(reason) = &idle
            && self.idle.is_none()
        {
            info!(namespace = %self.name, reason, "no guests are behind namespace");
        }
        self.idle = idle;
    }

    /// Publishes the networks of the interfaces as the newest snapshot knows them.
    pub(super) async fn follow_inventory(&mut self) {
        let Some(attacher) = &self.attacher else { return };
        let links = Links::present(attacher.known_links());
        if let Err(error) = self.attach(links).await {
            warn!(%error, "cannot apply the inventory to a namespace");
        }
    }

    async fn attach(&mut self, links: Links) -> Result<(), AttachError> {
        let Some(attacher) = &mut self.attacher else { return Ok(()) };
        let changes = attacher.reconcile(Wanted::NamespacePorts(&self.ports), links).await?;
        debug!(?changes, "namespace reconciled");
        Ok(())
    }

    /// Returns true if an interface lacks its program.
    pub(super) fn has_missing(&self) -> bool {
        self.attacher.as_ref().is_some_and(Attacher::has_missing)
    }

    /// Returns the failures of its interfaces, or `None` if there are none.
    pub(super) fn error(&self) -> Option<String> {
        summary(&self.attacher.as_ref()?.failures().load())
    }
}

/// Returns the reason why no guest can be behind a namespace with these links.
fn why_idle(prefixes: &[&str], links: &[Link]) -> String {
    let wanted: Vec<_> = prefixes.iter().map(|prefix| format!("{prefix}*")).collect();
    let others = links.iter().map(|link| link.name.as_str());
    let others: Vec<_> = others.filter(|name| !matches!(*name, "lo" | HOST_END)).collect();
    let listed = others.iter().take(LISTED).copied().collect::<Vec<_>>().join(", ");
    let found = match others.len() {
        0 => "none at all".to_owned(),
        1..=LISTED => listed,
        count => format!("{listed} and {} more", count - LISTED),
    };
    format!("no interface {}; found {found}", wanted.join(" or "))
}

/// Returns the failures of one namespace as one error.
fn summary(failures: &[Failure]) -> Option<String> {
    let errors: Vec<_> =
        failures.iter().map(|failure| format!("{}: {}", failure.interface, failure.error)).collect();
    (!errors.is_empty()).then(|| errors.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::IfIndex;

    #[test]
    fn every_failure_of_a_namespace_is_in_its_error() {
        let failure = |interface: &str, error: &str| Failure {
            interface: interface.to_owned(),
            error: error.to_owned(),
        };
        assert_eq!(summary(&[]), None);
        let failures = [failure("qr-1", "cannot attach"), failure("md-portal", "cannot reattach")];
        assert_eq!(summary(&failures).as_deref(), Some("qr-1: cannot attach; md-portal: cannot reattach"));
    }

    #[test]
    fn an_idle_namespace_says_what_it_lacks_and_has() {
        let link = |name: &str| Link {
            index: IfIndex(2),
            name: name.to_owned(),
            mac: None,
            kind: String::new(),
            mtu: 1500,
            up: true,
            controller: None,
            peer_index: None,
            peer_nsid: None,
        };
        let reason = |names: &[&str]| {
            let links: Vec<_> = names.iter().map(|name| link(name)).collect();
            why_idle(&["tap", "ns-"], &links)
        };
        assert_eq!(reason(&["lo", HOST_END]), "no interface tap* or ns-*; found none at all");
        assert_eq!(reason(&["lo", "eth0", "qg-1"]), "no interface tap* or ns-*; found eth0, qg-1");
        let many = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"];
        assert!(reason(&many).ends_with("g, h and 2 more"), "{}", reason(&many));
    }
}
