//! Errors of netlink requests.

use std::fmt;

use nix::errno::Errno;

use crate::net::netns::NetnsError;

#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    #[error("cannot open a netlink socket: {source}")]
    Socket { source: std::io::Error },
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The kernel refused the request.
    #[error("cannot {operation} {object}: {source}")]
    Refused { operation: &'static str, object: String, source: rtnetlink::Error },
}

/// Treats the absence of the object, or of its link, as success of a deletion.
pub(super) fn ignore_absent(deleted: Result<(), rtnetlink::Error>) -> Result<(), rtnetlink::Error> {
    match deleted {
        Err(error) if is_absence(&error) => Ok(()),
        deleted => deleted,
    }
}

/// Returns true if a link, qdisc or route does not exist.
pub(super) fn is_absence(error: &rtnetlink::Error) -> bool {
    matches!(errno(error), Some(Errno::ENODEV | Errno::ENOENT | Errno::ESRCH))
}

/// Returns the kernel's error number.
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
