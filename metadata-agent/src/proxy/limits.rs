//! How many connections guests may hold open: each attachment its own, all together a total. One guest cannot take
//! the places of the others, nor all guests the agent's file descriptors. A haproxy's connections are of no attachment:
//! each takes a shared place.
//!
//! Guests may collude, and an open connection is never taken away from who holds it: it may be somebody's boot. So the
//! limits must hold before the places are gone.
//!
//! - The first [`RESERVED`] connections of an attachment come on top of the total, and nobody else can hold them. That
//!   is as many as a boot needs at once, so a guest boots whatever all the others do. They add up to a few for each
//!   interface that the operator made; guests make none.
//! - Beyond them an attachment may hold no more of the shared places than are left: the last ones go to who has few.
//!   (Dynamic thresholds: Choudhury and Hahne, 1998, for the buffers of switches.) With places for many, as there are by
//!   default, this binds only when nearly all are taken. Alone it would not do: each further attachment takes half of
//!   what is left, and a handful of them the last place.
//!
//! Both are one comparison; who holds how many is kept for those alone that hold any.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use metadata_ebpf::identity::AttachmentId;

/// Connections of an attachment that do not count in the total. cloud-init asks for IPv4 and IPv6 at once; others beside
/// it are agents and scripts of the image.
const RESERVED: u32 = 4;

/// Why a connection is not admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Overload {
    /// The attachment has its share.
    #[error("attachment {0} has all the connections that it may have")]
    Attachment(AttachmentId),
    /// All together have so many that this attachment has its share.
    #[error("attachment {0} has its share of all connections that there may be")]
    Total(AttachmentId),
    /// All together have as many as there may be.
    #[error("there are as many connections as there may be")]
    All,
}

impl Overload {
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
    /// Those beyond each attachment's reserve.
    shared: u32,
    by_attachment: HashMap<AttachmentId, u32>,
}

impl Admission {
    pub(super) fn new(per_attachment: u32, total: u32) -> Arc<Self> {
        Arc::new(Self { per_attachment, total, open: Mutex::default() })
    }

    /// Takes a place, given back when the ticket is dropped.
    pub(super) fn admit(self: &Arc<Self>, attachment: Option<AttachmentId>) -> Result<Ticket, Overload> {
        let mut open = self.lock();
        let open = &mut *open;
        let left = self.total - open.shared;
        if let Some(attachment) = attachment {
            let own = open.by_attachment.entry(attachment).or_insert(0);
            if *own >= self.per_attachment {
                return Err(Overload::Attachment(attachment));
            }
            if let Some(shared) = own.checked_sub(RESERVED) {
                if shared >= left {
                    return Err(Overload::Total(attachment));
                }
                open.shared += 1;
            }
            *own += 1;
        } else {
            if left == 0 {
                return Err(Overload::All);
            }
            open.shared += 1;
        }
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
    fn one_attachment_gets_its_share_and_no_more() {
        let admission = Admission::new(2, 10);
        let held: Vec<_> = (0..2).map(|_| admission.admit(Some(attachment(1))).unwrap()).collect();
        assert_eq!(admission.admit(Some(attachment(1))).unwrap_err(), Overload::Attachment(attachment(1)));
        assert!(admission.admit(Some(attachment(2))).is_ok());
        drop(held);
        assert!(admission.admit(Some(attachment(1))).is_ok());
    }

    /// Takes until it is refused.
    fn hoard(admission: &Arc<Admission>, id: u32) -> (Vec<Ticket>, Overload) {
        let mut held = Vec::new();
        loop {
            match admission.admit(Some(attachment(id))) {
                Ok(ticket) => held.push(ticket),
                Err(overload) => return (held, overload),
            }
        }
    }

    #[test]
    fn the_total_is_shared_and_nobody_gets_the_rest_of_it_alone() {
        let admission = Admission::new(1000, 64);
        let reserved = RESERVED as usize;
        let (first, overload) = hoard(&admission, 1);
        assert_eq!((first.len(), overload), (reserved + 32, Overload::Total(attachment(1))));
        let (second, _) = hoard(&admission, 2);
        assert_eq!(second.len(), reserved + 16);
        // What one gives back is there for all; first of all for who has less.
        drop(first);
        assert_eq!(hoard(&admission, 2).0.len(), 16);
        drop(second);
        assert_eq!(admission.lock().shared, 0);
    }

    #[test]
    fn however_many_collude_another_one_gets_in() {
        let defaults = super::super::ProxyConfig::default();
        let admission = Admission::new(defaults.connections_per_attachment, defaults.connections);
        let held: Vec<_> = (1..=2000).flat_map(|id| hoard(&admission, id).0).collect();
        assert_eq!(admission.lock().shared, defaults.connections, "not a place is left");
        assert_eq!(hoard(&admission, 2001).0.len(), 4, "enough for a boot");
        assert_eq!(held.len(), (defaults.connections + 2000 * RESERVED) as usize);
        drop(held);
        assert_eq!(admission.lock().shared, 0);
        assert_eq!(hoard(&admission, 2002).0.len(), defaults.connections_per_attachment as usize);
    }

    #[test]
    fn haproxies_take_shared_places() {
        let admission = Admission::new(128, 2);
        let held = [admission.admit(None).unwrap(), admission.admit(None).unwrap()];
        assert_eq!(admission.admit(None).unwrap_err(), Overload::All);
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
    fn nothing_is_kept_of_who_left() {
        let admission = Admission::new(20, 20);
        drop(hoard(&admission, 1));
        let open = admission.lock();
        assert!(open.by_attachment.is_empty() && open.shared == 0);
    }
}
