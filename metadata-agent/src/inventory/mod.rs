//! Inventory of ports: the instance, project and network behind each kernel interface.
//!
//! Sources send [`Event`]s. One [`Publisher`] applies them in batches and publishes the result as
//! an immutable [`Snapshot`], which any number of readers load without waiting. A snapshot depends
//! on the last event of each key of each source, not on the order of the events.
//!
//! - A source may report any part of a port. A port is known once the sources together know its
//!   instance and project. A project counts only from a source that names the same instance;
//!   without one, the port's own project is used.
//! - If sources disagree about a port's instance or project, or several ports match a device, the
//!   port is not served. A dispute is settled only by a source that was asked to arbitrate between
//!   exactly the named instances, and only if another source names the same instance.
//! - If Neutron reports that a port does not belong to an instance, and no source names one, the
//!   port is not served.
//! - Nothing outlives the event that withdraws it, so an address or a device that moves to another
//!   instance cannot be attributed to the previous one.
//! - A subport of a trunk belongs to the instance of its parent. It is found by its parent and VLAN
//!   id, never by a device.
//!
//! This module does not know where events come from, or for what snapshots are used.

mod device;
mod ledger;
mod merge;
mod port;
mod prefix;
pub(crate) mod presence;
pub(crate) mod refused;
pub(crate) mod shards;
mod snapshot;
mod source_policy;

use std::sync::Arc;

use arc_swap::{ArcSwap, Guard};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

pub use device::{DeviceName, DeviceNameError};
use ledger::Ledger;
pub use port::{
    DeviceOwner, Event, Port, PortAddressing, PortRecord, SourceKind, Subport, Tenant, TrunkBinding,
};
pub use prefix::{AddressPrefix, AddressPrefixError};
pub use snapshot::{AmbiguousPortError, Counts, Dispute, Entry, Ownership, Snapshot};
pub use source_policy::{AllowedSource, SourcePolicy};

/// Maximum number of events that are applied before a snapshot is published.
const MAX_BATCH: usize = 1024;

/// Readers' handle.
#[derive(Debug)]
pub struct Inventory {
    snapshot: ArcSwap<Snapshot>,
    version: watch::Receiver<u64>,
}

/// Writer's handle, of which there is one.
#[derive(Debug)]
pub struct Publisher {
    inventory: Arc<Inventory>,
    version: watch::Sender<u64>,
    ledger: Ledger,
}

impl Inventory {
    /// Creates an empty inventory and its publisher.
    #[must_use]
    pub fn new() -> (Arc<Self>, Publisher) {
        let (sender, version) = watch::channel(0);
        let inventory = Arc::new(Self { snapshot: ArcSwap::default(), version });
        let publisher =
            Publisher { inventory: Arc::clone(&inventory), version: sender, ledger: Ledger::default() };
        (inventory, publisher)
    }

    /// Returns the current snapshot without waiting.
    pub fn load(&self) -> Guard<Arc<Snapshot>> {
        self.snapshot.load()
    }

    /// Returns a channel with the version of the current snapshot.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.version.clone()
    }
}

impl Publisher {
    /// Applies events until all senders are dropped or the agent stops.
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

    /// Applies one batch and publishes a snapshot if anything changed.
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
