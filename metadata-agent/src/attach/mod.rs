//! Attaches our program to guest interfaces, and keeps it there.
//!
//! One [`Attacher`] serves one network namespace: the host's, or that of a router or a DHCP server.
//! It compares the links there with those that are [wanted], attaches and detaches, and publishes
//! the differences. It is the only writer of its [`Datapath`]. An interface that cannot be attached
//! is tried again and does not delay the others.
//!
//! The cost of an event depends on the interfaces that it concerns, not on the number of guests.

mod agent_veths;
mod attached;
mod changes;
mod failures;
mod host;
mod names;
mod publish;
pub(crate) mod qdisc;
mod reattach;
mod refusals;
mod wanted;

use std::collections::{BTreeMap, BTreeSet};
use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use metadata_ebpf::identity::AttachmentId;
use tokio::sync::watch;
use tokio::task::yield_now;
use tracing::{debug, info, warn};

use crate::datapath::{Datapath, DatapathError, Hook};
use crate::directory::Directory;
use crate::ids::IfIndex;
use crate::inventory::presence::{Presence, Present};
use crate::net::damage::DamageReports;
use crate::net::netlink::{IngressQdisc, Link, Netlink, NetlinkError};
use crate::net::netns::Netns;
use crate::net::portal::{HOST_END, PortalError, PortalUplink};
use crate::process::progress::Progress;
use attached::{Attached, Kernel};
use failures::{FailureTable, Step};
use names::Names;
use publish::{BindingPublisher, InterfaceRecord};
use qdisc::QdiscError;
use reattach::MissingPrograms;
use wanted::{AttachSpec, Clients, Target};

pub(crate) use changes::{Changes, Links};
pub(crate) use failures::{Failure, Failures};
pub(crate) use host::{HostWatcher, Subscribers};
pub(crate) use reattach::{PATROL, REATTACH};
pub(crate) use refusals::{RefusalEpisodes, RefusalWatcher};
pub(crate) use wanted::{GuestRules, LinkKind, NamespacePorts, SourceCheck, Wanted};

/// The interval at which a full reconcile publishes its changes.
const PUBLISH_EVERY: Duration = Duration::from_millis(100);

/// A failure to attach, detach or reattach.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AttachError {
    #[error(transparent)]
    Datapath(#[from] DatapathError),
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    #[error(transparent)]
    Qdisc(#[from] QdiscError),
    #[error(transparent)]
    Portal(#[from] PortalError),
}

/// The network namespace of an attacher, unless it is the host's.
pub(crate) struct AttachedNamespace {
    pub(crate) name: Arc<str>,
    pub(crate) netns: Arc<Netns>,
    /// The veth pair from the namespace into the portal.
    pub(crate) uplink: PortalUplink,
}

/// The guest interfaces of one network namespace.
pub(crate) struct Attacher {
    datapath: Datapath,
    netlink: Netlink,
    namespace: Option<AttachedNamespace>,
    attached: BTreeMap<IfIndex, Attached>,
    /// Interfaces that are not an instance's, and so take the host's own path.
    bypassed: BTreeMap<IfIndex, (Link, Option<Present>)>,
    /// Attached interfaces that lack their program.
    missing: MissingPrograms,
    failures: FailureTable,
    damage: DamageReports,
    /// Counts the interfaces of a full reconcile.
    progress: Progress,
    /// Interfaces that are attached, bypassed or failed.
    names: Names,
    publisher: BindingPublisher,
}

impl Attacher {
    /// An attacher for the host's namespace. Nothing is attached yet.
    fn for_host(
        datapath: Datapath,
        netlink: Netlink,
        directory: Arc<Directory>,
        presence: watch::Sender<Presence>,
        damage: DamageReports,
        progress: Progress,
    ) -> Self {
        let publisher = BindingPublisher::new(directory, Some(presence));
        Self { progress, ..Self::new(datapath, netlink, None, publisher, damage) }
    }

    /// Creates an attacher for another namespace. `netlink` must be a socket in it. Nothing is
    /// attached yet.
    pub(crate) fn for_namespace(
        datapath: Datapath,
        netlink: Netlink,
        namespace: AttachedNamespace,
        directory: Arc<Directory>,
        damage: DamageReports,
    ) -> Self {
        Self::new(datapath, netlink, Some(namespace), BindingPublisher::new(directory, None), damage)
    }

    fn new(
        datapath: Datapath,
        netlink: Netlink,
        namespace: Option<AttachedNamespace>,
        publisher: BindingPublisher,
        damage: DamageReports,
    ) -> Self {
        Self {
            datapath,
            netlink,
            namespace,
            attached: BTreeMap::new(),
            bypassed: BTreeMap::new(),
            missing: MissingPrograms::default(),
            failures: FailureTable::default(),
            damage,
            progress: Progress::default(),
            names: Names::default(),
            publisher,
        }
    }

    /// Attaches what is wanted, detaches what is not, updates the rest, and publishes the
    /// differences.
    ///
    /// The failure of one interface is recorded and does not affect the others.
    ///
    /// # Errors
    /// State of an earlier agent cannot be listed or removed.
    pub(crate) async fn reconcile(
        &mut self,
        wanted: Wanted<'_>,
        links: Links,
    ) -> Result<Changes, AttachError> {
        let (present, gone, is_complete) = match links {
            Links::All(links) => {
                let present: BTreeSet<IfIndex> = links.iter().map(|link| link.index).collect();
                let gone = self.names.all().filter(|index| !present.contains(index)).collect();
                (links, gone, true)
            }
            Links::Some { present, gone } => (present, gone, false),
        };
        let (mut all, mut unpublished) = (Changes::default(), Changes::default());

        // Interfaces that are gone.
        for index in gone {
            self.detach(index, &mut unpublished).await;
        }

        // Announce all interfaces to the sources before the first is attached.
        let mut listed = BTreeSet::new();
        if is_complete {
            let to_attach = present.iter().filter(|link| matches!(wanted.target(link), Target::Attach(_)));
            self.progress.begin(to_attach.count());
            listed = self.publisher.publish_listed(present.iter().filter_map(|link| wanted.present(link)));
        }

        // Attach or update the present interfaces, each by the latest inventory.
        let mut published = Instant::now();
        for link in present {
            self.apply(link, wanted, is_complete, &mut unpublished).await;
            // Guests that are attached already do not wait for the last one.
            if is_complete && published.elapsed() >= PUBLISH_EVERY {
                self.publish(&unpublished);
                all.extend(mem::take(&mut unpublished));
                published = Instant::now();
            }
            // An attachment takes the kernel some ten milliseconds (`synchronize_rcu` in
            // tcx_entry_sync). Yield, so that signals and the admin socket are served.
            yield_now().await;
        }

        // Withdraw the interfaces that could not be attached.
        listed.retain(|index| !self.attached.contains_key(index) && !self.bypassed.contains_key(index));
        unpublished.detached.extend(listed);

        // Remove the state of earlier agents, now that live attachments are adopted.
        let cleaned = if is_complete { self.remove_leftovers().await } else { Ok(()) };
        self.publish(&unpublished);
        all.extend(unpublished);
        cleaned.map(|()| all)
    }

    /// Retries failed interfaces against the current links.
    ///
    /// # Errors
    /// As [`Self::reconcile`].
    async fn retry(&mut self, wanted: Wanted<'_>, links: Vec<Link>) -> Result<Changes, AttachError> {
        for index in self.failures.to_remove() {
            self.remove_filter(index, &self.name_of(index)).await;
        }
        let mut gone = self.failures.to_reconcile();
        let present = links.into_iter().filter(|link| gone.remove(&link.index)).collect();
        let gone = gone.into_iter().collect();
        self.reconcile(wanted, Links::Some { present, gone }).await
    }

    /// Returns whether anything failed that [`Self::retry`] may help.
    fn has_failed(&self) -> bool {
        !self.failures.to_reconcile().is_empty() || !self.failures.to_remove().is_empty()
    }

    async fn apply(
        &mut self,
        link: Link,
        wanted: Wanted<'_>,
        is_full_reconcile: bool,
        changes: &mut Changes,
    ) {
        match wanted.target(&link) {
            Target::Ignore => self.detach(link.index, changes).await,
            Target::Bypass(present) => self.bypass(link, present, changes).await,
            Target::Attach(spec) => {
                if self.bypassed.remove(&link.index).is_some() {
                    changes.updated.insert(link.index);
                }
                // If events were lost, an interface may have been removed and its index reused.
                if self.is_replaced(link.index) {
                    self.detach(link.index, changes).await;
                }
                self.names.set(link.index, &link.name);
                if self.attached.contains_key(&link.index) {
                    self.update(link, *spec, changes);
                } else {
                    self.attach(link, *spec, is_full_reconcile, changes).await;
                }
                if is_full_reconcile {
                    self.progress.step();
                }
            }
        }
    }

    /// Returns true if the interface that was attached at this index is gone.
    fn is_replaced(&self, index: IfIndex) -> bool {
        self.datapath.is_replaced(index).unwrap_or_else(|error| {
            warn!(ifindex = %index, %error, "cannot look for the interface of an attachment");
            false
        })
    }

    /// Leaves an interface to the host's own path.
    async fn bypass(&mut self, link: Link, present: Option<Present>, changes: &mut Changes) {
        let index = link.index;
        let before = self.bypassed.remove(&index);
        if before.is_none() {
            info!(interface = link.name, "not an instance's port; its packets are not redirected");
            self.detach(index, changes).await;
        }
        if before.is_none_or(|(_, before)| before != present) {
            changes.updated.insert(index);
        }
        self.names.set(index, &link.name);
        self.bypassed.insert(index, (link, present));
    }

    fn update(&mut self, link: Link, spec: AttachSpec, changes: &mut Changes) {
        let Self { datapath, failures, namespace, attached, .. } = self;
        let namespace = namespace.as_ref().map(|namespace| &*namespace.name);
        if let Some(attached) = attached.get_mut(&link.index) {
            attached.update(link, spec, &mut Kernel { datapath, failures, namespace }, changes);
        }
    }

    async fn attach(&mut self, link: Link, spec: AttachSpec, is_full_reconcile: bool, changes: &mut Changes) {
        let index = link.index;
        match self.try_attach(&link, &spec, is_full_reconcile).await {
            Ok(attached) => {
                let id = attached.id;
                let interface = &link.name;
                match spec.clients {
                    Clients::Agent => {
                        debug!(interface, ifindex = %index, attachment = %id, "own interface attached");
                    }
                    Clients::One(_) | Clients::Shared(_) => {
                        info!(namespace = self.label(), interface, ifindex = %index, attachment = %id, "guest interface attached");
                    }
                }
                self.failures.clear(index, Step::Attach);
                self.attached.entry(index).or_insert(attached);
                changes.attached.insert(index);
                self.update(link, spec, changes);
            }
            Err(error) => {
                // It may have been announced.
                if self.attached.remove(&index).is_some() {
                    changes.detached.insert(index);
                }
                self.record_failure((index, &link.name), Step::Attach, &error);
            }
        }
    }

    /// Adopts the attachment of an earlier agent, or makes a new one.
    async fn try_attach(
        &mut self,
        link: &Link,
        spec: &AttachSpec,
        is_full_reconcile: bool,
    ) -> Result<Attached, AttachError> {
        if let Some(id) = self.datapath.adopt(link.index, &link.name)? {
            self.add_routes(id).await?;
            return Ok(Attached::new(id, link.clone(), spec, None));
        }
        let id = self.datapath.reserve_id()?;
        // Add the return routes before the first packet can arrive.
        self.add_routes(id).await?;
        let attached = || Attached::new(id, link.clone(), spec, Some(spec.policy.clone()));
        if !is_full_reconcile && self.datapath.hook() == Hook::Tcx {
            self.announce(attached());
        }
        if let Err(error) = self.attach_program(id, link, spec).await {
            self.remove_routes(id).await?;
            return Err(error);
        }
        Ok(self.attached.remove(&link.index).unwrap_or_else(attached))
    }

    /// Publishes an attachment that is about to be made, so that the first request of a guest is
    /// answered at once.
    ///
    /// The kernel runs the program some milliseconds before the call returns (`tcx_entry_sync`
    /// waits for an RCU grace period). A filter is attached when the call returns. A
    /// full reconcile does not announce, to save the extra publish.
    fn announce(&mut self, attached: Attached) {
        let index = attached.link.index;
        self.attached.insert(index, attached);
        self.publisher.publish([(index, self.record(index))].into());
    }

    async fn attach_program(
        &mut self,
        id: AttachmentId,
        link: &Link,
        spec: &AttachSpec,
    ) -> Result<(), AttachError> {
        let qdisc = match self.datapath.hook() {
            Hook::Tcx => None,
            Hook::Clsact => Some(qdisc::ensure(&self.netlink, &self.datapath, link.index).await?),
        };
        let is_new_qdisc = qdisc == Some(IngressQdisc::Created);
        let attached = self.datapath.attach(id, link.index, &link.name, link.mac, is_new_qdisc, &spec.policy);
        if attached.is_err() {
            if is_new_qdisc {
                qdisc::delete_unused(&self.netlink, link.index).await.map_err(QdiscError::from)?;
            }
            self.remove_filter(link.index, &link.name).await;
        }
        Ok(attached?)
    }

    /// Detaches from an interface that is gone or not wanted. Does nothing if it is not known.
    async fn detach(&mut self, index: IfIndex, changes: &mut Changes) {
        self.names.forget(index);
        self.failures.clear_interface(index);
        if self.bypassed.remove(&index).is_some() {
            changes.detached.insert(index);
        }
        let Some(attached) = self.attached.remove(&index) else { return };
        let is_agents = attached.is_agents();
        let Attached { id, link, .. } = attached;
        self.missing.forget(index);
        changes.detached.insert(index);
        if is_agents {
            debug!(interface = link.name, attachment = %id, "own interface detached");
        } else {
            info!(namespace = self.label(), interface = link.name, attachment = %id, "guest interface detached");
        }
        let detached = self.datapath.detach(index).map(drop).map_err(AttachError::from);
        self.remove_filter(index, &link.name).await;
        let unrouted = self.remove_routes(id).await;
        if let Err(error) = detached.and(unrouted) {
            self.record_failure((index, &link.name), Step::Remove, &error);
        }
    }

    /// Removes the filter, if any, of an interface that no longer needs it.
    async fn remove_filter(&mut self, index: IfIndex, interface: &str) {
        match self.try_remove_filter(index).await {
            Ok(()) => self.failures.clear(index, Step::Remove),
            Err(error) => self.record_failure((index, interface), Step::Remove, &error),
        }
    }

    async fn try_remove_filter(&self, index: IfIndex) -> Result<(), AttachError> {
        let Some(filter) = self.datapath.filter(index) else { return Ok(()) };
        let links = self.netlink.links().await?;
        let netns = self.namespace.as_ref().map(|namespace| &*namespace.netns);
        qdisc::remove_filter(&self.netlink, netns, &links, filter).await?;
        Ok(self.datapath.forget_filter(index)?)
    }

    /// Removes the links, entries and filters of interfaces that are not attached. An earlier agent
    /// may have left them, or an attempt to remove them failed. With TCX, every filter is one of an
    /// earlier agent.
    async fn remove_leftovers(&mut self) -> Result<(), AttachError> {
        self.datapath.remove_orphans()?;
        let filters = self.datapath.filters()?.into_iter().map(|filter| filter.index);
        let unused =
            filters.filter(|index| !self.attached.contains_key(index) || self.datapath.hook() == Hook::Tcx);
        for index in unused.chain(self.failures.to_remove()).collect::<BTreeSet<_>>() {
            self.remove_filter(index, &self.name_of(index)).await;
        }
        Ok(())
    }

    /// Routes answers to the clients of an attachment back into its namespace.
    async fn add_routes(&self, id: AttachmentId) -> Result<(), AttachError> {
        match &self.namespace {
            Some(namespace) => Ok(namespace.uplink.add_routes(id).await?),
            None => Ok(()),
        }
    }

    async fn remove_routes(&self, id: AttachmentId) -> Result<(), AttachError> {
        match &self.namespace {
            Some(namespace) => Ok(namespace.uplink.remove_routes(id).await?),
            None => Ok(()),
        }
    }

    /// Publishes the interfaces that changed, and the failures.
    fn publish(&mut self, changes: &Changes) {
        if !changes.is_empty() {
            let records = changes.interfaces().into_iter().map(|index| (index, self.record(index)));
            let records = records.collect();
            self.publisher.publish(records);
        }
        self.failures.publish();
    }

    fn record(&self, index: IfIndex) -> InterfaceRecord {
        let namespace = self.namespace.as_ref().map(|namespace| &namespace.name);
        match (self.attached.get(&index), self.bypassed.get(&index)) {
            (Some(attached), _) => attached.record(namespace),
            (None, Some((_, present))) => {
                InterfaceRecord { present: present.clone(), ..InterfaceRecord::default() }
            }
            (None, None) => InterfaceRecord::default(),
        }
    }

    /// Withdraws all that was published, and closes the attacher. What is in the kernel stays.
    pub(crate) fn close(mut self) {
        self.publisher.withdraw();
    }

    fn into_datapath(self) -> Datapath {
        self.datapath
    }

    /// The links that are attached or bypassed.
    pub(crate) fn known_links(&self) -> Vec<Link> {
        let attached = self.attached.values().map(|attached| &attached.link);
        attached.chain(self.bypassed.values().map(|(link, _)| link)).cloned().collect()
    }

    /// The link of that name, if it is attached or bypassed.
    fn link_named(&self, name: &str) -> Option<Link> {
        let index = self.names.interface(name)?;
        let attached = self.attached.get(&index).map(|attached| &attached.link);
        attached.or_else(|| self.bypassed.get(&index).map(|(link, _)| link)).cloned()
    }

    /// The interface that leads to the portal.
    pub(crate) fn portal(&self) -> Option<IfIndex> {
        self.datapath.portal()
    }

    /// The uplink to the portal, unless the namespace is the host's.
    pub(crate) fn uplink(&self) -> Option<&PortalUplink> {
        self.namespace.as_ref().map(|namespace| &namespace.uplink)
    }

    pub(crate) fn failures(&self) -> Failures {
        self.failures.handle()
    }

    fn record_failure(&mut self, interface: (IfIndex, &str), step: Step, error: &AttachError) {
        let namespace = self.namespace.as_ref().map(|namespace| &*namespace.name);
        self.failures.record(namespace, interface, step, error.to_string());
    }

    fn is_portal(&self, index: IfIndex) -> bool {
        self.datapath.portal() == Some(index)
    }

    fn name_of(&self, index: IfIndex) -> String {
        match self.attached.get(&index) {
            Some(attached) => attached.link.name.clone(),
            None if self.is_portal(index) => HOST_END.to_owned(),
            None => format!("interface {index}"),
        }
    }

    /// The namespace for log lines; nothing for the host's.
    fn label(&self) -> Option<&str> {
        self.namespace.as_ref().map(|namespace| &*namespace.name)
    }
}
