//! Larger buffers for long responses.
//!
//! A guest that does not read its response ties up the buffers that the response passes through. So
//! the usual ones are small enough for all connections at once. With them, a response of 1 MiB
//! takes half as much CPU time again. So a few connections have larger ones, each from the moment
//! that its guest has taken [`LONG`] bytes of one response. While no place is left for the guest, a
//! response goes on with the usual buffers.
//!
//! A connection keeps its place from one long response to the next, because buffers that shrink
//! in between cost the agent more CPU time. It gives the place back after a short response, or
//! once it has been idle for [`LARGE_IDLE`]. Until the guest has read all but what fits the usual
//! buffer, the place is taken in either case.
//!
//! A guest may take a place while it holds fewer than [`SHARE`] times the free ones. So one guest
//! alone gets two thirds of them, the next one two thirds of the rest, and one that holds none gets
//! one while any is free.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::SockRef;
use tokio::net::{TcpStream, UnixStream};

use super::client::GuestKey;

/// Bytes of a response after which it counts as long.
pub(crate) const LONG: u64 = 128 * 1024;

/// How long a connection without a request keeps its larger buffers.
pub(crate) const LARGE_IDLE: Duration = Duration::from_secs(1);

/// Send buffer towards a guest (`SO_SNDBUF`) during a long response. The kernel allows no more by
/// default (`net.core.wmem_max`).
pub const LARGE_SEND_BUFFER: usize = 208 * 1024;

/// Receive buffer towards Nova (`SO_RCVBUF`) during a long response. The kernel reduces it to
/// `net.core.rmem_max`, by default 208 KiB.
pub(crate) const LARGE_RECEIVE_BUFFER: usize = 512 * 1024;

/// Largest piece of a long response that is read from the upstream.
pub(crate) const LARGE_PIECE: usize = 256 * 1024;

/// Most connections with larger buffers at a time.
pub const LARGE_BUFFER_PLACES: usize = 96;

/// Places of a guest for each one that is free.
const SHARE: usize = 2;

/// Most memory of all larger buffers. The kernel doubles the options to allow for its overhead.
pub const LARGE_BUFFERS_MEMORY: usize =
    LARGE_BUFFER_PLACES * (2 * LARGE_SEND_BUFFER + 2 * LARGE_RECEIVE_BUFFER + 2 * LARGE_PIECE);

/// The places of connections with larger buffers.
#[derive(Clone, Debug)]
pub(crate) struct LargeBuffers(Arc<Places>);

#[derive(Debug)]
struct Places {
    /// Written under the lock only.
    free: AtomicUsize,
    by_guest: Mutex<HashMap<GuestKey, usize>>,
}

/// The places as one connection sees them.
#[derive(Debug)]
pub(crate) struct GuestPlaces {
    places: Arc<Places>,
    /// `None` behind a haproxy, whose socket has the kernel's usual buffers.
    guest: Option<GuestKey>,
}

/// The place of one connection. Dropping it frees the place.
#[derive(Debug)]
pub(crate) struct Place {
    places: Arc<Places>,
    guest: GuestKey,
}

impl LargeBuffers {
    pub(super) fn new() -> Self {
        Self::with_places(LARGE_BUFFER_PLACES)
    }

    pub(super) fn with_places(places: usize) -> Self {
        Self(Arc::new(Places { free: AtomicUsize::new(places), by_guest: Mutex::default() }))
    }

    /// Returns the places for a connection of this guest.
    pub(super) fn of_guest(&self, guest: Option<GuestKey>) -> GuestPlaces {
        GuestPlaces { places: Arc::clone(&self.0), guest }
    }
}

impl GuestPlaces {
    /// Takes a place if one is left for the guest.
    pub(super) fn take(&self) -> Option<Place> {
        let guest = self.guest?;
        // Connections without a place try again and again.
        if self.places.free.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let mut by_guest = self.places.lock();
        let free = self.places.free.load(Ordering::Relaxed);
        let held = by_guest.get(&guest).copied().unwrap_or(0);
        if free == 0 || held >= SHARE * free {
            return None;
        }
        by_guest.insert(guest, held + 1);
        self.places.free.store(free - 1, Ordering::Relaxed);
        Some(Place { places: Arc::clone(&self.places), guest })
    }
}

impl Places {
    fn lock(&self) -> MutexGuard<'_, HashMap<GuestKey, usize>> {
        self.by_guest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut by_guest = self.places.lock();
        if let Entry::Occupied(mut held) = by_guest.entry(self.guest) {
            *held.get_mut() -= 1;
            if *held.get() == 0 {
                held.remove();
            }
        }
        self.places.free.fetch_add(1, Ordering::Relaxed);
    }
}

/// A stream to a client, which may have a send buffer of its own in the kernel.
pub trait SendBuffer {
    /// Returns the socket, if its buffer is in the way of long responses.
    fn socket(&self) -> Option<SockRef<'_>> {
        None
    }

    /// Returns whether the send queue is shorter than two thirds of the buffer.
    fn has_room(&self) -> bool {
        true
    }
}

impl SendBuffer for TcpStream {
    fn socket(&self) -> Option<SockRef<'_>> {
        Some(SockRef::from(self))
    }

    fn has_room(&self) -> bool {
        // Then the kernel calls the socket writable. The runtime may not know yet.
        let mut sockets = [PollFd::new(self.as_fd(), PollFlags::POLLOUT)];
        poll(&mut sockets, PollTimeout::ZERO) == Ok(1)
    }
}

/// The kernel's usual size, which is that of a long response.
impl SendBuffer for UnixStream {}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest(number: u128) -> GuestKey {
        GuestKey::Instance(uuid::Uuid::from_u128(number).to_string().parse().unwrap())
    }

    #[test]
    fn no_guest_takes_the_places_of_all() {
        let places = LargeBuffers::with_places(96);
        let all = |number| {
            let own = places.of_guest(Some(guest(number)));
            std::iter::from_fn(|| own.take()).collect::<Vec<_>>()
        };
        let first = all(1);
        assert_eq!(first.len(), 64);
        let (second, third) = (all(2), all(3));
        assert_eq!((second.len(), third.len()), (22, 7));
        assert!(all(1).is_empty(), "another connection of a guest has no share of its own");
        drop(first);
        assert!(!all(4).is_empty());
        drop((second, third));
        assert_eq!(places.0.free.load(Ordering::Relaxed), 96);
        assert!(places.0.lock().is_empty());
    }
}
