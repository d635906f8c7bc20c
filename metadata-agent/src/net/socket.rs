//! Socket options that no library of ours sets.

use std::io;
use std::os::fd::AsFd;

use nix::sys::socket::{setsockopt, sockopt};

/// Has the kernel keep so many bytes, of its own accounting, until a socket is read, beyond `net.core.rmem_max` if need be.
///
/// # Errors
/// Without `CAP_NET_ADMIN`.
pub fn set_receive_buffer(socket: &impl AsFd, bytes: usize) -> io::Result<()> {
    Ok(setsockopt(socket, sockopt::RcvBufForce, &bytes)?)
}
