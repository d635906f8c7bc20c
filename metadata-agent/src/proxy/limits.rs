//! How many connections guests may hold open: each attachment its own, all together a total. One guest cannot take
//! the places of the others, nor all guests the agent's file descriptors. A haproxy's connections are of no attachment.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use metadata_ebpf::identity::AttachmentId;

/// Why a connection is not admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Overload {
    /// The attachment has its share.
    #[error("attachment {0} has all the connections it may have")]
    Attachment(AttachmentId),
    /// The agent has all it can take.
    #[error("the agent has all the connections it may have")]
    Total,
}

impl Overload {
    pub(super) const fn label(self) -> &'static str {
        match self {
            Self::Attachment(_) => "attachment_connections",
            Self::Total => "total_connections",
        }
    }
}

/// The open connections, counted.
#[derive(Debug)]
pub(super) struct Admission {
    per_attachment: u32,
    total: u32,
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    total: u32,
    by_attachment: HashMap<AttachmentId, u32>,
}

impl Admission {
    pub(super) fn new(per_attachment: u32, total: u32) -> Arc<Self> {
        Arc::new(Self { per_attachment, total, open: Mutex::default() })
    }

    /// Takes a place, given back when the ticket is dropped.
    pub(super) fn admit(self: &Arc<Self>, attachment: Option<AttachmentId>) -> Result<Ticket, Overload> {
        let mut open = self.lock();
        if open.total >= self.total {
            return Err(Overload::Total);
        }
        if let Some(attachment) = attachment {
            let own = open.by_attachment.entry(attachment).or_insert(0);
            if *own >= self.per_attachment {
                return Err(Overload::Attachment(attachment));
            }
            *own += 1;
        }
        open.total += 1;
        Ok(Ticket { admission: Arc::clone(self), attachment })
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The place of one connection.
#[derive(Debug)]
pub(super) struct Ticket {
    admission: Arc<Admission>,
    attachment: Option<AttachmentId>,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut open = self.admission.lock();
        open.total -= 1;
        if let Some(attachment) = self.attachment
            && let Entry::Occupied(mut own) = open.by_attachment.entry(attachment)
        {
            *own.get_mut() -= 1;
            if *own.get() == 0 {
                own.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attachment(id: u32) -> AttachmentId {
        AttachmentId::new(id).unwrap()
    }

    #[test]
    fn one_attachment_gets_its_share_and_no_more() {
        let admission = Admission::new(2, 10);
        let held: Vec<_> = (0..2).map(|_| admission.admit(Some(attachment(1))).unwrap()).collect();
        assert_eq!(admission.admit(Some(attachment(1))).unwrap_err(), Overload::Attachment(attachment(1)));
        assert!(admission.admit(Some(attachment(2))).is_ok());
        drop(held);
        assert!(admission.admit(Some(attachment(1))).is_ok());
    }

    #[test]
    fn the_total_binds_all() {
        let admission = Admission::new(2, 2);
        let _first = admission.admit(Some(attachment(1))).unwrap();
        let second = admission.admit(Some(attachment(2))).unwrap();
        assert_eq!(admission.admit(Some(attachment(3))).unwrap_err(), Overload::Total);
        assert_eq!(admission.admit(None).unwrap_err(), Overload::Total);
        drop(second);
        assert!(admission.admit(Some(attachment(3))).is_ok());
    }

    #[test]
    fn nothing_is_kept_of_who_left() {
        let admission = Admission::new(2, 2);
        drop(admission.admit(Some(attachment(1))).unwrap());
        assert!(admission.lock().by_attachment.is_empty());
    }
}
