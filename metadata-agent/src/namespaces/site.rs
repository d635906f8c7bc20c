//! One namespace that guests are served in: its way into the portal, the fronts of its programs, and its attachments.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use futures_util::StreamExt;
use metadata_ebpf::abi::MAX_PORT_IPV4;
use metadata_ebpf::identity::AttachmentId;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
use tracing::{info, warn};

use crate::attach::qdisc::{self, ClassifierError};
use crate::datapath::{Datapath, DatapathError, Hook, NetnsDatapaths, PortPolicy, PortalLink};
use crate::directory::SharedBinding;
use crate::ids::{IfIndex, NetworkId, NetworkOrRouter};
use crate::inventory::{Entry, Snapshot};
use crate::net::netlink::{Link, Netlink, NetlinkError, watch_changes_in};
use crate::net::netns::{Netns, NetnsError};
use crate::net::portal::{HOST_END, Portal, PortalError, PortalUplink};

/// A step that could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum SiteError {
    /// Into the namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// In the kernel side.
    #[error(transparent)]
    Datapath(#[from] DatapathError),
    /// With links.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// Into the portal.
    #[error(transparent)]
    Portal(#[from] PortalError),
    /// With a filter.
    #[error(transparent)]
    Classifier(#[from] ClassifierError),
    /// Somebody removed our interface.
    #[error("{HOST_END} is gone")]
    WayLost,
    /// More subnets than the kernel side has room for.
    #[error("{interface} is in {count} IPv4 subnets: guests in those beyond {MAX_PORT_IPV4} are not served")]
    Subnets {
        /// The interface.
        interface: String,
        /// How many.
        count: usize,
    },
}

/// What all sites are made with.
pub(super) struct NamespaceContext {
    pub(super) portal: Portal,
    pub(super) branches: NetnsDatapaths,
    pub(super) legacy_port: u16,
    pub(super) confine_routers: bool,
    /// Hears of the sites that something changed in.
    pub(super) changes: mpsc::Sender<Arc<str>>,
}

/// One namespace.
pub(super) struct Site {
    pub(super) inode: u32,
    pub(super) name: Arc<str>,
    pub(super) scope: NetworkOrRouter,
    pub(super) confined: bool,
    netns: Arc<Netns>,
    pub(super) netlink: Netlink,
    pub(super) annex: PortalUplink,
    pub(super) datapath: Datapath,
    pub(super) attached: BTreeMap<IfIndex, Attached>,
    /// Interfaces that lack their program, and since when.
    pub(super) missing: BTreeMap<IfIndex, Instant>,
    _watch: AbortOnDropHandle<()>,
}

pub(super) struct Attached {
    id: AttachmentId,
    pub(super) link: Link,
    since: Instant,
}

impl Site {
    pub(super) async fn open(
        name: Arc<str>,
        scope: NetworkOrRouter,
        netns: Netns,
        workshop: &mut NamespaceContext,
    ) -> Result<Self, SiteError> {
        let (inode, netns) = (netns.inode()?, Arc::new(netns));
        let netlink = Netlink::connect_in(&netns)?;
        let mut events = watch_changes_in(&netns)?;
        let annex = workshop.portal.add_uplink(&netlink, inode).await?;
        netlink.add_ingress_qdisc(annex.outer).await?;
        let link = PortalLink { ifindex: annex.outer, nsid: annex.nsid, mac: annex.mac };
        let datapath = workshop.branches.open(Arc::clone(&netns), HOST_END, link, workshop.legacy_port)?;
        let (changes, site) = (workshop.changes.clone(), Arc::clone(&name));
        let watch = tokio::spawn(async move {
            while events.next().await.is_some() && changes.send(Arc::clone(&site)).await.is_ok() {}
        });
        let confined = workshop.confine_routers && scope.is_router();
        Ok(Self {
            inode,
            name,
            scope,
            confined,
            netns,
            netlink,
            annex,
            datapath,
            attached: BTreeMap::new(),
            missing: BTreeMap::new(),
            _watch: AbortOnDropHandle::new(watch),
        })
    }

    /// The way back stands before the first packet comes.
    pub(super) async fn attach(&mut self, link: &Link, policy: &PortPolicy) -> Result<(), SiteError> {
        let adopted = self.datapath.adopt(link.index, &link.name)?;
        let id = if let Some(id) = adopted {
            self.annex.add_routes(id).await?;
            self.datapath.set_policy(link.index, None, policy)?;
            id
        } else {
            let id = self.datapath.reserve_id()?;
            self.annex.add_routes(id).await?;
            if let Err(error) = self.attach_as(id, link, policy).await {
                self.annex.remove_routes(id).await?;
                return Err(error);
            }
            id
        };
        info!(namespace = %self.name, interface = link.name, attachment = %id, "shared interface attached");
        self.attached.insert(link.index, Attached { id, link: link.clone(), since: Instant::now() });
        Ok(())
    }

    async fn attach_as(
        &mut self,
        id: AttachmentId,
        link: &Link,
        policy: &PortPolicy,
    ) -> Result<(), SiteError> {
        let made_qdisc = self.datapath.hook() == Hook::Clsact
            && qdisc::provide_qdisc(&self.netlink, &self.datapath, link.index).await?;
        let attached = self.datapath.attach(id, link.index, &link.name, made_qdisc, policy);
        if attached.is_err() && made_qdisc {
            qdisc::delete_unused_qdisc(&self.netlink, link.index).await?;
        }
        Ok(attached?)
    }

    pub(super) async fn let_go(&mut self, index: IfIndex, links: &[Link]) -> Result<(), SiteError> {
        let Some(attached) = self.attached.remove(&index) else { return Ok(()) };
        self.missing.remove(&index);
        info!(
            namespace = %self.name, interface = attached.link.name, attachment = %attached.id,
            "shared interface let go"
        );
        self.datapath.detach(index)?;
        self.take_filter_off(index, links).await?;
        Ok(self.annex.remove_routes(attached.id).await?)
    }

    pub(super) async fn take_filter_off(&self, index: IfIndex, links: &[Link]) -> Result<(), SiteError> {
        let Some(mark) = self.datapath.filter(index) else { return Ok(()) };
        qdisc::take_off_in(&self.netns, &self.netlink, links, mark).await?;
        Ok(self.datapath.forget_filter(index)?)
    }

    /// What the proxy is told. A source that knows the network behind an interface narrows a router down to it.
    pub(super) fn bindings(
        &self,
        snapshot: &Snapshot,
    ) -> impl Iterator<Item = (AttachmentId, SharedBinding)> {
        self.attached.iter().map(|(index, attached)| {
            let Attached { id, link, since } = attached;
            let network = match self.scope {
                NetworkOrRouter::Network(network) => Some(network),
                NetworkOrRouter::Router(_) => network_of(link, snapshot),
            };
            let binding = SharedBinding {
                namespace: Arc::clone(&self.name),
                interface: link.name.clone(),
                index: *index,
                since: *since,
                scope: network.map_or(self.scope, NetworkOrRouter::Network),
            };
            (*id, binding)
        })
    }
}

fn network_of(link: &Link, snapshot: &Snapshot) -> Option<NetworkId> {
    match snapshot.find(&link.name, link.mac).ok()?? {
        Entry::Agreed(port) => port.network,
        Entry::Incomplete(facts) | Entry::NoInstance(facts) => facts.network,
        Entry::Disputed(_) => {
            warn!(interface = link.name, "sources contradict each other about a router's port");
            None
        }
    }
}
