//! What the last few snapshots changed, so that who follows them need not ask about every device anew.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use super::device::DeviceName;

/// Snapshots that are remembered. Who follows them is at most a few behind: while it attaches an interface, some ten
/// milliseconds, sources tell something more.
const KEPT: usize = 32;

/// The devices of each of the last snapshots, the oldest first. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Changes(VecDeque<Arc<BTreeSet<DeviceName>>>);

impl Changes {
    /// Adds those of a new snapshot.
    pub(super) fn note(&mut self, devices: BTreeSet<DeviceName>) {
        if self.0.len() == KEPT {
            self.0.pop_front();
        }
        self.0.push_back(Arc::new(devices));
    }

    /// Those of the last `count` snapshots; `None` if not as many are remembered.
    pub(super) fn last(&self, count: u64) -> Option<impl Iterator<Item = &DeviceName>> {
        let first = self.0.len().checked_sub(usize::try_from(count).ok()?)?;
        Some(self.0.iter().skip(first).flat_map(|devices| devices.iter()))
    }
}
