//! Socket options that our libraries do not set.

use std::io;
use std::os::fd::AsFd;

use nix::sys::socket::{setsockopt, sockopt};

/// Sets the receive buffer, in bytes of kernel accounting, beyond `net.core.rmem_max` if necessary.
///
/// # Errors
/// `CAP_NET_ADMIN` is missing.
pub(crate) fn set_receive_buffer(socket: &impl AsFd, bytes: usize) -> io::Result<()> {
    Ok(setsockopt(socket, sockopt::RcvBufForce, &bytes)?)
}
