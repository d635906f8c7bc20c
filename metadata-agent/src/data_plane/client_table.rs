//! The client behind each attachment, as requests need it: one immutable table that each request
//! reads without waiting.
//!
//! The directory writes the table of the control process, and a [`TableFeed`] carries every change
//! to the table of the data plane, which answers guests.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use metadata_ebpf::identity::{AttachmentId, ClientAddress};
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};
use tokio::time::timeout;

use super::removed::RemovedAttachments;
use crate::ids::{MacAddress, NetworkOrRouter};
use crate::inventory::shards::Shards;
use crate::proxy::{ClientDirectory, ClientIdentity, LookupState, SecretStatus};

/// Most entries that a feed returns at once.
const AT_ONCE: usize = 256;

/// The client, or clients, of an attachment.
#[derive(Clone, Debug)]
pub enum ClientEntry {
    /// Requests can be made on behalf of this client.
    Known(Arc<ClientIdentity>),
    /// Requests cannot be made for it: not yet, or not any more.
    Unknown {
        /// The attachment, or the loss of its identity.
        since: Instant,
    },
    /// Guests that share the attachment are looked up by their addresses on this network or router.
    Shared(NetworkOrRouter),
    /// The agent itself, which sends requests through the datapath.
    Agent,
}

/// The entries of all attachments.
#[derive(Debug)]
pub struct ClientTable {
    entries: ArcSwap<Shards<AttachmentId, ClientEntry>>,
    /// Held by writers only.
    writing: Mutex<Writing>,
    removed: Mutex<RemovedAttachments>,
    version: watch::Sender<u64>,
    /// The version that the reader of the last feed has.
    copied: watch::Sender<u64>,
    secrets: Arc<SecretStatus>,
}

/// State that every change concerns, besides the entries.
#[derive(Debug, Default)]
struct Writing {
    feeds: Vec<Weak<FeedState>>,
    /// The networks and routers of shared attachments, and the number of these.
    scopes: HashMap<NetworkOrRouter, usize>,
}

impl Writing {
    fn count_scope(&mut self, before: Option<&ClientEntry>, after: Option<&ClientEntry>) {
        if let Some(ClientEntry::Shared(scope)) = after {
            *self.scopes.entry(*scope).or_default() += 1;
        }
        if let Some(ClientEntry::Shared(scope)) = before
            && let Entry::Occupied(mut count) = self.scopes.entry(*scope)
        {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

/// Changes of some entries, or their removal. Other entries stay.
pub type EntryChanges = BTreeMap<AttachmentId, Option<ClientEntry>>;

impl ClientTable {
    /// Creates an empty table for identities that are signed with these secrets.
    #[must_use]
    pub fn new(secrets: Arc<SecretStatus>) -> Self {
        Self {
            entries: ArcSwap::default(),
            writing: Mutex::default(),
            removed: Mutex::default(),
            version: watch::Sender::default(),
            copied: watch::Sender::default(),
            secrets,
        }
    }

    /// Changes entries, and wakes the requests that wait for one.
    pub fn apply(&self, changes: EntryChanges) {
        let mut writing = self.writing();
        // Before they are missing from the table.
        let removed = changes.iter().filter(|(_, entry)| entry.is_none()).map(|(id, _)| *id);
        self.removed().extend(removed);
        let mut entries = Shards::clone(&self.entries.load());
        let ids: Vec<_> = changes.keys().copied().collect();
        for (id, entry) in changes {
            writing.count_scope(entries.get(&id), entry.as_ref());
            entries.put(&id, entry);
        }
        self.entries.store(Arc::new(entries));
        // Readers of a feed then read these entries or later ones.
        writing.feeds.retain(|feed| feed.upgrade().is_some_and(|feed| feed.note(ids.iter().copied())));
        drop(writing);
        self.version.send_modify(|version| *version += 1);
    }

    /// Returns the attachments whose identities were signed with earlier secrets.
    pub(crate) fn outdated(&self) -> Vec<AttachmentId> {
        let is_outdated = |entry: &ClientEntry| match entry {
            ClientEntry::Known(identity) => identity.is_outdated(&self.secrets),
            ClientEntry::Unknown { .. } | ClientEntry::Shared(_) | ClientEntry::Agent => false,
        };
        let entries = self.entries.load();
        entries.iter().filter(|(_, entry)| is_outdated(entry)).map(|(id, _)| *id).collect()
    }

    /// Returns whether guests on this network or router share an attachment.
    pub(crate) fn is_shared(&self, scope: NetworkOrRouter) -> bool {
        self.writing().scopes.contains_key(&scope)
    }

    /// Returns everything in this table, as a feed, and then every change.
    #[must_use]
    pub fn feed(self: &Arc<Self>) -> TableFeed {
        let mut writing = self.writing();
        let state = Arc::new(FeedState::default());
        state.note(self.entries.load().iter().map(|(id, _)| *id));
        state.note(self.removed().ids());
        writing.feeds.push(Arc::downgrade(&state));
        // Its reader has nothing yet.
        self.copied.send_replace(0);
        drop(writing);
        TableFeed { table: Arc::clone(self), state }
    }

    /// Notes the version that the reader of a feed has.
    pub(super) fn acknowledge(&self, version: u64) {
        self.copied.send_replace(version);
    }

    /// Waits until the reader of the last feed has every change of now, but no longer than `limit`.
    pub(crate) async fn copied_within(&self, limit: Duration) {
        let version = *self.version.borrow();
        let mut copied = self.copied.subscribe();
        let _ = timeout(limit, copied.wait_for(|copied| *copied >= version)).await;
    }

    fn writing(&self) -> MutexGuard<'_, Writing> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn removed(&self) -> MutexGuard<'_, RemovedAttachments> {
        self.removed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ClientDirectory for ClientTable {
    /// A disputed port counts as unknown, so the request waits; the directory never guesses.
    ///
    /// So does an attachment that is not in the table yet. The kernel runs the program some
    /// milliseconds before it reports the attachment (`tcx_entry_sync` waits for an RCU grace
    /// period), and a guest may connect at once.
    fn lookup(&self, client: &ClientAddress) -> LookupState {
        match self.entries.load().get(&client.attachment) {
            Some(ClientEntry::Known(identity)) => LookupState::Known(Arc::clone(identity)),
            Some(ClientEntry::Unknown { since }) => LookupState::Pending { since: *since },
            Some(ClientEntry::Shared(scope)) => LookupState::Shared(*scope),
            Some(ClientEntry::Agent) => LookupState::Agent,
            None if self.removed().contains(client.attachment) => LookupState::Gone,
            None => LookupState::Pending { since: Instant::now() },
        }
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    fn guest_mac(&self, client: &ClientAddress) -> Option<MacAddress> {
        client.mac().map(MacAddress)
    }

    fn secrets(&self) -> Arc<SecretStatus> {
        Arc::clone(&self.secrets)
    }
}

/// The changes of a table, for one reader. A slow reader gets the latest state of each entry, and
/// delays no writer.
#[derive(Debug)]
pub struct TableFeed {
    table: Arc<ClientTable>,
    state: Arc<FeedState>,
}

#[derive(Debug, Default)]
struct FeedState {
    changed: Mutex<HashSet<AttachmentId>>,
    wake: Notify,
}

impl FeedState {
    /// Returns true always.
    fn note(&self, ids: impl IntoIterator<Item = AttachmentId>) -> bool {
        self.changed().extend(ids);
        self.wake.notify_one();
        true
    }

    fn changed(&self) -> MutexGuard<'_, HashSet<AttachmentId>> {
        self.changed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TableFeed {
    /// Waits for changes. Cancelling the wait loses none.
    pub async fn next(&self) -> EntryRecords {
        loop {
            if let Some(records) = self.take() {
                return records;
            }
            self.state.wake.notified().await;
        }
    }

    /// Returns changes that are there already.
    fn take(&self) -> Option<EntryRecords> {
        // Every change up to this version has been noted.
        let version = *self.table.version.borrow();
        let (ids, is_all) = {
            let mut changed = self.state.changed();
            let ids: Vec<_> = changed.iter().copied().take(AT_ONCE).collect();
            for id in &ids {
                changed.remove(id);
            }
            (ids, changed.is_empty())
        };
        if ids.is_empty() {
            return None;
        }
        // A change after this notes its id again.
        let entries = self.table.entries.load();
        let record = |id: AttachmentId| (id.get(), entries.get(&id).map(EntryRecord::from));
        let entries = ids.into_iter().map(record).collect();
        Some(EntryRecords { entries, version: is_all.then_some(version) })
    }
}

/// [`EntryChanges`] in a message.
#[derive(Debug, Deserialize, Serialize)]
pub struct EntryRecords {
    entries: Vec<(u32, Option<EntryRecord>)>,
    /// The version of the table that is complete with these.
    pub(super) version: Option<u64>,
}

#[derive(Debug, Deserialize, Serialize)]
enum EntryRecord {
    Known(Arc<ClientIdentity>),
    Unknown { age: Duration },
    Shared(NetworkOrRouter),
    Agent,
}

impl From<&ClientEntry> for EntryRecord {
    fn from(entry: &ClientEntry) -> Self {
        match entry {
            ClientEntry::Known(identity) => Self::Known(Arc::clone(identity)),
            ClientEntry::Unknown { since } => Self::Unknown { age: since.elapsed() },
            ClientEntry::Shared(scope) => Self::Shared(*scope),
            ClientEntry::Agent => Self::Agent,
        }
    }
}

impl EntryRecords {
    /// Returns the changes for a table of this process.
    #[must_use]
    pub fn into_changes(self) -> EntryChanges {
        let now = Instant::now();
        let entry = |record| match record {
            EntryRecord::Known(identity) => ClientEntry::Known(identity),
            EntryRecord::Unknown { age } => {
                ClientEntry::Unknown { since: now.checked_sub(age).unwrap_or(now) }
            }
            EntryRecord::Shared(scope) => ClientEntry::Shared(scope),
            EntryRecord::Agent => ClientEntry::Agent,
        };
        let change = |(id, record): (u32, Option<_>)| Some((AttachmentId::new(id)?, record.map(entry)));
        self.entries.into_iter().filter_map(change).collect()
    }
}
