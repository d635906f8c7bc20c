//! The attachments that were removed last.
//!
//! Attachments are published in any order: after a restart, one with a high id may come before one
//! that was kept and has a low id. So a missing attachment is gone only if it was removed. Any
//! other is yet to come, and its requests wait.

use std::collections::{HashSet, VecDeque};

use metadata_ebpf::identity::AttachmentId;

/// Most attachments to remember. Requests of those that were removed earlier wait, as for a new
/// attachment, and then get the same answer.
const MOST: usize = 16_384;

/// Ids of removed attachments. They are never assigned again.
#[derive(Debug, Default)]
pub(super) struct RemovedAttachments {
    ids: HashSet<AttachmentId>,
    /// The same, in the order of their removal.
    order: VecDeque<AttachmentId>,
}

impl RemovedAttachments {
    pub(super) fn extend(&mut self, removed: impl IntoIterator<Item = AttachmentId>) {
        for id in removed {
            if self.ids.insert(id) {
                self.order.push_back(id);
            }
            if self.order.len() > MOST
                && let Some(oldest) = self.order.pop_front()
            {
                self.ids.remove(&oldest);
            }
        }
    }

    pub(super) fn ids(&self) -> impl Iterator<Item = AttachmentId> {
        self.order.iter().copied()
    }

    pub(super) fn contains(&self, id: AttachmentId) -> bool {
        self.ids.contains(&id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_removals_are_forgotten() {
        let id = |number: usize| AttachmentId::new(u32::try_from(number).unwrap()).unwrap();
        let mut removed = RemovedAttachments::default();
        removed.extend((1..=MOST + 2).map(id));
        removed.extend([id(MOST + 2)]);
        assert_eq!(
            [1, 2, 3, MOST + 2, MOST + 3].map(|n| removed.contains(id(n))),
            [false, false, true, true, false]
        );
        assert_eq!((removed.ids.len(), removed.order.len()), (MOST, MOST));
    }
}
