//! Idle connections of one guest, the most recently used last.
//!
//! A connection comes back only after exactly one complete response was read, to a request without
//! a body. Whether it is still open and silent is checked once more before it is used
//! ([`super::stream`]).

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::connect::UpstreamConnection;
use super::endpoints::EndpointState;

/// The number of connections that may be idle, of all guests together.
#[derive(Debug, Clone)]
pub(super) struct IdleBudget {
    limit: usize,
    used: Arc<AtomicUsize>,
}

/// The place of one idle connection in the budget.
#[derive(Debug)]
struct IdlePlace(Arc<AtomicUsize>);

#[derive(Debug)]
pub(super) struct IdleConnections {
    limit: usize,
    idle_timeout: Duration,
    budget: IdleBudget,
    idle: Mutex<Vec<Idle>>,
}

#[derive(Debug)]
struct Idle {
    since: Instant,
    connection: UpstreamConnection,
    endpoint: Arc<EndpointState>,
    _place: IdlePlace,
}

impl IdleBudget {
    pub(super) fn new(limit: usize) -> Self {
        Self { limit, used: Arc::default() }
    }

    fn take(&self) -> Option<IdlePlace> {
        let take = |used| (used < self.limit).then_some(used + 1);
        let taken = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
        taken.is_ok().then(|| IdlePlace(Arc::clone(&self.used)))
    }
}

impl Drop for IdlePlace {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl IdleConnections {
    /// Keeps at most `limit` connections, as far as the budget of all guests allows.
    pub(super) fn new(limit: usize, idle_timeout: Duration, budget: IdleBudget) -> Self {
        Self { limit, idle_timeout, budget, idle: Mutex::default() }
    }

    /// Takes the most recently used connection to this endpoint.
    pub(super) fn take(&self, endpoint: &Arc<EndpointState>) -> Option<UpstreamConnection> {
        let now = Instant::now();
        let mut idle = self.lock();
        let mut at = idle.len();
        while at > 0 {
            at -= 1;
            let candidate = &idle[at];
            if now.duration_since(candidate.since) >= self.idle_timeout {
                // Those in front have been idle even longer.
                idle.drain(..=at);
                return None;
            }
            let is_usable = Arc::ptr_eq(&candidate.endpoint, endpoint)
                && candidate.connection.is_from(endpoint.silences());
            if candidate.connection.is_closed() || !is_usable {
                idle.remove(at);
            } else if candidate.connection.is_ready() {
                return Some(idle.remove(at).connection);
            }
            // Neither: its task has not processed the end of the last response. It stays for later.
        }
        None
    }

    /// Keeps a connection, if there is room and it is still open.
    pub(super) fn give_back(&self, connection: UpstreamConnection, endpoint: Arc<EndpointState>) {
        if connection.is_closed() {
            return;
        }
        let mut idle = self.lock();
        if idle.len() < self.limit
            && let Some(place) = self.budget.take()
        {
            idle.push(Idle { since: Instant::now(), connection, endpoint, _place: place });
        }
    }

    /// Closes expired connections. Returns whether any are left.
    pub(super) fn expire(&self, now: Instant) -> bool {
        let mut idle = self.lock();
        idle.retain(|idle| {
            !idle.connection.is_closed() && now.duration_since(idle.since) < self.idle_timeout
        });
        !idle.is_empty()
    }

    pub(super) fn clear(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The permission to reuse a guest's connections.
///
/// A server that once sent this guest bytes that answer no request may do so again. Then the next
/// answer on a kept connection may be the rest of an earlier one.
#[derive(Debug, Default)]
pub(super) struct Reuse {
    is_suspended: AtomicBool,
    suspended_at: Mutex<Option<Instant>>,
}

/// How long no connection is reused after such bytes.
const SUSPENSION: Duration = Duration::from_mins(10);

impl Reuse {
    pub(super) fn is_allowed(&self) -> bool {
        if !self.is_suspended.load(Ordering::Relaxed) {
            return true;
        }
        let at = *self.suspended_at.lock().unwrap_or_else(PoisonError::into_inner);
        let is_over = at.is_none_or(|at| at.elapsed() >= SUSPENSION);
        if is_over {
            self.is_suspended.store(false, Ordering::Relaxed);
        }
        is_over
    }

    pub(super) fn suspend(&self) {
        *self.suspended_at.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        self.is_suspended.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_of_idle_connections_is_shared() {
        let budget = IdleBudget::new(2);
        let held = [budget.take(), budget.clone().take()];
        assert!(held.iter().all(Option::is_some) && budget.take().is_none());
        drop(held);
        assert!(budget.take().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn reuse_is_suspended_for_a_while() {
        let reuse = Reuse::default();
        assert!(reuse.is_allowed());
        reuse.suspend();
        tokio::time::advance(SUSPENSION / 2).await;
        assert!(!reuse.is_allowed());
        tokio::time::advance(SUSPENSION / 2).await;
        assert!(reuse.is_allowed());
    }
}
