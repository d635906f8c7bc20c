//! What can go wrong with a netlink request, and which refusals are none.

use std::fmt;

use nix::errno::Errno;

use crate::net::netns::NetnsError;

/// What can go wrong with a netlink request.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// No socket.
    #[error("cannot open a netlink socket: {source}")]
    Socket {
        /// Why not.
        source: std::io::Error,
    },
    /// No way into the namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The kernel refused.
    #[error("cannot {operation} {object}: {source}")]
    Refused {
        /// What was asked.
        operation: &'static str,
        /// Of what.
        object: String,
        /// The kernel's answer.
        source: rtnetlink::Error,
    },
}

/// What was to be deleted is gone, or the link that it was on.
pub(super) fn absent_is_fine(deleted: Result<(), rtnetlink::Error>) -> Result<(), rtnetlink::Error> {
    match deleted {
        Err(error) if is_absence(&error) => Ok(()),
        deleted => deleted,
    }
}

/// A link, a qdisc or a route is not there.
pub(super) fn is_absence(error: &rtnetlink::Error) -> bool {
    matches!(errno(error), Some(Errno::ENODEV | Errno::ENOENT | Errno::ESRCH))
}

/// The kernel's own word in a refusal.
pub(super) fn errno(error: &rtnetlink::Error) -> Option<Errno> {
    let rtnetlink::Error::NetlinkError(refusal) = error else { return None };
    Some(Errno::from_raw(refusal.raw_code().saturating_neg()))
}

pub(super) fn refused(
    operation: &'static str,
    object: impl fmt::Display,
    source: rtnetlink::Error,
) -> NetlinkError {
    NetlinkError::Refused { operation, object: format!("{object}"), source }
}
