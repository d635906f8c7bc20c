//! The port behind each attachment.
//!
//! Attachments of the datapath and ports of the inventory meet here. The cost of a change does not
//! depend on the number of attachments.
//!
//! The identity of each port is ready for use in a [`ClientTable`], which requests read. When the
//! shared secrets are replaced, all identities are signed again
//! (`docs/design/signed-outside-the-proxy.md`).
//!
//! Guests that share an attachment are looked up by their address ([`clients`]).

pub(crate) mod clients;
mod credentials;
mod owner;

use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use arc_swap::ArcSwap;
use metadata_ebpf::identity::AttachmentId;
use tokio_util::sync::CancellationToken;

pub use credentials::Credentials;
pub(crate) use credentials::UpstreamAuth;
pub use owner::Owner;

use crate::data_plane::{ClientEntry, ClientTable, EntryChanges};
use crate::ids::{IfIndex, NetworkOrRouter, VlanId};
use crate::inventory::shards::Shards;
use crate::secrets::Signer;

/// The number of identities that are signed again before other tasks get a turn.
const SIGNED_AT_ONCE: usize = 256;

/// An attachment of one guest, and the port behind it.
#[derive(Clone, Debug)]
pub struct Binding {
    pub interface: String,
    pub index: IfIndex,
    /// The VLAN id of a trunk's subport.
    pub vlan: Option<VlanId>,
    /// The time of its attachment.
    pub since: Instant,
    /// The start of the wait for an identity, if none is known: the attachment, or the loss of the
    /// last identity.
    pub unknown_since: Instant,
    pub owner: Owner,
}

/// An attachment in a network namespace, which all guests of a network share.
#[derive(Clone, Debug)]
pub(crate) struct SharedBinding {
    pub namespace: Arc<str>,
    pub interface: String,
    /// The index in the namespace.
    pub index: IfIndex,
    /// The time of its attachment.
    pub since: Instant,
    /// The network or router to which the guests' addresses belong.
    pub scope: NetworkOrRouter,
}

/// An attachment of either kind.
#[derive(Clone, Debug)]
pub(crate) enum AnyBinding {
    Own(Arc<Binding>),
    Shared(Arc<SharedBinding>),
}

/// The table of bindings. Two tasks each write a part of it; all readers see both.
#[derive(Debug)]
pub struct Directory {
    table: ArcSwap<Table>,
    /// Held by writers only.
    writing: Mutex<()>,
    clients: Arc<ClientTable>,
    credentials: Credentials,
}

#[derive(Clone, Debug, Default)]
struct Table {
    /// Attachments of one guest each.
    own: Part<Binding>,
    shared: Part<SharedBinding>,
    /// The attachment by which the agent sends requests to itself. It is not a guest's.
    agent: Option<(AttachmentId, IfIndex)>,
}

/// The part of the table that one task writes.
#[derive(Clone, Debug)]
struct Part<T>(Shards<AttachmentId, Arc<T>>);

impl<T> Default for Part<T> {
    fn default() -> Self {
        Self(Shards::default())
    }
}

impl<T> Part<T> {
    fn apply(&mut self, changes: &BindingChanges<T>) {
        for id in &changes.removed {
            self.0.put(id, None);
        }
        for (id, binding) in &changes.updated {
            self.0.put(id, Some(Arc::clone(binding)));
        }
    }

    fn sorted(&self) -> Vec<(AttachmentId, Arc<T>)> {
        let mut all: Vec<_> = self.0.iter().map(|(id, binding)| (*id, Arc::clone(binding))).collect();
        all.sort_unstable_by_key(|(id, _)| *id);
        all
    }
}

/// Changes of one part of the table. Other bindings stay.
#[derive(Clone, Debug)]
pub struct BindingChanges<T> {
    pub removed: Vec<AttachmentId>,
    /// New or changed bindings.
    pub updated: Vec<(AttachmentId, Arc<T>)>,
}

impl<T> Default for BindingChanges<T> {
    fn default() -> Self {
        Self { removed: Vec::new(), updated: Vec::new() }
    }
}

impl<T> BindingChanges<T> {
    /// Returns the changes of the clients behind these attachments.
    fn of_clients(&self, entry: impl Fn(&T) -> ClientEntry) -> EntryChanges {
        let removed = self.removed.iter().map(|id| (*id, None));
        let updated = self.updated.iter().map(|(id, binding)| (*id, Some(entry(binding))));
        removed.chain(updated).collect()
    }
}

impl Directory {
    /// Creates an empty directory.
    #[must_use]
    pub fn new(credentials: Credentials) -> Self {
        let clients = Arc::new(ClientTable::new(credentials.secret_status()));
        Self { table: ArcSwap::default(), writing: Mutex::default(), clients, credentials }
    }

    /// Returns the clients of all attachments.
    #[must_use]
    pub fn clients(&self) -> &Arc<ClientTable> {
        &self.clients
    }

    /// Changes the attachments of one guest each, and wakes the requests that wait for one.
    pub fn publish(&self, changes: &BindingChanges<Binding>) {
        let _writing = self.writing();
        self.update(|table| table.own.apply(changes));
        self.clients.apply(changes.of_clients(|binding| self.entry(binding)));
    }

    /// Changes the shared attachments, and wakes the requests that wait for one.
    pub(crate) fn publish_shared(&self, changes: &BindingChanges<SharedBinding>) {
        let _writing = self.writing();
        self.update(|table| table.shared.apply(changes));
        self.clients.apply(changes.of_clients(|binding| ClientEntry::Shared(binding.scope)));
    }

    /// Replaces the agent's own attachment.
    pub(crate) fn publish_agent(&self, agent: Option<(AttachmentId, IfIndex)>) {
        let _writing = self.writing();
        let former = self.agent().filter(|former| Some(*former) != agent);
        self.update(|table| table.agent = agent);
        let removed = former.map(|(id, _)| (id, None));
        let updated = agent.map(|(id, _)| (id, Some(ClientEntry::Agent)));
        self.clients.apply(removed.into_iter().chain(updated).collect());
    }

    /// Returns the agent's own attachment and its interface.
    pub(crate) fn agent(&self) -> Option<(AttachmentId, IfIndex)> {
        self.table.load().agent
    }

    /// Signs all identities again whenever the shared secrets are replaced, until cancelled.
    pub async fn follow_secrets(&self, stop: CancellationToken) {
        match &self.credentials {
            Credentials::Signed(signer) => {
                let _stopped = stop.run_until_cancelled(self.follow(signer)).await;
            }
            Credentials::ByNetwork(_) => stop.cancelled().await,
        }
    }

    async fn follow(&self, signer: &Signer) -> Infallible {
        loop {
            let generation = signer.generation();
            self.renew_identities().await;
            signer.replaced(generation).await;
        }
    }

    /// Signs the identities again that were signed with earlier secrets. Whatever is published
    /// meanwhile is signed with the secrets in force.
    async fn renew_identities(&self) {
        let outdated = {
            // A writer may be signing with the earlier secrets.
            let _writing = self.writing();
            self.clients.outdated()
        };
        for turn in outdated.chunks(SIGNED_AT_ONCE) {
            {
                let _writing = self.writing();
                let table = self.table.load();
                // It may have been removed meanwhile.
                let binding = |id: &AttachmentId| Some((*id, table.own.0.get(id)?));
                let bindings = turn.iter().filter_map(binding);
                self.clients.apply(bindings.map(|(id, own)| (id, Some(self.entry(own)))).collect());
            }
            tokio::task::yield_now().await;
        }
    }

    fn entry(&self, binding: &Binding) -> ClientEntry {
        match self.credentials.identity(&binding.owner) {
            Some(identity) => ClientEntry::Known(identity),
            None => ClientEntry::Unknown { since: binding.unknown_since },
        }
    }

    /// Must be called by the one writer.
    fn update(&self, update: impl FnOnce(&mut Table)) {
        let mut table = Table::clone(&self.table.load());
        update(&mut table);
        self.table.store(Arc::new(table));
    }

    fn writing(&self) -> MutexGuard<'_, ()> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the attachments of one guest each, in order.
    #[must_use]
    pub(crate) fn bindings(&self) -> Vec<(AttachmentId, Arc<Binding>)> {
        self.table.load().own.sorted()
    }

    /// Returns the shared attachments, in order.
    #[must_use]
    pub(crate) fn shared(&self) -> Vec<(AttachmentId, Arc<SharedBinding>)> {
        self.table.load().shared.sorted()
    }

    /// Returns an attachment.
    #[must_use]
    pub(crate) fn binding(&self, id: AttachmentId) -> Option<AnyBinding> {
        let table = self.table.load();
        let own = table.own.0.get(&id).map(|own| AnyBinding::Own(Arc::clone(own)));
        own.or_else(|| Some(AnyBinding::Shared(Arc::clone(table.shared.0.get(&id)?))))
    }

    /// Returns the number of all attachments.
    #[must_use]
    pub(crate) fn len(&self) -> usize {
        let table = self.table.load();
        table.own.0.len() + table.shared.0.len()
    }
}

#[cfg(test)]
mod tests;
