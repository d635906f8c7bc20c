//! Limits open connections: for each guest, for each group of guests, and for all together. No
//! guest can take the connections of others, nor can all guests take the agent's file descriptors.
//!
//! Guests may collude, and an open connection is never closed to make room: it may be a guest's
//! boot. So the limits must work before all connections are taken.
//!
//! - **Guest.** A guest has a fixed limit. Its first [`RESERVED`] connections suffice for a boot.
//! - **Total.** The first connections of a guest on an attachment of its own do not count towards
//!   the total, so such a guest always boots. Guests cannot add attachments, so the operator
//!   controls how many these are. Beyond them, a guest may hold no more shared connections than
//!   are left, so the last ones go to guests that have few. (Dynamic thresholds: Choudhury and
//!   Hahne, 1998, for switch buffers.) That alone would not suffice: each further guest takes half
//!   of what is left.
//! - **Group.** Guests behind a shared attachment or a haproxy may be made up, so they get no
//!   reserve of their own. Their group has one: [`GROUP_RESERVED`] first connections. Beyond it, a
//!   group may hold no more than is left. Of that, no more than [`GROUP_SHARE`] goes to guests that
//!   have had their first connections, so a guest that holds nothing yet finds room.
//!
//! A haproxy connection counts for no guest until the head of its first request is read. Each
//! request then counts for its client. Until then it has one of [`AWAITED_HEADS`] places, which all
//! haproxies share. If all are taken, connections wait in the kernel's accept queue, because a
//! haproxy answers 502 for a connection that is closed. No guest can keep such a place: haproxy
//! reads the whole head before it connects, and sends it at once. So a place is free as soon as
//! this agent has read the head, and a haproxy cannot have more places without a head than it has
//! threads (Neutron configures two).

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::proxy::client::{GuestGroup, GuestKey, LimitedGuest};
use crate::proxy::metrics::RejectionLabel;

/// First connections of a guest. cloud-init uses IPv4 and IPv6 at once; agents and scripts of the
/// image may run beside it.
pub(crate) const RESERVED: u32 = 4;

/// First connections of the guests of a group that do not count towards the total.
pub(crate) const GROUP_RESERVED: u32 = 32;

/// Connections of all haproxies together whose first head has not been read.
pub(crate) const AWAITED_HEADS: u32 = 64;

/// Connections of all haproxies together that count for no guest, because they were refused, and
/// stay open until the rest of their request is read. Further ones are closed at once.
const LINGERING: u32 = 64;

/// Part of the total that the guests of one group may use beyond their first connections.
const GROUP_SHARE: u32 = 4;

/// The limit that a connection would exceed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum AdmissionError {
    #[error("{0} has reached its connection limit")]
    Guest(GuestKey),
    #[error("the guests that share an attachment or a haproxy with {0} have reached their limit")]
    Group(GuestKey),
    #[error("{0} has reached its share of the total connection limit")]
    Total(GuestKey),
}

impl AdmissionError {
    pub(crate) const fn label(self) -> RejectionLabel {
        match self {
            Self::Guest(_) => RejectionLabel::GuestConnections,
            Self::Group(_) => RejectionLabel::GroupConnections,
            Self::Total(_) => RejectionLabel::TotalConnections,
        }
    }
}

/// The open connections, counted.
#[derive(Debug)]
pub(crate) struct Admission {
    per_guest: u32,
    total: u32,
    heads: Arc<Semaphore>,
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    /// Connections that count towards the total.
    shared: u32,
    /// Refused connections of haproxies that are not closed yet.
    lingering: u32,
    guests: HashMap<GuestKey, GuestConnections>,
    groups: HashMap<GuestGroup, GroupConnections>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct GuestConnections {
    first: u32,
    further: u32,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct GroupConnections {
    /// Connections that do not count towards the total.
    reserved: u32,
    /// Connections that do.
    shared: u32,
    /// Those of both that are not among the first of their guest.
    further: u32,
}

/// The way in which a connection is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// For no guest: its first head is awaited, or its first request was refused.
    Uncounted,
    /// For no guest, while it is closing.
    Lingering,
    Guest {
        guest: LimitedGuest,
        /// Among the first of its guest.
        is_first: bool,
        /// Counts towards the total.
        is_shared: bool,
    },
}

impl Admission {
    pub(crate) fn new(per_guest: u32, total: u32) -> Arc<Self> {
        let heads = Arc::new(Semaphore::new(AWAITED_HEADS as usize));
        Arc::new(Self { per_guest, total, heads, open: Mutex::default() })
    }

    /// Admits a connection of a guest until the ticket is dropped.
    pub(super) fn admit(self: &Arc<Self>, guest: LimitedGuest) -> Result<Ticket, AdmissionError> {
        let mut open = self.lock();
        let place = self.place(&open, guest)?;
        open.take(place);
        Ok(Ticket { admission: Arc::clone(self), place, awaits_head: None })
    }

    /// Waits until a connection of a haproxy may be accepted.
    pub(super) async fn admit_haproxy(self: &Arc<Self>) -> Ticket {
        let Ok(permit) = Arc::clone(&self.heads).acquire_owned().await else {
            unreachable!("the semaphore is never closed")
        };
        Ticket { admission: Arc::clone(self), place: Place::Uncounted, awaits_head: Some(permit) }
    }

    /// Finds a place for one more connection of this guest.
    fn place(&self, open: &Open, guest: LimitedGuest) -> Result<Place, AdmissionError> {
        let LimitedGuest { key, group } = guest;
        let own = open.guests.get(&key).copied().unwrap_or_default();
        if own.first + own.further >= self.per_guest {
            return Err(AdmissionError::Guest(key));
        }
        let is_first = own.first < RESERVED;
        let left = self.total.saturating_sub(open.shared);
        let is_shared = match group {
            None => !is_first,
            Some(group) => {
                let peers = open.groups.get(&group).copied().unwrap_or_default();
                let room = (self.total / GROUP_SHARE).saturating_sub(peers.further);
                if !is_first && own.further >= room {
                    return Err(AdmissionError::Group(key));
                }
                let is_shared = !is_first || peers.reserved >= GROUP_RESERVED;
                if is_shared && peers.shared >= left {
                    return Err(AdmissionError::Group(key));
                }
                is_shared
            }
        };
        if is_shared && own.further >= left {
            return Err(AdmissionError::Total(key));
        }
        Ok(Place::Guest { guest, is_first, is_shared })
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Open {
    fn take(&mut self, place: Place) {
        let (LimitedGuest { key, group }, is_first, is_shared) = match place {
            Place::Guest { guest, is_first, is_shared } => (guest, is_first, is_shared),
            Place::Uncounted => return,
            Place::Lingering => return self.lingering += 1,
        };
        self.shared += u32::from(is_shared);
        let own = self.guests.entry(key).or_default();
        *(if is_first { &mut own.first } else { &mut own.further }) += 1;
        if let Some(group) = group {
            let peers = self.groups.entry(group).or_default();
            *(if is_shared { &mut peers.shared } else { &mut peers.reserved }) += 1;
            peers.further += u32::from(!is_first);
        }
    }

    fn release(&mut self, place: Place) {
        let (LimitedGuest { key, group }, is_first, is_shared) = match place {
            Place::Guest { guest, is_first, is_shared } => (guest, is_first, is_shared),
            Place::Uncounted => return,
            Place::Lingering => return self.lingering -= 1,
        };
        self.shared -= u32::from(is_shared);
        update_or_remove(&mut self.guests, key, |own| {
            *(if is_first { &mut own.first } else { &mut own.further }) -= 1;
        });
        if let Some(group) = group {
            update_or_remove(&mut self.groups, group, |peers| {
                *(if is_shared { &mut peers.shared } else { &mut peers.reserved }) -= 1;
                peers.further -= u32::from(!is_first);
            });
        }
    }
}

/// Updates an entry, and removes it if nothing is left of it.
fn update_or_remove<K: Eq + Hash, V: Default + PartialEq>(
    map: &mut HashMap<K, V>,
    key: K,
    update: impl FnOnce(&mut V),
) {
    if let Entry::Occupied(mut entry) = map.entry(key) {
        update(entry.get_mut());
        if *entry.get() == V::default() {
            entry.remove();
        }
    }
}

/// Counts one open connection.
#[derive(Debug)]
pub(crate) struct Ticket {
    admission: Arc<Admission>,
    place: Place,
    /// Held until the first head of a haproxy connection is read.
    awaits_head: Option<OwnedSemaphorePermit>,
}

impl Ticket {
    /// Returns whether the first head of a haproxy connection has not been read.
    pub(crate) const fn awaits_head(&self) -> bool {
        self.awaits_head.is_some()
    }

    /// Counts the connection for this guest from now on, or for the former one if that would exceed
    /// a limit.
    pub(crate) fn count_for(&mut self, guest: LimitedGuest) -> Result<(), AdmissionError> {
        self.awaits_head = None;
        if matches!(self.place, Place::Guest { guest: counted, .. } if counted == guest) {
            return Ok(());
        }
        let mut open = self.admission.lock();
        open.release(self.place);
        let place = self.admission.place(&open, guest);
        self.place = place.unwrap_or(self.place);
        open.take(self.place);
        place.map(|_| ())
    }

    /// Marks that no more requests follow, and returns whether the connection may stay open until
    /// the peer closes it. A connection that counts for a guest may.
    pub(crate) fn may_linger(&mut self) -> bool {
        self.awaits_head = None;
        if self.place == Place::Uncounted {
            let mut open = self.admission.lock();
            if open.lingering >= LINGERING {
                return false;
            }
            self.place = Place::Lingering;
            open.take(self.place);
        }
        true
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.admission.lock().release(self.place);
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::*;
    use crate::proxy::ProxyConfig;
    use crate::proxy::client::samples::{attachment, guest, neighbour};

    fn instance(id: u32) -> GuestKey {
        GuestKey::Instance(format!("3b0e5c6e-9a1f-4d0a-8f0b-{id:012x}").parse().unwrap())
    }

    fn admit_all(admission: &Arc<Admission>, guest: LimitedGuest, number: u32) -> Vec<Ticket> {
        (0..number).map(|_| admission.admit(guest).unwrap()).collect()
    }

    /// Opens connections until one is refused.
    fn hoard(admission: &Arc<Admission>, guest: LimitedGuest) -> (Vec<Ticket>, AdmissionError) {
        let mut held = Vec::new();
        loop {
            match admission.admit(guest) {
                Ok(ticket) => held.push(ticket),
                Err(error) => return (held, error),
            }
        }
    }

    /// Returns a ticket for a haproxy connection, unless it would have to wait.
    fn connect(admission: &Arc<Admission>) -> Option<Ticket> {
        let admitted = pin!(admission.admit_haproxy());
        match admitted.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(ticket) => Some(ticket),
            Poll::Pending => None,
        }
    }

    fn behind_haproxy(network: u32, host: u8) -> LimitedGuest {
        let network = format!("11111111-1111-4111-8111-{network:012x}").parse().unwrap();
        let scope = crate::ids::NetworkOrRouter::Network(network);
        let key = GuestKey::Forwarded(scope, [10, 0, 0, host].into());
        LimitedGuest { key, group: Some(GuestGroup::Haproxies(scope)) }
    }

    fn assert_empty(admission: &Admission) {
        let open = admission.lock();
        assert!(open.guests.is_empty() && open.groups.is_empty(), "{open:?}");
        assert_eq!((open.shared, open.lingering), (0, 0));
        assert_eq!(admission.heads.available_permits(), AWAITED_HEADS as usize);
    }

    #[test]
    fn a_guest_gets_no_more_than_its_limit() {
        let admission = Admission::new(2, 10);
        let held = admit_all(&admission, guest(1), 2);
        assert_eq!(admission.admit(guest(1)).unwrap_err(), AdmissionError::Guest(guest(1).key));
        assert!(admission.admit(guest(2)).is_ok());
        drop(held);
        assert!(admission.admit(guest(1)).is_ok());
        assert_empty(&admission);
    }

    #[test]
    fn no_guest_takes_all_that_is_left_of_the_total() {
        let admission = Admission::new(1000, 64);
        let reserved = RESERVED as usize;
        let (first, error) = hoard(&admission, guest(1));
        assert_eq!((first.len(), error), (reserved + 32, AdmissionError::Total(guest(1).key)));
        let (second, _) = hoard(&admission, guest(2));
        assert_eq!(second.len(), reserved + 16);
        // Connections that one guest closes are available to all.
        drop(first);
        assert_eq!(hoard(&admission, guest(2)).0.len(), 16);
        drop(second);
        assert_empty(&admission);
    }

    #[test]
    fn colluding_guests_cannot_keep_another_from_booting() {
        let defaults = ProxyConfig::default();
        let admission = Admission::new(defaults.connections_per_guest, defaults.connections);
        let held: Vec<_> = (1..=2000).flat_map(|id| hoard(&admission, guest(id)).0).collect();
        assert_eq!(admission.lock().shared, defaults.connections, "no shared connection is left");
        assert_eq!(hoard(&admission, guest(2001)).0.len(), 4, "enough for a boot");
        assert_eq!(hoard(&admission, neighbour(1)).0.len(), 4, "the same behind a router");
        assert_eq!(held.len(), (defaults.connections + 2000 * RESERVED) as usize);
        drop(held);
        assert_empty(&admission);
        assert_eq!(hoard(&admission, guest(2002)).0.len(), defaults.connections_per_guest as usize);
    }

    #[test]
    fn a_guest_leaves_its_neighbours_room_on_one_attachment() {
        let admission = Admission::new(128, 16_384);
        let (held, error) = hoard(&admission, neighbour(1));
        assert_eq!((held.len(), error), (128, AdmissionError::Guest(neighbour(1).key)));
        assert_eq!(hoard(&admission, neighbour(2)).0.len(), 128);
        drop(held);
        assert_empty(&admission);
    }

    /// Many made-up guests use what their group may use. A guest that holds nothing still boots,
    /// and so do guests elsewhere.
    #[test]
    fn made_up_guests_leave_room_for_new_ones() {
        let admission = Admission::new(128, 1024);
        let held: Vec<_> = (1..=10).flat_map(|id| hoard(&admission, neighbour(id)).0).collect();
        let peers = admission.lock().groups[&GuestGroup::Attachment(attachment(1))];
        assert!(peers.further <= 1024 / GROUP_SHARE, "{peers:?}");
        for id in 11..100 {
            assert_eq!(admit_all(&admission, neighbour(id), RESERVED).len(), 4);
        }
        let other = LimitedGuest { group: Some(GuestGroup::Attachment(attachment(2))), ..guest(2) };
        assert_eq!(hoard(&admission, other).0.len(), 128);
        // Even more made-up guests use half of the total, not all of it.
        let more: Vec<_> = (1000..3000).filter_map(|id| admission.admit(neighbour(id)).ok()).collect();
        assert_eq!(admission.lock().shared, 512);
        assert_eq!(hoard(&admission, other).0.len(), 128);
        drop((held, more));
        assert_empty(&admission);
    }

    #[test]
    fn all_ports_of_an_instance_share_one_limit() {
        let admission = Admission::new(10, 100);
        let on = |group| LimitedGuest { key: instance(1), group };
        let own = on(None);
        let behind_router = on(Some(GuestGroup::Attachment(attachment(9))));
        let held = [admit_all(&admission, own, 6), admit_all(&admission, behind_router, 4)];
        for guest in [own, behind_router] {
            assert_eq!(admission.admit(guest).unwrap_err(), AdmissionError::Guest(instance(1)));
        }
        drop(held);
        assert_empty(&admission);
    }

    #[test]
    fn an_identified_connection_counts_for_its_instance() {
        let admission = Admission::new(6, 100);
        let identified = |guest: LimitedGuest| LimitedGuest { key: instance(1), ..guest };
        let mut first = admit_all(&admission, neighbour(1), 6);
        let mut second = admit_all(&admission, neighbour(2), 2);
        for ticket in &mut first {
            ticket.count_for(identified(neighbour(1))).unwrap();
        }
        let error = second[0].count_for(identified(neighbour(2))).unwrap_err();
        assert_eq!(error, AdmissionError::Guest(instance(1)));
        first.pop();
        second[0].count_for(identified(neighbour(2))).unwrap();
        assert_eq!(admission.admit(neighbour(1)).map(drop), Ok(()));
        drop((first, second));
        assert_empty(&admission);
    }

    #[test]
    fn networks_behind_haproxies_do_not_take_each_others_places() {
        let admission = Admission::new(1000, 64);
        let (mut held, mut refused) = (Vec::new(), Vec::new());
        let mut ask = |guest| {
            let mut ticket = connect(&admission).unwrap();
            let counted = ticket.count_for(guest);
            if counted.is_ok() { &mut held } else { &mut refused }.push(ticket);
            counted
        };
        // One network, then many together, take all that they can get.
        while (1..=250).any(|host| ask(behind_haproxy(1, host)).is_ok()) {}
        for network in 2..100 {
            while (1..=250).any(|host| ask(behind_haproxy(network, host)).is_ok()) {}
        }
        // Another network has its reserve.
        let reserved = (1..=250).filter(|host| ask(behind_haproxy(100, *host)).is_ok()).count();
        assert_eq!(reserved, GROUP_RESERVED as usize);
        drop((held, refused));
        assert_empty(&admission);
    }

    #[test]
    fn haproxy_connections_wait_until_a_head_was_read() {
        let admission = Admission::new(128, 2);
        let mut held: Vec<_> = (0..AWAITED_HEADS).map(|_| connect(&admission).unwrap()).collect();
        assert!(connect(&admission).is_none());
        assert_eq!(hoard(&admission, guest(1)).0.len(), RESERVED as usize + 1, "guests are admitted");
        // Neither a refused request nor one that names no guest keeps the place.
        held[0].count_for(behind_haproxy(1, 1)).unwrap();
        held[1].may_linger();
        held.truncate(AWAITED_HEADS as usize - 1);
        let more = [(); 3].map(|()| connect(&admission).unwrap());
        assert!(connect(&admission).is_none());
        drop((held, more));
        assert_empty(&admission);
    }

    #[test]
    fn refused_connections_of_haproxies_are_limited() {
        let admission = Admission::new(0, 100);
        let refused = || {
            let mut ticket = connect(&admission).unwrap();
            ticket.count_for(behind_haproxy(1, 1)).unwrap_err();
            ticket
        };
        let mut held: Vec<_> = (0..=LINGERING).map(|_| refused()).collect();
        let lingering = held.iter_mut().filter_map(|ticket| ticket.may_linger().then_some(())).count();
        assert_eq!(lingering, LINGERING as usize);
        drop(held);
        assert_empty(&admission);
    }

    #[test]
    fn a_limit_below_the_reserve_holds() {
        let admission = Admission::new(2, 0);
        assert_eq!(hoard(&admission, guest(1)).0.len(), 2);
        assert_eq!(hoard(&admission, neighbour(1)).0.len(), 2);
        assert_empty(&admission);
    }
}
