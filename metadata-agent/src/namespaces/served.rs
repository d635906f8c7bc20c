//! One namespace that is served: its uplink to the portal, its programs, and the attacher for its
//! ports.

use std::sync::Arc;

use futures_util::StreamExt;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, warn};

use crate::attach::{AttachError, AttachedNamespace, Attacher, Failure, Links, NamespacePorts, Wanted};
use crate::datapath::{DatapathError, NetnsDatapaths, PortalLink};
use crate::directory::Directory;
use crate::ids::NetworkOrRouter;
use crate::inventory::Inventory;
use crate::net::netlink::{Netlink, NetlinkError, watch_changes_in};
use crate::net::netns::{Netns, NetnsError};
use crate::net::portal::{HOST_END, Portal, PortalError};

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
    #[error("{HOST_END} is gone")]
    UplinkLost,
}

/// The dependencies that all served namespaces share.
pub(super) struct NamespaceContext {
    pub(super) portal: Portal,
    pub(super) datapaths: NetnsDatapaths,
    pub(super) legacy_port: u16,
    pub(super) confine_routers: bool,
    pub(super) inventory: Arc<Inventory>,
    pub(super) directory: Arc<Directory>,
    /// Receives the name of each namespace in which something changed.
    pub(super) changes: mpsc::Sender<Arc<str>>,
}

/// One namespace that is served.
pub(super) struct ServedNamespace {
    pub(super) inode: u32,
    pub(super) attacher: Attacher,
    netlink: Netlink,
    ports: NamespacePorts,
    is_reconciled: bool,
    _watch: AbortOnDropHandle<()>,
}

impl ServedNamespace {
    /// Connects a namespace to the portal, and watches it for changes. Nothing is attached yet.
    pub(super) async fn open(
        name: Arc<str>,
        scope: NetworkOrRouter,
        netns: Netns,
        context: &mut NamespaceContext,
    ) -> Result<Self, NamespaceError> {
        let (inode, netns) = (netns.inode()?, Arc::new(netns));
        let netlink = Netlink::connect_in(&netns)?;
        // The watch runs before the first reconcile, so that no change is missed.
        let mut events = watch_changes_in(&netns)?;

        // The uplink, and the programs on it.
        let uplink = context.portal.add_uplink(&netlink, inode).await?;
        netlink.add_ingress_qdisc(uplink.outer).await?;
        let link = PortalLink { ifindex: uplink.outer, nsid: uplink.nsid, mac: uplink.mac };
        let datapath = context.datapaths.open(Arc::clone(&netns), HOST_END, link, context.legacy_port)?;

        let (sender, changed) = (context.changes.clone(), Arc::clone(&name));
        let watch = tokio::spawn(async move {
            while events.next().await.is_some() && sender.send(Arc::clone(&changed)).await.is_ok() {}
        });
        let namespace = AttachedNamespace { name, netns, uplink };
        let directory = Arc::clone(&context.directory);
        Ok(Self {
            inode,
            attacher: Attacher::for_namespace(datapath, netlink.clone(), namespace, directory),
            netlink,
            ports: NamespacePorts {
                scope,
                confined: context.confine_routers && scope.is_router(),
                addresses: Vec::new(),
                inventory: Arc::clone(&context.inventory),
            },
            is_reconciled: false,
            _watch: AbortOnDropHandle::new(watch),
        })
    }

    /// Reconciles all links and filters of the namespace.
    pub(super) async fn reconcile(&mut self) -> Result<(), NamespaceError> {
        let reconciled = self.try_reconcile().await;
        self.is_reconciled = reconciled.is_ok();
        reconciled
    }

    async fn try_reconcile(&mut self) -> Result<(), NamespaceError> {
        let links = self.netlink.links().await?;
        let portal = self.attacher.portal();
        if !links.iter().any(|link| Some(link.index) == portal && link.name == HOST_END) {
            return Err(NamespaceError::UplinkLost);
        }
        self.ports.addresses = self.netlink.ipv4_addresses().await?;
        let attached = self.attach(Links::All(links)).await;
        // The event that led here may be about a filter.
        self.attacher.check_filters().await;
        self.attacher.reattach_due().await;
        Ok(attached?)
    }

    /// Returns whether the last reconcile succeeded, failures of single interfaces aside.
    pub(super) fn is_reconciled(&self) -> bool {
        self.is_reconciled
    }

    /// Publishes the networks of the interfaces as the newest snapshot knows them.
    pub(super) async fn follow_inventory(&mut self) {
        if let Err(error) = self.attach(Links::present(self.attacher.known_links())).await {
            warn!(%error, "cannot apply the inventory to a namespace");
        }
    }

    async fn attach(&mut self, links: Links) -> Result<(), AttachError> {
        let changes = self.attacher.reconcile(Wanted::NamespacePorts(&self.ports), links).await?;
        debug!(?changes, "namespace reconciled");
        Ok(())
    }

    /// Returns the failures of its interfaces, or `None` if there are none.
    pub(super) fn error(&self) -> Option<String> {
        summary(&self.attacher.failures().load())
    }
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
}
