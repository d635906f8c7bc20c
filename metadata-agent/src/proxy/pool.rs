//! Idle connections to one endpoint of Nova, the freshest first.
//!
//! Only a connection whose answer was read to its end comes back here. Whether it is still open is known only when it is
//! used; [`super::upstream`] deals with that.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::client::conn::http1::SendRequest;
use tokio::time::Instant;

/// What a connection to Nova takes requests by.
pub(super) type Sender = SendRequest<Full<Bytes>>;

#[derive(Debug)]
pub(super) struct Pool {
    capacity: usize,
    idle_timeout: Duration,
    /// The longest idle in front.
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

    /// Takes the connection that was used last, if that was within this time.
    pub(super) fn take(&self, used_within: Duration) -> Option<Sender> {
        let now = Instant::now();
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let mut at = idle.len();
        while at > 0 {
            at -= 1;
            let candidate = &idle[at];
            if now.duration_since(candidate.since) >= self.idle_timeout {
                // Those in front are idle for longer still.
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
            // Neither: its task has yet to notice that the last answer is over. Left for the next one.
        }
        None
    }

    /// Takes a connection back, if there is room and it is still open.
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
