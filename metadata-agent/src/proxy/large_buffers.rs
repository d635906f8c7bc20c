//! Larger buffers for long responses.
//!
//! A guest that does not read its response ties up the buffers that the response passes through. So
//! the usual ones are small enough for all connections at once. With them, a response of 1 MiB
//! takes half as much CPU time again. So a few connections have larger ones, each from the moment
//! that its guest has taken [`LONG`] bytes of one response. While all places are taken, a response
//! goes on with the usual buffers.

use std::sync::Arc;

use socket2::SockRef;
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes of a response after which it counts as long.
pub(crate) const LONG: u64 = 128 * 1024;

/// Buffer of the kernel (`SO_SNDBUF`, `SO_RCVBUF`) on either side of a long response. The kernel
/// allows no more by default (`net.core.wmem_max`, `rmem_max`).
pub const LARGE_BUFFER: usize = 208 * 1024;

/// Largest piece of a long response that is read from the upstream.
pub(crate) const LARGE_PIECE: usize = 256 * 1024;

/// Most connections with larger buffers at a time.
pub const LARGE_BUFFER_PLACES: usize = 64;

/// Most memory of all larger buffers. The kernel doubles the options to allow for its overhead.
pub const LARGE_BUFFERS_MEMORY: usize = LARGE_BUFFER_PLACES * (2 * 2 * LARGE_BUFFER + 2 * LARGE_PIECE);

/// The places of connections with larger buffers.
#[derive(Clone, Debug)]
pub(crate) struct LargeBuffers(Arc<Semaphore>);

/// The place of one connection. Dropping it frees the place.
#[derive(Debug)]
pub(crate) struct Place {
    _permit: OwnedSemaphorePermit,
}

impl LargeBuffers {
    pub(super) fn new() -> Self {
        Self::with_places(LARGE_BUFFER_PLACES)
    }

    pub(super) fn with_places(places: usize) -> Self {
        Self(Arc::new(Semaphore::new(places)))
    }

    /// Takes a place if one is free.
    pub(super) fn take(&self) -> Option<Place> {
        Arc::clone(&self.0).try_acquire_owned().ok().map(|permit| Place { _permit: permit })
    }
}

/// A stream to a client, which may have a send buffer of its own in the kernel.
pub trait SendBuffer {
    /// Returns the socket, if its buffer is in the way of long responses.
    fn socket(&self) -> Option<SockRef<'_>> {
        None
    }
}

impl SendBuffer for TcpStream {
    fn socket(&self) -> Option<SockRef<'_>> {
        Some(SockRef::from(self))
    }
}

/// The kernel's usual size, which is that of a long response.
impl SendBuffer for UnixStream {}
