//! The port behind each attachment.
//!
//! Attachments of the datapath and ports of the inventory meet here, in one immutable table that
//! each request reads without waiting. The cost of a change does not depend on the number of
//! attachments.
//!
//! Guests that share an attachment are looked up by their address ([`clients`]).

pub(crate) mod clients;

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use arc_swap::ArcSwap;
use metadata_ebpf::identity::{AttachmentId, ClientAddress};
use tokio::sync::watch;

use crate::ids::{IfIndex, MacAddress, NetworkOrRouter, PortId, VlanId};
use crate::inventory::shards::Shards;
use crate::inventory::{Entry, Port, PortAddressing, PortRecord};
use crate::proxy::{ClientDirectory, ClientIdentity, ForwardedAddresses, LookupState, UpstreamAuth};

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

/// The inventory's knowledge of an attachment.
#[derive(Clone, Debug)]
pub enum Owner {
    /// The instance is known.
    Known { port: Arc<Port>, identity: Arc<ClientIdentity> },
    /// The network and an address are known, but not the instance. This is enough for Neutron's
    /// metadata agent.
    OnNetwork { record: Arc<PortRecord>, identity: Arc<ClientIdentity> },
    /// No source knows the port.
    Unknown,
    /// Sources contradict each other.
    Disputed,
}

impl Owner {
    /// Derives the owner from an inventory entry, with an identity for this kind of upstream.
    #[must_use]
    pub(crate) fn from_entry(entry: &Entry, auth: &UpstreamAuth) -> Self {
        // Without an address to forward, the port is unknown, and its requests wait.
        let on_network = |addressing: &PortAddressing, header, instance| {
            let addresses = ForwardedAddresses::new(header, addressing.confirmed_ips(), addressing.mac)?;
            let network = addressing.network?;
            Some(Arc::new(ClientIdentity::on_network(network, header, addresses, instance)))
        };
        let owner = match (entry, auth) {
            (Entry::Agreed(port), UpstreamAuth::Signed(signer)) => {
                let addresses = port.addressing.fixed_ips.clone();
                let identity = ClientIdentity::new(port.instance, &port.project, addresses, signer);
                Some(Self::Known { port: Arc::clone(port), identity: Arc::new(identity) })
            }
            (Entry::Agreed(port), UpstreamAuth::ByNetwork(header)) => {
                on_network(&port.addressing, *header, Some(port.instance))
                    .map(|identity| Self::Known { port: Arc::clone(port), identity })
            }
            (Entry::Incomplete(record), UpstreamAuth::ByNetwork(header)) => {
                let instance = record.tenant.as_ref().map(|tenant| tenant.instance);
                on_network(&record.addressing, *header, instance)
                    .map(|identity| Self::OnNetwork { record: Arc::clone(record), identity })
            }
            (Entry::Disputed(_), _) => Some(Self::Disputed),
            (Entry::Incomplete(_), UpstreamAuth::Signed(_)) | (Entry::NoInstance(_), _) => None,
        };
        owner.unwrap_or(Self::Unknown)
    }

    /// Returns Neutron's id of the port, if it is known.
    #[must_use]
    pub(crate) fn port_id(&self) -> Option<PortId> {
        match self {
            Self::Known { port, .. } => port.id,
            Self::OnNetwork { record, .. } => record.id,
            Self::Unknown | Self::Disputed => None,
        }
    }

    /// Returns the network and the addresses, if the port is known.
    pub(crate) fn addressing(&self) -> Option<&PortAddressing> {
        match self {
            Self::Known { port, .. } => Some(&port.addressing),
            Self::OnNetwork { record, .. } => Some(&record.addressing),
            Self::Unknown | Self::Disputed => None,
        }
    }

    /// Returns the identity, if requests can be made.
    #[must_use]
    pub(crate) fn identity(&self) -> Option<&Arc<ClientIdentity>> {
        match self {
            Self::Known { identity, .. } | Self::OnNetwork { identity, .. } => Some(identity),
            Self::Unknown | Self::Disputed => None,
        }
    }

    /// Returns true if `next` lacks the identity that this owner has.
    pub(crate) fn is_lost_in(&self, next: &Self) -> bool {
        self.identity().is_some() && next.identity().is_none()
    }
}

/// Two owners are equal if they were made from the same port: the identity follows from it.
impl PartialEq for Owner {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Known { port, .. }, Self::Known { port: other, .. }) => port == other,
            (Self::OnNetwork { record, .. }, Self::OnNetwork { record: other, .. }) => record == other,
            (Self::Unknown, Self::Unknown) | (Self::Disputed, Self::Disputed) => true,
            _ => false,
        }
    }
}

/// The table of bindings. Two tasks each write a part of it; all readers see both.
#[derive(Debug, Default)]
pub struct Directory {
    table: ArcSwap<Table>,
    version: watch::Sender<u64>,
    guest_macs: Option<GuestMacs>,
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
    own: Part<Binding>,
    shared: Part<SharedBinding>,
}

/// The part of the table that one task writes.
#[derive(Debug)]
struct Part<T> {
    bindings: Shards<AttachmentId, Arc<T>>,
    /// The newest attachment that was ever in this part. Attachment ids only grow.
    newest: Option<AttachmentId>,
}

impl<T> Clone for Part<T> {
    fn clone(&self) -> Self {
        Self { bindings: self.bindings.clone(), newest: self.newest }
    }
}

impl<T> Default for Part<T> {
    fn default() -> Self {
        Self { bindings: Shards::default(), newest: None }
    }
}

impl<T> Part<T> {
    fn apply(&mut self, changes: &BindingChanges<T>) {
        for id in &changes.removed {
            self.bindings.put(id, None);
        }
        for (id, binding) in &changes.updated {
            self.bindings.put(id, Some(Arc::clone(binding)));
            self.newest = self.newest.max(Some(*id));
        }
    }

    fn sorted(&self) -> Vec<(AttachmentId, Arc<T>)> {
        let mut all: Vec<_> = self.bindings.iter().map(|(id, binding)| (*id, Arc::clone(binding))).collect();
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

impl Table {
    /// Returns whether an attachment that is missing was once in the table.
    ///
    /// Each part's task attaches and publishes by itself. So an attachment that is older than the
    /// newest of one part may still be missing from the other.
    fn had(&self, attachment: AttachmentId) -> bool {
        let newest = [self.own.newest, self.shared.newest];
        let oldest = newest.into_iter().flatten().min();
        oldest.is_some_and(|newest| attachment <= newest)
    }
}

impl Directory {
    /// Creates an empty directory. `guest_mac` returns the MAC address from which the kernel saw a
    /// guest send.
    #[must_use]
    pub fn new(guest_mac: impl Fn(&ClientAddress) -> Option<MacAddress> + Send + Sync + 'static) -> Self {
        Self { guest_macs: Some(GuestMacs(Box::new(guest_mac))), ..Self::default() }
    }

    /// Changes the attachments of one guest each, and wakes the requests that wait for one.
    pub fn publish(&self, changes: &BindingChanges<Binding>) {
        self.update(|table| table.own.apply(changes));
    }

    /// Changes the shared attachments, and wakes the requests that wait for one.
    pub(crate) fn publish_shared(&self, changes: &BindingChanges<SharedBinding>) {
        self.update(|table| table.shared.apply(changes));
    }

    fn update(&self, update: impl Fn(&mut Table)) {
        self.table.rcu(|table| {
            let mut table = Table::clone(table);
            update(&mut table);
            table
        });
        self.version.send_modify(|version| *version += 1);
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
        let own = table.own.bindings.get(&id).map(|binding| AnyBinding::Own(Arc::clone(binding)));
        own.or_else(|| Some(AnyBinding::Shared(Arc::clone(table.shared.bindings.get(&id)?))))
    }

    /// Returns the number of all attachments.
    #[must_use]
    pub(crate) fn len(&self) -> usize {
        let table = self.table.load();
        table.own.bindings.len() + table.shared.bindings.len()
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
        if let Some(shared) = table.shared.bindings.get(&client.attachment) {
            return LookupState::Shared(shared.scope);
        }
        match table.own.bindings.get(&client.attachment) {
            None if !table.had(client.attachment) => LookupState::Pending { since: Instant::now() },
            None => LookupState::Gone,
            Some(binding) => match &binding.owner {
                Owner::Known { identity, .. } | Owner::OnNetwork { identity, .. } => {
                    LookupState::Known(Arc::clone(identity))
                }
                Owner::Unknown | Owner::Disputed => LookupState::Pending { since: binding.unknown_since },
            },
        }
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    fn guest_mac(&self, client: &ClientAddress) -> Option<MacAddress> {
        self.guest_macs.as_ref().and_then(|GuestMacs(guest_mac)| guest_mac(client))
    }
}

#[cfg(test)]
mod tests;
