//! Who is behind each attachment: where attachments of the datapath and ports of the inventory meet, as one immutable
//! table that each request reads without waiting. A change of one attachment costs the same however many there are. Behind an attachment that many guests share is a scope; who a guest
//! there is, is told by its address, and by whoever knows the addresses of the scope ([`ClientDirectory`]).

pub mod clients;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use arc_swap::ArcSwap;
use metadata_ebpf::identity::{AttachmentId, ClientAddress};
use tokio::sync::watch;

use crate::ids::{IfIndex, MacAddress, NetworkId, NetworkOrRouter, VlanId};
use crate::inventory::shards::Shards;
use crate::inventory::{Entry, Port, PortRecord};
use crate::proxy::{
    self, ClientIdentity, ClientLookup, ClientQuery, LookupOutcome, LookupState, UpstreamAuth,
};

/// One attachment and the port behind it.
#[derive(Clone, Debug)]
pub struct Binding {
    /// The interface.
    pub interface: String,
    /// Its index.
    pub index: IfIndex,
    /// The VLAN on it, if it is a trunk's subport.
    pub vlan: Option<VlanId>,
    /// Since when it is attached.
    pub since: Instant,
    /// What is known of it.
    pub owner: Owner,
}

/// An attachment that the guests of a network share, in a network namespace other than the host's.
#[derive(Clone, Debug)]
pub struct SharedBinding {
    /// The namespace.
    pub namespace: Arc<str>,
    /// The interface in it.
    pub interface: String,
    /// Its index there.
    pub index: IfIndex,
    /// Since when it is attached.
    pub since: Instant,
    /// Whose addresses its clients have.
    pub scope: NetworkOrRouter,
}

/// What the inventory says of an attachment.
#[derive(Clone, Debug)]
pub enum Owner {
    /// An instance, and what Nova is told of it.
    Known {
        /// The port.
        port: Arc<Port>,
        /// Its instance, signed.
        identity: Arc<ClientIdentity>,
    },
    /// A port of which the network is known, but not whose it is. Enough for Neutron's metadata agent, which finds that out.
    OnNetwork {
        /// What is known.
        facts: Arc<PortRecord>,
        /// What that agent is told.
        identity: Arc<ClientIdentity>,
    },
    /// No source knows the port.
    Unknown,
    /// Sources contradict each other.
    Disputed,
}

impl Owner {
    /// What an entry of the inventory means to whoever introduces guests so.
    #[must_use]
    pub fn from_entry(entry: &Entry, introduction: &UpstreamAuth) -> Self {
        let on_network = |network: Option<NetworkId>, fixed_ips: &[IpAddr], header| {
            Some(Arc::new(ClientIdentity::on_network(network?, fixed_ips.to_vec(), header)))
        };
        let known = match (entry, introduction) {
            (Entry::Agreed(port), UpstreamAuth::Signed(signer)) => {
                let addresses = port.fixed_ips.clone();
                let identity = ClientIdentity::new(port.instance, &port.project, addresses, signer);
                Some(Self::Known { port: Arc::clone(port), identity: Arc::new(identity) })
            }
            (Entry::Agreed(port), UpstreamAuth::ByNetwork(header)) => {
                on_network(port.network, &port.fixed_ips, *header)
                    .map(|identity| Self::Known { port: Arc::clone(port), identity })
            }
            (Entry::Incomplete(facts), UpstreamAuth::ByNetwork(header)) => {
                on_network(facts.network, &facts.fixed_ips, *header)
                    .map(|identity| Self::OnNetwork { facts: Arc::clone(facts), identity })
            }
            (Entry::Disputed(_), _) => Some(Self::Disputed),
            (Entry::Incomplete(_), UpstreamAuth::Signed(_)) | (Entry::NoInstance(_), _) => None,
        };
        known.unwrap_or(Self::Unknown)
    }

    /// The identity, if requests can be made.
    #[must_use]
    pub fn identity(&self) -> Option<&Arc<ClientIdentity>> {
        match self {
            Self::Known { identity, .. } | Self::OnNetwork { identity, .. } => Some(identity),
            Self::Unknown | Self::Disputed => None,
        }
    }
}

/// Two owners are equal if they were made from the same port: the identity follows from it.
impl PartialEq for Owner {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Known { port, .. }, Self::Known { port: other, .. }) => port == other,
            (Self::OnNetwork { facts, .. }, Self::OnNetwork { facts: other, .. }) => facts == other,
            (Self::Unknown, Self::Unknown) | (Self::Disputed, Self::Disputed) => true,
            _ => false,
        }
    }
}

/// The table of bindings. Each part is written by one task, and all are read by everybody.
#[derive(Debug)]
pub struct Directory {
    table: ArcSwap<Table>,
    version: watch::Sender<u64>,
}

#[derive(Clone, Debug, Default)]
struct Table {
    own: Part<Binding>,
    shared: Part<SharedBinding>,
}

/// What one task writes.
#[derive(Debug)]
struct Part<T> {
    bindings: Shards<AttachmentId, Arc<T>>,
    /// The newest attachment that ever was in it. Ids only grow.
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
    fn change(&mut self, change: &BindingChanges<T>) {
        for id in &change.removed {
            self.bindings.put(id, None);
        }
        for (id, binding) in &change.updated {
            self.bindings.put(id, Some(Arc::clone(binding)));
            self.newest = self.newest.max(Some(*id));
        }
    }

    fn all(&self) -> Vec<(AttachmentId, Arc<T>)> {
        let mut all: Vec<_> = self.bindings.iter().map(|(id, binding)| (*id, Arc::clone(binding))).collect();
        all.sort_unstable_by_key(|(id, _)| *id);
        all
    }
}

/// What changes of a part. The rest stays.
#[derive(Clone, Debug)]
pub struct BindingChanges<T> {
    /// Attachments that are no more.
    pub removed: Vec<AttachmentId>,
    /// Attachments that are new, or known anew.
    pub updated: Vec<(AttachmentId, Arc<T>)>,
}

impl<T> Default for BindingChanges<T> {
    fn default() -> Self {
        Self { removed: Vec::new(), updated: Vec::new() }
    }
}

impl Table {
    /// Whether an attachment that is in neither part was in one. Each part's task attaches and tells by itself, so what is
    /// older than the other's newest may still have to be told.
    fn had(&self, attachment: AttachmentId) -> bool {
        let newest = [self.own.newest, self.shared.newest];
        let oldest = newest.into_iter().flatten().min();
        oldest.is_some_and(|newest| attachment <= newest)
    }
}

impl Default for Directory {
    fn default() -> Self {
        Self { table: ArcSwap::default(), version: watch::Sender::new(0) }
    }
}

impl Directory {
    /// Changes the part of attachments that have one guest each, and wakes the requests that wait for it.
    pub fn publish(&self, change: &BindingChanges<Binding>) {
        self.change(|table| table.own.change(change));
    }

    /// Changes the part of attachments that many guests share, and wakes the requests that wait for it.
    pub fn publish_shared(&self, change: &BindingChanges<SharedBinding>) {
        self.change(|table| table.shared.change(change));
    }

    fn change(&self, change: impl Fn(&mut Table)) {
        self.table.rcu(|table| {
            let mut table = Table::clone(table);
            change(&mut table);
            table
        });
        self.version.send_modify(|version| *version += 1);
    }

    /// Attachments that have one guest each, in order.
    #[must_use]
    pub fn bindings(&self) -> Vec<(AttachmentId, Arc<Binding>)> {
        self.table.load().own.all()
    }

    /// Attachments that many guests share, in order.
    #[must_use]
    pub fn shared(&self) -> Vec<(AttachmentId, Arc<SharedBinding>)> {
        self.table.load().shared.all()
    }

    /// How many attachments there are of either.
    #[must_use]
    pub fn len(&self) -> usize {
        let table = self.table.load();
        table.own.bindings.len() + table.shared.bindings.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl proxy::Directory for Directory {
    /// A dispute is no answer: it is waited for like an unknown port, and never guessed. So is an attachment that is not in
    /// the table yet: the kernel runs the program some milliseconds before it says so (`tcx_entry_sync` waits for an RCU
    /// grace period), and a guest may ask at once.
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
                Owner::Unknown | Owner::Disputed => LookupState::Pending { since: binding.since },
            },
        }
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }
}

/// The directory, with whoever knows the guests that share an attachment.
#[derive(Debug)]
pub struct ClientDirectory<C, S> {
    directory: Arc<Directory>,
    callers: C,
    seen: S,
}

impl<C, S> ClientDirectory<C, S>
where
    S: Fn(&ClientAddress) -> Option<MacAddress>,
{
    /// Puts them together with whoever tells from which MAC address the kernel saw a client send.
    pub const fn new(directory: Arc<Directory>, callers: C, seen: S) -> Self {
        Self { directory, callers, seen }
    }
}

impl<C, S> proxy::Directory for ClientDirectory<C, S>
where
    C: ClientLookup,
    S: Fn(&ClientAddress) -> Option<MacAddress> + Send + Sync + 'static,
{
    fn lookup(&self, client: &ClientAddress) -> LookupState {
        self.directory.lookup(client)
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.directory.changes()
    }

    async fn find(&self, scope: NetworkOrRouter, client: &ClientAddress) -> LookupOutcome {
        self.callers.find(&ClientQuery::of(scope, client, (self.seen)(client))).await
    }
}

#[cfg(test)]
mod shared_tests;
#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::Directory as _;

    fn attachment(id: u32) -> AttachmentId {
        AttachmentId::new(id).unwrap()
    }

    fn change(gone: &[u32], now: &[u32]) -> BindingChanges<Binding> {
        let binding = |id: &u32| Binding {
            interface: format!("tap{id}"),
            index: IfIndex(*id),
            vlan: None,
            since: Instant::now(),
            owner: Owner::Unknown,
        };
        BindingChanges {
            removed: gone.iter().copied().map(attachment).collect(),
            updated: now.iter().map(|id| (attachment(*id), Arc::new(binding(id)))).collect(),
        }
    }

    fn standing(directory: &Directory, id: u32) -> LookupState {
        directory.lookup(&ClientAddress::ipv4(attachment(id), [10, 0, 0, 5]))
    }

    #[test]
    fn an_attachment_that_is_not_told_yet_is_waited_for_and_one_that_was_is_gone() {
        let directory = Directory::default();
        assert!(matches!(standing(&directory, 1), LookupState::Pending { .. }), "before anything is told");
        directory.publish(&change(&[], &[1, 2]));
        assert!(matches!(standing(&directory, 3), LookupState::Pending { .. }));
        directory.publish(&change(&[2], &[]));
        assert!(matches!(standing(&directory, 2), LookupState::Gone));
        assert!(matches!(standing(&directory, 3), LookupState::Pending { .. }));
    }
}
