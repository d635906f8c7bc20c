//! A limited number of slots, handed to waiting guests in turn.
//!
//! Taking and releasing a slot costs a few atomic operations and no lock, as long as no request
//! waits. Waiting requests stand in one line per guest. Each released slot goes to the first
//! request of the next line, so a guest with a long line delays the others by no more than one
//! request of its own.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

use crate::proxy::client::GuestKey;

/// Length of a line from which requests that have left are removed from it.
const PURGE_FROM: usize = 64;

#[derive(Debug)]
pub(super) struct Slots {
    limit: SlotLimit,
    used: AtomicUsize,
    /// Requests in the lines, including those that have left.
    waiting: AtomicUsize,
    lines: Mutex<Lines>,
}

/// How many slots there are.
#[derive(Debug)]
pub(super) enum SlotLimit {
    Fixed(usize),
    /// A guest's slots. While it is not the only guest, it has a third of them as its share, and a
    /// fifth while more requests wait than its share: a guest that always wants more leaves more to
    /// the others. One that waits for a moment keeps its share. It always has one.
    Guest {
        alone: usize,
        guests: Arc<AtomicUsize>,
    },
}

impl SlotLimit {
    fn get(&self, waiting: usize) -> usize {
        match self {
            Self::Fixed(slots) => *slots,
            Self::Guest { alone, guests } if guests.load(Ordering::Relaxed) <= 1 => *alone,
            Self::Guest { alone, .. } => {
                let share = (alone / 3).max(1);
                if waiting > share { (alone / 5).max(1) } else { share }
            }
        }
    }
}

/// One slot. Dropping it releases the slot.
#[derive(Debug)]
pub(super) struct Slot(Option<Arc<Slots>>);

type Waiter = oneshot::Sender<Slot>;

#[derive(Debug, Default)]
struct Lines {
    /// Guests with a line, the next one first.
    turns: VecDeque<GuestKey>,
    by_guest: HashMap<GuestKey, VecDeque<Waiter>>,
}

impl Slots {
    pub(super) fn new(limit: SlotLimit) -> Arc<Self> {
        let (used, waiting) = (AtomicUsize::new(0), AtomicUsize::new(0));
        Arc::new(Self { limit, used, waiting, lines: Mutex::default() })
    }

    /// Takes a slot if one is free and no request waits.
    pub(super) fn try_acquire(self: &Arc<Self>) -> Option<Slot> {
        (self.waiting.load(Ordering::SeqCst) == 0 && self.take()).then(|| Slot(Some(Arc::clone(self))))
    }

    /// Waits in the line of this guest. Returns `None` if there is no slot by the deadline.
    pub(super) async fn wait(self: &Arc<Self>, guest: GuestKey, deadline: Instant) -> Option<Slot> {
        let (waiter, slot) = oneshot::channel();
        {
            let mut lines = self.lock();
            self.waiting.fetch_add(1, Ordering::SeqCst);
            let removed = lines.push(guest, waiter);
            self.waiting.fetch_sub(removed, Ordering::SeqCst);
            // A slot may have been released before this request was visible.
            self.serve(&mut lines);
        }
        timeout_at(deadline, slot).await.ok()?.ok()
    }

    fn take(&self) -> bool {
        let limit = self.limit.get(self.waiting.load(Ordering::SeqCst));
        let take = |used: usize| (used < limit).then_some(used + 1);
        self.used.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take).is_ok()
    }

    fn release(self: &Arc<Self>) {
        self.used.fetch_sub(1, Ordering::SeqCst);
        if self.waiting.load(Ordering::SeqCst) > 0 {
            self.serve(&mut self.lock());
        }
    }

    /// Hands free slots to waiting requests. If a guest's limit rises, its next release does this.
    fn serve(self: &Arc<Self>, lines: &mut Lines) {
        while self.waiting.load(Ordering::SeqCst) > 0 && self.take() {
            let (waiter, removed) = lines.pop();
            self.waiting.fetch_sub(removed, Ordering::SeqCst);
            let refused = waiter.map(|waiter| waiter.send(Slot(Some(Arc::clone(self)))));
            match refused {
                Some(Ok(())) => {}
                // Its request has just left. The slot must not be released here, under the lock.
                Some(Err(mut slot)) => {
                    slot.0 = None;
                    self.used.fetch_sub(1, Ordering::SeqCst);
                }
                None => {
                    self.used.fetch_sub(1, Ordering::SeqCst);
                    return;
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some(slots) = self.0.take() {
            slots.release();
        }
    }
}

impl Lines {
    /// Adds a request. Returns the number of requests that had left and were removed.
    fn push(&mut self, guest: GuestKey, waiter: Waiter) -> usize {
        let line = self.by_guest.entry(guest).or_default();
        if line.is_empty() {
            self.turns.push_back(guest);
        }
        // A guest that connects and leaves must not fill the memory.
        let before = line.len();
        if before >= PURGE_FROM && before.is_power_of_two() {
            line.retain(|waiter| !waiter.is_closed());
        }
        let removed = before - line.len();
        line.push_back(waiter);
        removed
    }

    /// Removes the next request that has not left. Also returns the number of removed requests.
    fn pop(&mut self) -> (Option<Waiter>, usize) {
        let mut removed = 0;
        while let Some(guest) = self.turns.pop_front() {
            let Some(line) = self.by_guest.get_mut(&guest) else { continue };
            let mut next = None;
            while let Some(waiter) = line.pop_front() {
                removed += 1;
                if !waiter.is_closed() {
                    next = Some(waiter);
                    break;
                }
            }
            if line.is_empty() {
                self.by_guest.remove(&guest);
            } else {
                self.turns.push_back(guest);
            }
            if next.is_some() {
                return (next, removed);
            }
        }
        (None, removed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::task::JoinHandle;

    fn guest(number: u128) -> GuestKey {
        GuestKey::Instance(uuid::Uuid::from_u128(number).to_string().parse().unwrap())
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(5)
    }

    fn queue(slots: &Arc<Slots>, key: GuestKey) -> JoinHandle<Option<Slot>> {
        let slots = Arc::clone(slots);
        tokio::spawn(async move { slots.wait(key, soon()).await })
    }

    async fn settle() {
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn released_slots_go_to_the_guests_in_turn() {
        let slots = Slots::new(SlotLimit::Fixed(1));
        let mut held = slots.try_acquire();
        let mut order = Vec::new();
        for (number, count) in [(1, 5), (2, 1), (3, 2)] {
            for _ in 0..count {
                order.push((number, queue(&slots, guest(number))));
                settle().await;
            }
        }
        let mut served = Vec::new();
        while !order.is_empty() {
            drop(held.take());
            settle().await;
            let done: Vec<_> = (0..order.len()).filter(|at| order[*at].1.is_finished()).collect();
            assert_eq!(done.len(), 1, "one slot serves one request");
            let (number, task) = order.remove(done[0]);
            served.push(number);
            held = task.await.unwrap();
        }
        assert_eq!(served, [1, 2, 3, 1, 3, 1, 1, 1]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_guest_in_company_has_a_third_of_its_slots() {
        let guests = Arc::new(AtomicUsize::new(1));
        let slots = Slots::new(SlotLimit::Guest { alone: 16, guests: Arc::clone(&guests) });
        let all = || std::iter::from_fn(|| slots.try_acquire()).collect::<Vec<_>>();
        let mut held = all();
        assert_eq!(held.len(), 16);
        guests.store(2, Ordering::Relaxed);
        let waits = queue(&slots, guest(1));
        settle().await;
        held.truncate(5);
        settle().await;
        assert!(!waits.is_finished(), "a third is in use");
        held.pop();
        held.extend(waits.await.unwrap());
        assert_eq!(held.len(), 5);

        // More requests wait than a third.
        let mut waiting: Vec<_> = (0..7).map(|_| queue(&slots, guest(1))).collect();
        settle().await;
        held.truncate(3);
        settle().await;
        assert!(!waiting.iter().any(JoinHandle::is_finished), "a fifth is in use");
        held.pop();
        held.extend(waiting.remove(0).await.unwrap());
        assert_eq!(held.len(), 3);
        settle().await;
        assert!(!waiting.iter().any(JoinHandle::is_finished), "still more than a third");
        // With the next one, the line is as short as that of a guest that waits for a moment.
        held.pop();
        settle().await;
        for waits in waiting.drain(..3) {
            held.extend(waits.await.unwrap());
        }
        assert_eq!(held.len(), 5);
        settle().await;
        assert!(!waiting.iter().any(JoinHandle::is_finished), "a third is in use");
        guests.store(1, Ordering::Relaxed);
        held.pop();
        for waits in waiting {
            assert!(waits.await.unwrap().is_some(), "all are there again");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_newcomer_does_not_overtake_those_who_wait() {
        let slots = Slots::new(SlotLimit::Fixed(1));
        let held = slots.try_acquire().unwrap();
        let waits = queue(&slots, guest(1));
        settle().await;
        drop(held);
        assert!(slots.try_acquire().is_none());
        drop(waits.await.unwrap().expect("a slot"));
        assert!(slots.try_acquire().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn requests_that_left_hold_no_slot_and_no_memory() {
        let slots = Slots::new(SlotLimit::Fixed(1));
        let held = slots.try_acquire().unwrap();
        for _ in 0..10_000 {
            let left = queue(&slots, guest(1));
            tokio::task::yield_now().await;
            left.abort();
            assert!(left.await.unwrap_err().is_cancelled());
        }
        assert!(slots.lock().by_guest[&guest(1)].len() <= PURGE_FROM);
        assert!(slots.wait(guest(2), soon()).await.is_none(), "a wait ends at its deadline");
        drop(held);
        assert_eq!(slots.waiting.load(Ordering::SeqCst), 0);
        assert!(slots.lock().turns.is_empty() && slots.lock().by_guest.is_empty());
        assert!(slots.try_acquire().is_some());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn no_slot_is_lost_or_made_up() {
        let slots = Slots::new(SlotLimit::Fixed(3));
        let busy = Arc::new(AtomicUsize::new(0));
        let tasks: Vec<_> = (0..64)
            .map(|number| {
                let (slots, busy) = (Arc::clone(&slots), Arc::clone(&busy));
                tokio::spawn(async move {
                    for round in 0..500 {
                        let patience = Duration::from_micros(round % 50 * 100);
                        let slot = match slots.try_acquire() {
                            Some(slot) => Some(slot),
                            None => slots.wait(guest(number % 5), Instant::now() + patience).await,
                        };
                        if let Some(slot) = slot {
                            assert!(busy.fetch_add(1, Ordering::SeqCst) < 3);
                            tokio::task::yield_now().await;
                            busy.fetch_sub(1, Ordering::SeqCst);
                            drop(slot);
                        }
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(slots.used.load(Ordering::SeqCst), 0);
    }
}
