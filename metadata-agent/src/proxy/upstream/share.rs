//! A guest's share of the upstream: its slots for requests in flight, and its idle connections.
//!
//! A connection to Nova is never passed from one guest to another. Whatever Nova or a proxy before
//! it sends on a connection, and whatever it takes for a request there, stays with the guest whose
//! requests went over it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::pool::{IdleBudget, IdleConnections, Reuse};
use super::slots::{SlotLimit, Slots};
use crate::proxy::client::GuestKey;

#[derive(Debug)]
pub(crate) struct GuestShare {
    key: GuestKey,
    pub(super) slots: Arc<Slots>,
    pub(super) idle: IdleConnections,
    pub(super) reuse: Arc<Reuse>,
}

impl GuestShare {
    pub(crate) fn key(&self) -> GuestKey {
        self.key
    }
}

/// The shares of all guests that have connections, or had one a moment ago.
#[derive(Debug)]
pub(super) struct Shares {
    slots: usize,
    idle_timeout: Duration,
    budget: IdleBudget,
    /// Number of guests in the table.
    guests: Arc<AtomicUsize>,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    by_key: HashMap<GuestKey, Arc<GuestShare>>,
    has_sweeper: bool,
}

impl Shares {
    /// Each guest gets this number of slots while it is alone, and a third of it in company, or
    /// a fifth while more of its requests wait.
    /// Connections may be idle for `idle_timeout`.
    pub(super) fn new(slots: usize, idle_connections: usize, idle_timeout: Duration) -> Arc<Self> {
        Arc::new(Self {
            slots,
            idle_timeout,
            budget: IdleBudget::new(idle_connections),
            guests: Arc::default(),
            table: Mutex::default(),
        })
    }

    pub(super) fn find(self: &Arc<Self>, key: GuestKey) -> Arc<GuestShare> {
        let mut table = self.lock();
        if let Some(share) = table.by_key.get(&key) {
            return Arc::clone(share);
        }
        let share = Arc::new(GuestShare {
            key,
            slots: Slots::new(SlotLimit::Guest { alone: self.slots, guests: Arc::clone(&self.guests) }),
            idle: IdleConnections::new(self.slots, self.idle_timeout, self.budget.clone()),
            reuse: Arc::default(),
        });
        table.by_key.insert(key, Arc::clone(&share));
        self.guests.store(table.by_key.len(), Ordering::Relaxed);
        if !table.has_sweeper {
            table.has_sweeper = true;
            tokio::spawn(sweep(Arc::downgrade(self)));
        }
        share
    }

    /// Closes all idle connections.
    pub(super) fn close_idle(&self) {
        for share in self.lock().by_key.values() {
            share.idle.clear();
        }
    }

    /// Closes expired connections and forgets shares without use. Returns `None` if no share is
    /// left; the next share then starts another sweeper.
    fn sweep(&self) -> Option<()> {
        let now = Instant::now();
        let mut table = self.lock();
        // New references come only from this table, which is locked.
        table.by_key.retain(|_, share| {
            share.idle.expire(now) || Arc::strong_count(share) > 1 || !share.reuse.is_allowed()
        });
        self.guests.store(table.by_key.len(), Ordering::Relaxed);
        table.has_sweeper = !table.by_key.is_empty();
        table.has_sweeper.then_some(())
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn sweep(shares: Weak<Shares>) {
    loop {
        let Some(pause) = shares.upgrade().map(|shares| shares.idle_timeout / 2) else { return };
        sleep(pause).await;
        if shares.upgrade().and_then(|shares| shares.sweep()).is_none() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: u128) -> GuestKey {
        GuestKey::Instance(uuid::Uuid::from_u128(number).to_string().parse().unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn a_share_lasts_while_it_is_used() {
        let shares = Shares::new(2, 0, Duration::from_secs(4));
        let held = shares.find(key(1));
        assert!(Arc::ptr_eq(&held, &shares.find(key(1))), "two ports of an instance have one share");
        assert!(!Arc::ptr_eq(&held, &shares.find(key(2))));
        let slot = held.slots.try_acquire();
        sleep(Duration::from_mins(1)).await;
        assert_eq!(shares.lock().by_key.len(), 1, "the second one is not used");
        assert!(Arc::ptr_eq(&held, &shares.find(key(1))));
        drop((slot, held));
        sleep(Duration::from_mins(1)).await;
        assert!(shares.lock().by_key.is_empty() && !shares.lock().has_sweeper);
        shares.find(key(3));
        sleep(Duration::from_mins(1)).await;
        assert!(shares.lock().by_key.is_empty(), "a later share is removed as well");
    }
}
