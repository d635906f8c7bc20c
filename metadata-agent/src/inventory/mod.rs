//! What the agent knows of ports: which instance, project and network are behind a kernel interface.
//!
//! Sources send [`Event`]s; one [`Publisher`] folds them, batch by batch, and publishes the outcome as an
//! immutable [`Snapshot`] that any number of readers load without waiting. What the snapshot says is a function
//! of the last event of each key of each source: the order in which they came is of no consequence.
//!
//! What a source says of a port may be any part of it: a port is known once its instance and its project are known
//! from the sources together, and unknown until then. A project counts only from a source that names the same
//! instance; where none does, the port's own project stands in. A port whose instance or project is disputed, or a
//! device that several ports fit equally well, is a conflict, and is never guessed: it takes a source that was asked
//! to judge between the very instances that are named, and that one of the others agrees with. A port of which Neutron
//! says that it is not an instance's, and nobody else that it is, is nobody's. Nothing here is remembered past the
//! event that withdraws it, so an address or a device that passes to another instance cannot bring back the old one.
//!
//! A subport of a trunk is its parent's instance's, and is found by its parent and its VLAN id, never by a device.
//!
//! This module knows nothing of where events come from, nor of who asks.

mod changes;
mod claim;
mod device;
mod ledger;
mod port;
mod prefix;
pub mod presence;
pub(crate) mod shards;
mod snapshot;
mod trunk;

use std::sync::Arc;

use arc_swap::{ArcSwap, Guard};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

pub use device::{DeviceName, DeviceNameError};
use ledger::Ledger;
pub use port::{DeviceOwner, Event, Port, PortRecord, SourceKind, Tenant};
pub use prefix::{AddressPrefix, AddressPrefixError};
pub use snapshot::{Ambiguous, Counts, Dispute, Entry, Ownership, PortKey, Resolution, Snapshot};
pub use trunk::{Subport, TrunkBinding};

/// Events that are folded before the outcome is published, at most.
const MAX_BATCH: usize = 1024;

/// The readers' side.
#[derive(Debug)]
pub struct Inventory {
    snapshot: ArcSwap<Snapshot>,
    version: watch::Receiver<u64>,
}

/// The one writer's side.
#[derive(Debug)]
pub struct Publisher {
    inventory: Arc<Inventory>,
    version: watch::Sender<u64>,
    ledger: Ledger,
}

impl Inventory {
    /// An empty inventory, and the publisher that fills it.
    #[must_use]
    pub fn new() -> (Arc<Self>, Publisher) {
        let (sender, version) = watch::channel(0);
        let inventory = Arc::new(Self { snapshot: ArcSwap::default(), version });
        let publisher =
            Publisher { inventory: Arc::clone(&inventory), version: sender, ledger: Ledger::default() };
        (inventory, publisher)
    }

    /// What is known now. Never waits.
    pub fn load(&self) -> Guard<Arc<Snapshot>> {
        self.snapshot.load()
    }

    /// Ticks after each new snapshot, with its version.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.version.clone()
    }
}

impl Publisher {
    /// Folds events until all senders are gone or the agent stops.
    pub async fn run(mut self, mut events: mpsc::Receiver<Event>, cancel: CancellationToken) {
        let mut batch = Vec::with_capacity(MAX_BATCH);
        loop {
            let received = tokio::select! {
                () = cancel.cancelled() => return,
                received = events.recv_many(&mut batch, MAX_BATCH) => received,
            };
            if received == 0 {
                return;
            }
            self.publish(batch.drain(..));
        }
    }

    /// Folds one batch and publishes the outcome, if that differs from the last.
    fn publish(&mut self, batch: impl IntoIterator<Item = Event>) {
        for event in batch {
            self.ledger.apply(event);
        }
        if let Some(snapshot) = self.ledger.settle() {
            let version = snapshot.version();
            self.inventory.snapshot.store(Arc::new(snapshot));
            self.version.send_replace(version);
        }
    }
}

#[cfg(test)]
mod tests;
