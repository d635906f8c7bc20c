//! Limits open connections: for each attachment, and for all together. One guest cannot take the
//! connections of the others, nor can all guests take the agent's file descriptors.
//!
//! Guests may collude, and an open connection is never closed to make room: it may be a guest's
//! boot. So the limits must work before all connections are taken.
//!
//! - The first [`RESERVED`] connections of an attachment do not count towards the total, and no
//!   other attachment can use them. A boot needs no more at once, so a guest always boots. Guests
//!   cannot add interfaces, so the operator controls how many these are.
//! - Beyond them, an attachment may hold no more shared connections than are left. The last ones go
//!   to attachments that have few. (Dynamic thresholds: Choudhury and Hahne, 1998, for switch
//!   buffers.) With a large total, which is the default, this applies only if nearly all are taken.
//!   It would not suffice alone: each further attachment takes half of what is left.
//!
//! A haproxy connection belongs to no attachment and takes a shared place.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use metadata_ebpf::identity::AttachmentId;

/// Connections of an attachment that do not count towards the total. cloud-init uses IPv4 and IPv6
/// at once; agents and scripts of the image may run beside it.
const RESERVED: u32 = 4;

/// The limit that a new connection would exceed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum AdmissionError {
    #[error("attachment {0} has reached its connection limit")]
    Attachment(AttachmentId),
    #[error("attachment {0} has reached its share of the total connection limit")]
    Total(AttachmentId),
    #[error("the total connection limit is reached")]
    All,
}

impl AdmissionError {
    pub(super) const fn label(self) -> &'static str {
        match self {
            Self::Attachment(_) => "attachment_connections",
            Self::Total(_) | Self::All => "total_connections",
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
    /// Connections beyond the reserve of each attachment.
    shared: u32,
    by_attachment: HashMap<AttachmentId, u32>,
}

impl Admission {
    pub(super) fn new(per_attachment: u32, total: u32) -> Arc<Self> {
        Arc::new(Self { per_attachment, total, open: Mutex::default() })
    }

    /// Admits a connection until the ticket is dropped.
    pub(super) fn admit(
        self: &Arc<Self>,
        attachment: Option<AttachmentId>,
    ) -> Result<Ticket, AdmissionError> {
        let mut open = self.lock();
        let open = &mut *open;
        let left = self.total - open.shared;
        if let Some(attachment) = attachment {
            let own = open.by_attachment.entry(attachment).or_insert(0);
            if *own >= self.per_attachment {
                return Err(AdmissionError::Attachment(attachment));
            }
            if let Some(shared) = own.checked_sub(RESERVED) {
                if shared >= left {
                    return Err(AdmissionError::Total(attachment));
                }
                open.shared += 1;
            }
            *own += 1;
        } else {
            if left == 0 {
                return Err(AdmissionError::All);
            }
            open.shared += 1;
        }
        Ok(Ticket { admission: Arc::clone(self), attachment })
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts one open connection.
#[derive(Debug)]
pub(super) struct Ticket {
    admission: Arc<Admission>,
    attachment: Option<AttachmentId>,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut open = self.admission.lock();
        let open = &mut *open;
        let Some(attachment) = self.attachment else {
            open.shared -= 1;
            return;
        };
        if let Entry::Occupied(mut own) = open.by_attachment.entry(attachment) {
            *own.get_mut() -= 1;
            open.shared -= u32::from(*own.get() >= RESERVED);
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
    fn an_attachment_gets_no_more_than_its_limit() {
        let admission = Admission::new(2, 10);
        let held: Vec<_> = (0..2).map(|_| admission.admit(Some(attachment(1))).unwrap()).collect();
        assert_eq!(
            admission.admit(Some(attachment(1))).unwrap_err(),
            AdmissionError::Attachment(attachment(1))
        );
        assert!(admission.admit(Some(attachment(2))).is_ok());
        drop(held);
        assert!(admission.admit(Some(attachment(1))).is_ok());
    }

    /// Opens connections until one is refused.
    fn hoard(admission: &Arc<Admission>, id: u32) -> (Vec<Ticket>, AdmissionError) {
        let mut held = Vec::new();
        loop {
            match admission.admit(Some(attachment(id))) {
                Ok(ticket) => held.push(ticket),
                Err(error) => return (held, error),
            }
        }
    }

    #[test]
    fn no_attachment_takes_all_that_is_left_of_the_total() {
        let admission = Admission::new(1000, 64);
        let reserved = RESERVED as usize;
        let (first, error) = hoard(&admission, 1);
        assert_eq!((first.len(), error), (reserved + 32, AdmissionError::Total(attachment(1))));
        let (second, _) = hoard(&admission, 2);
        assert_eq!(second.len(), reserved + 16);
        // Connections that one attachment closes are available to all.
        drop(first);
        assert_eq!(hoard(&admission, 2).0.len(), 16);
        drop(second);
        assert_eq!(admission.lock().shared, 0);
    }

    #[test]
    fn colluding_guests_cannot_keep_another_from_booting() {
        let defaults = crate::proxy::ProxyConfig::default();
        let admission = Admission::new(defaults.connections_per_attachment, defaults.connections);
        let held: Vec<_> = (1..=2000).flat_map(|id| hoard(&admission, id).0).collect();
        assert_eq!(admission.lock().shared, defaults.connections, "no shared connection is left");
        assert_eq!(hoard(&admission, 2001).0.len(), 4, "enough for a boot");
        assert_eq!(held.len(), (defaults.connections + 2000 * RESERVED) as usize);
        drop(held);
        assert_eq!(admission.lock().shared, 0);
        assert_eq!(hoard(&admission, 2002).0.len(), defaults.connections_per_attachment as usize);
    }

    #[test]
    fn haproxies_count_towards_the_total() {
        let admission = Admission::new(128, 2);
        let held = [admission.admit(None).unwrap(), admission.admit(None).unwrap()];
        assert_eq!(admission.admit(None).unwrap_err(), AdmissionError::All);
        assert_eq!(hoard(&admission, 1).0.len(), RESERVED as usize);
        drop(held);
        assert!(admission.admit(None).is_ok());
        assert_eq!(admission.lock().shared, 0);
    }

    #[test]
    fn a_limit_below_the_reserve_holds() {
        let admission = Admission::new(2, 0);
        assert_eq!(hoard(&admission, 1).0.len(), 2);
    }

    #[test]
    fn closed_connections_leave_no_entry() {
        let admission = Admission::new(20, 20);
        drop(hoard(&admission, 1));
        let open = admission.lock();
        assert!(open.by_attachment.is_empty() && open.shared == 0);
    }
}
