//! Descriptors that arrive over a unix socket (unix(7), `SCM_RIGHTS`) or by inheritance.

#![expect(unsafe_code, reason = "a descriptor that arrives is a number")]

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

/// Closes all descriptors but standard input, output and error. Must be called at the start of a
/// program, before it opens any: others may have left theirs open in this process.
///
/// # Errors
/// The kernel refuses. It can do so since Linux 5.9.
pub(crate) fn close_inherited() -> Result<(), Errno> {
    // SAFETY: nothing in this process owns one of these descriptors yet.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) };
    Errno::result(closed).map(drop)
}

/// Most descriptors that one message can carry (`SCM_MAX_FD` in the kernel).
const MOST: usize = 253;

/// Receives bytes, and the descriptors that were sent with them. No byte is the end.
///
/// # Errors
/// `EAGAIN` if nothing has arrived on a non-blocking socket. Those of recvmsg(2).
pub(crate) fn receive(socket: BorrowedFd<'_>, bytes: &mut [u8]) -> Result<(usize, Vec<OwnedFd>), Errno> {
    let mut control = cmsg_space!([std::os::fd::RawFd; MOST]);
    let mut into = [IoSliceMut::new(bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut into, Some(&mut control), flags)?;
    let mut descriptors = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = part {
            // SAFETY: the kernel has just installed these descriptors in this process (receive_fd),
            // and nothing else knows their numbers.
            descriptors.extend(numbers.into_iter().map(|number| unsafe { OwnedFd::from_raw_fd(number) }));
        }
    }
    Ok((message.bytes, descriptors))
}
