//! Who is behind each attachment: where attachments of the datapath and ports of the inventory meet, as one immutable
//! table that each request reads without waiting.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use arc_swap::ArcSwap;
use metadata_ebpf::identity::{AttachmentId, ClientAddress};
use tokio::sync::watch;

use crate::ids::IfIndex;
use crate::inventory::Port;
use crate::proxy::{self, Requester, Standing};

/// One attachment and the port behind it.
#[derive(Clone, Debug)]
pub struct Binding {
    /// The interface.
    pub interface: String,
    /// Its index.
    pub index: IfIndex,
    /// Since when it is attached.
    pub since: Instant,
    /// What is known of it.
    pub owner: Owner,
}

/// What the inventory says of an attachment.
#[derive(Clone, Debug)]
pub enum Owner {
    /// An instance, and what Nova is told of it.
    Known {
        /// The port.
        port: Arc<Port>,
        /// Its instance, signed.
        requester: Arc<Requester>,
    },
    /// No source knows the port.
    Unknown,
    /// Sources contradict each other.
    Disputed,
}

impl Owner {
    /// The port, if it is known.
    #[must_use]
    pub fn port(&self) -> Option<&Arc<Port>> {
        match self {
            Self::Known { port, .. } => Some(port),
            Self::Unknown | Self::Disputed => None,
        }
    }
}

/// The table of bindings. Written by one task, read by everybody.
#[derive(Debug)]
pub struct Directory {
    bindings: ArcSwap<HashMap<AttachmentId, Binding>>,
    version: watch::Sender<u64>,
}

impl Default for Directory {
    fn default() -> Self {
        Self { bindings: ArcSwap::default(), version: watch::Sender::new(0) }
    }
}

impl Directory {
    /// Replaces the table and wakes the requests that wait for it.
    pub fn publish(&self, bindings: HashMap<AttachmentId, Binding>) {
        self.bindings.store(Arc::new(bindings));
        self.version.send_modify(|version| *version += 1);
    }

    /// The table as it is now.
    #[must_use]
    pub fn bindings(&self) -> Arc<HashMap<AttachmentId, Binding>> {
        self.bindings.load_full()
    }
}

impl proxy::Directory for Directory {
    /// A dispute is no answer: it is waited for like an unknown port, and never guessed.
    fn lookup(&self, client: &ClientAddress) -> Standing {
        match self.bindings.load().get(&client.attachment) {
            None => Standing::Gone,
            Some(binding) => match &binding.owner {
                Owner::Known { requester, .. } => Standing::Known(Arc::clone(requester)),
                Owner::Unknown | Owner::Disputed => Standing::Pending { since: binding.since },
            },
        }
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }
}
