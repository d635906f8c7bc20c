//! Idle connections to one endpoint, the most recently used first.
//!
//! A connection comes back only after its response was read to the end. Whether it is still open
//! shows only when it is used; [`Upstream`](super::Upstream) handles that.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::client::conn::http1::SendRequest;
use tokio::time::Instant;

/// The sending half of an upstream connection.
pub(super) type Sender = SendRequest<Full<Bytes>>;

#[derive(Debug)]
pub(super) struct Pool {
    capacity: usize,
    idle_timeout: Duration,
    /// The front has been idle longest.
    idle: Mutex<VecDeque<Idle>>,
}

#[derive(Debug)]
struct Idle {
    since: Instant,
    sender: Sender,
}

impl Pool {
    pub(super) fn new(capacity: usize, idle_timeout: Duration) -> Self {
        Self { capacity, idle_timeout, idle: Mutex::new(VecDeque::with_capacity(capacity)) }
    }

    /// Takes the most recently used connection, if it was used within this time.
    pub(super) fn take(&self, used_within: Duration) -> Option<Sender> {
        let now = Instant::now();
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let mut at = idle.len();
        while at > 0 {
            at -= 1;
            let candidate = &idle[at];
            if now.duration_since(candidate.since) >= self.idle_timeout {
                // Those in front have been idle even longer.
                idle.drain(..=at);
                return None;
            }
            if now.duration_since(candidate.since) >= used_within {
                return None;
            }
            if candidate.sender.is_closed() {
                idle.remove(at);
            } else if candidate.sender.is_ready() {
                return idle.remove(at).map(|taken| taken.sender);
            }
            // Neither: its task has not processed the end of the last response. It stays for later.
        }
        None
    }

    /// Keeps a connection, if there is room and it is still open.
    pub(super) fn give_back(&self, sender: Sender) {
        if sender.is_closed() {
            return;
        }
        let since = Instant::now();
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        while idle.front().is_some_and(|oldest| since.duration_since(oldest.since) >= self.idle_timeout) {
            idle.pop_front();
        }
        if idle.len() < self.capacity {
            idle.push_back(Idle { since, sender });
        }
    }

    /// Closes all idle connections.
    pub(super) fn clear(&self) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}
