//! The users whose processes may connect as haproxies. A haproxy names the guest that it asks for,
//! so a user that may connect can read the metadata of any guest.

use std::io;

use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;

/// Users that may connect. The mode of the socket's file applies as well.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
pub enum HaproxyUsers {
    /// The mode of the file alone decides.
    Any,
    /// These user ids.
    Only(Vec<u32>),
}

/// The reason to reject a connection to the socket.
#[derive(Debug, thiserror::Error)]
pub(super) enum HaproxyUserError {
    #[error("user {user} is neither root nor the user of haproxy")]
    Other { user: u32 },
    #[error("cannot read the user of the peer")]
    Unknown { source: io::Error },
}

impl HaproxyUsers {
    /// Checks the user that the peer's process had when it connected (`SO_PEERCRED`).
    pub(super) fn check(&self, stream: &UnixStream) -> Result<(), HaproxyUserError> {
        let Self::Only(users) = self else { return Ok(()) };
        let peer = stream.peer_cred().map_err(|source| HaproxyUserError::Unknown { source })?;
        if users.contains(&peer.uid()) { Ok(()) } else { Err(HaproxyUserError::Other { user: peer.uid() }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_peer_of_another_user_is_rejected() {
        let (stream, _peer) = UnixStream::pair().unwrap();
        let own = nix::unistd::Uid::effective().as_raw();
        assert!(HaproxyUsers::Any.check(&stream).is_ok());
        assert!(HaproxyUsers::Only(vec![own]).check(&stream).is_ok());
        let rejected = HaproxyUsers::Only(vec![own + 1]).check(&stream);
        assert!(matches!(rejected, Err(HaproxyUserError::Other { user }) if user == own), "{rejected:?}");
    }
}
