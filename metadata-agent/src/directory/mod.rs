//! The port behind each attachment.
//!
//! Attachments of the datapath and ports of the inventory meet here, in one immutable table that
//! each request reads without waiting. The cost of a change does not depend on the number of
//! attachments.
//!
//! The table holds the identity of each port beside its binding, ready for use. When the shared
//! secrets are replaced, all identities are signed again
//! (`docs/design/signed-outside-the-proxy.md`).
//!
//! Guests that share an attachment are looked up by their address ([`clients`]).

pub(crate) mod clients;
mod credentials;
mod owner;
mod removed;

use std::convert::Infallible;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use arc_swap::ArcSwap;
use metadata_ebpf::identity::{AttachmentId, ClientAddress};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub use credentials::Credentials;
pub(crate) use credentials::UpstreamAuth;
pub use owner::Owner;
use removed::RemovedAttachments;

use crate::ids::{IfIndex, MacAddress, NetworkOrRouter, VlanId};
use crate::inventory::shards::Shards;
use crate::proxy::{ClientDirectory, ClientIdentity, LookupState, SecretStatus};
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
    removed: Mutex<RemovedAttachments>,
    version: watch::Sender<u64>,
    credentials: Credentials,
    guest_macs: GuestMacs,
}

/// Returns the MAC address from which the kernel saw a guest send.
struct GuestMacs(Box<GuestMac>);

type GuestMac = dyn Fn(&ClientAddress) -> Option<MacAddress> + Send + Sync;

impl fmt::Debug for GuestMacs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GuestMacs")
    }
}

#[derive(Clone, Debug, Default)]
struct Table {
    /// Attachments of one guest each.
    own: Part<OwnAttachment>,
    shared: Part<Arc<SharedBinding>>,
}

/// An attachment of one guest, as requests need it.
#[derive(Clone, Debug)]
struct OwnAttachment {
    binding: Arc<Binding>,
    /// `None` if requests cannot be made for the owner.
    identity: Option<Arc<ClientIdentity>>,
}

/// The part of the table that one task writes.
#[derive(Clone, Debug)]
struct Part<T>(Shards<AttachmentId, T>);

impl<T> Default for Part<T> {
    fn default() -> Self {
        Self(Shards::default())
    }
}

impl<T: Clone> Part<T> {
    fn apply<B>(&mut self, changes: &BindingChanges<B>, attachment: impl Fn(&Arc<B>) -> T) {
        for id in &changes.removed {
            self.0.put(id, None);
        }
        for (id, binding) in &changes.updated {
            self.0.put(id, Some(attachment(binding)));
        }
    }

    fn sorted<B>(&self, binding: impl Fn(&T) -> &Arc<B>) -> Vec<(AttachmentId, Arc<B>)> {
        let all = self.0.iter();
        let mut all: Vec<_> = all.map(|(id, attachment)| (*id, Arc::clone(binding(attachment)))).collect();
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

impl Directory {
    /// Creates an empty directory. `guest_mac` returns the MAC address from which the kernel saw a
    /// guest send.
    #[must_use]
    pub fn new(
        credentials: Credentials,
        guest_mac: impl Fn(&ClientAddress) -> Option<MacAddress> + Send + Sync + 'static,
    ) -> Self {
        Self {
            table: ArcSwap::default(),
            writing: Mutex::default(),
            removed: Mutex::default(),
            version: watch::Sender::default(),
            credentials,
            guest_macs: GuestMacs(Box::new(guest_mac)),
        }
    }

    /// Changes the attachments of one guest each, and wakes the requests that wait for one.
    pub fn publish(&self, changes: &BindingChanges<Binding>) {
        self.remember(&changes.removed);
        self.update(|table| table.own.apply(changes, |binding| self.own_attachment(binding)));
    }

    /// Changes the shared attachments, and wakes the requests that wait for one.
    pub(crate) fn publish_shared(&self, changes: &BindingChanges<SharedBinding>) {
        self.remember(&changes.removed);
        self.update(|table| table.shared.apply(changes, Arc::clone));
    }

    /// Remembers removed attachments, before they are missing from the table.
    fn remember(&self, removed: &[AttachmentId]) {
        self.removed().extend(removed.iter().copied());
    }

    fn removed(&self) -> MutexGuard<'_, RemovedAttachments> {
        self.removed.lock().unwrap_or_else(PoisonError::into_inner)
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

    /// Signs the identities again that were signed with earlier secrets.
    async fn renew_identities(&self) {
        let outdated = self.outdated();
        for turn in outdated.chunks(SIGNED_AT_ONCE) {
            self.update(|table| {
                for id in turn {
                    // It may have been removed meanwhile.
                    let binding = table.own.0.get(id).map(|own| Arc::clone(&own.binding));
                    table.own.0.put(id, binding.map(|binding| self.own_attachment(&binding)));
                }
            });
            tokio::task::yield_now().await;
        }
    }

    /// Lists the identities that were signed with earlier secrets. Whatever is published later is
    /// signed with the secrets in force.
    fn outdated(&self) -> Vec<AttachmentId> {
        let secrets = self.credentials.secret_status();
        // A writer may be signing with the earlier secrets.
        let _writing = self.writing();
        let table = self.table.load();
        let outdated = |own: &OwnAttachment| own.identity.as_ref().is_some_and(|id| id.is_outdated(&secrets));
        table.own.0.iter().filter(|(_, own)| outdated(own)).map(|(id, _)| *id).collect()
    }

    fn own_attachment(&self, binding: &Arc<Binding>) -> OwnAttachment {
        OwnAttachment { binding: Arc::clone(binding), identity: self.credentials.identity(&binding.owner) }
    }

    fn update(&self, update: impl FnOnce(&mut Table)) {
        let writing = self.writing();
        let mut table = Table::clone(&self.table.load());
        update(&mut table);
        self.table.store(Arc::new(table));
        drop(writing);
        self.version.send_modify(|version| *version += 1);
    }

    fn writing(&self) -> MutexGuard<'_, ()> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the attachments of one guest each, in order.
    #[must_use]
    pub(crate) fn bindings(&self) -> Vec<(AttachmentId, Arc<Binding>)> {
        self.table.load().own.sorted(|own| &own.binding)
    }

    /// Returns the shared attachments, in order.
    #[must_use]
    pub(crate) fn shared(&self) -> Vec<(AttachmentId, Arc<SharedBinding>)> {
        self.table.load().shared.sorted(|binding| binding)
    }

    /// Returns an attachment.
    #[must_use]
    pub(crate) fn binding(&self, id: AttachmentId) -> Option<AnyBinding> {
        let table = self.table.load();
        let own = table.own.0.get(&id).map(|own| AnyBinding::Own(Arc::clone(&own.binding)));
        own.or_else(|| Some(AnyBinding::Shared(Arc::clone(table.shared.0.get(&id)?))))
    }

    /// Returns the number of all attachments.
    #[must_use]
    pub(crate) fn len(&self) -> usize {
        let table = self.table.load();
        table.own.0.len() + table.shared.0.len()
    }
}

impl ClientDirectory for Directory {
    /// A disputed port counts as unknown, so the request waits; the directory never guesses.
    ///
    /// So does an attachment that is not in the table yet. The kernel runs the program some
    /// milliseconds before it reports the attachment (`tcx_entry_sync` waits for an RCU grace
    /// period), and a guest may connect at once.
    fn lookup(&self, client: &ClientAddress) -> LookupState {
        let table = self.table.load();
        if let Some(shared) = table.shared.0.get(&client.attachment) {
            return LookupState::Shared(shared.scope);
        }
        match table.own.0.get(&client.attachment) {
            None if self.removed().contains(client.attachment) => LookupState::Gone,
            None => LookupState::Pending { since: Instant::now() },
            Some(OwnAttachment { identity: Some(identity), .. }) => LookupState::Known(Arc::clone(identity)),
            Some(OwnAttachment { identity: None, binding }) => {
                LookupState::Pending { since: binding.unknown_since }
            }
        }
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    fn guest_mac(&self, client: &ClientAddress) -> Option<MacAddress> {
        self.guest_macs.0(client)
    }

    fn secrets(&self) -> Arc<SecretStatus> {
        self.credentials.secret_status()
    }
}

#[cfg(test)]
mod tests;
