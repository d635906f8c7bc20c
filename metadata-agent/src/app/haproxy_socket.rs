//! The unix socket for requests of Neutron's haproxy processes.

use nix::unistd::{Gid, Group, Uid, User};
use tokio::net::UnixListener;
use tracing::{info, warn};

use crate::config::{Config, SocketMode};
use crate::net::socket_file::{SocketFile, SocketFileError};

/// Modes of Neutron's metadata agent (neutron/agent/metadata/agent.py, `MODE_MAP`). A client needs
/// write access to connect.
const USER: u32 = 0o644;
const GROUP: u32 = 0o664;
const ALL: u32 = 0o666;

/// The bound socket. Dropping it removes its file.
#[derive(Debug)]
pub(super) struct HaproxySocket {
    file: SocketFile,
}

impl HaproxySocket {
    /// Binds the socket, if it is configured. Clients can connect, and wait until it is served.
    pub(super) fn bind(config: &Config) -> Result<Option<Self>, SocketFileError> {
        if !config.serve_metadata_proxy_socket {
            return Ok(None);
        }
        let (path, mode) = (&config.metadata_proxy_socket, mode(config));
        let file = SocketFile::bind(path, mode)?;
        info!(socket = %path.display(), mode = format_args!("{mode:04o}"), "serving haproxy");
        if mode == ALL {
            warn!(
                socket = %path.display(),
                "every user of this host can use the socket and read the metadata of any guest, unless its \
                 directory denies access; metadata_proxy_socket_mode restricts it"
            );
        }
        Ok(Some(Self { file }))
    }

    /// Takes the listener. The runtime of the caller polls it.
    pub(super) fn listener(&mut self) -> Result<UnixListener, SocketFileError> {
        self.file.listener()
    }
}

fn mode(config: &Config) -> u32 {
    match config.metadata_proxy_socket_mode {
        SocketMode::User => USER,
        SocketMode::Group => GROUP,
        SocketMode::All => ALL,
        SocketMode::Deduce => {
            let user = config.metadata_proxy_user.as_deref().and_then(uid);
            let group = config.metadata_proxy_group.as_deref().and_then(gid);
            deduced(user, group, Uid::effective(), Gid::effective())
        }
    }
}

/// Deduces the mode like `_get_socket_mode` in neutron/agent/metadata/agent.py, with one
/// difference: if the user or group is not configured, it is not assumed to be our own, because
/// other agents start haproxy as their own user.
fn deduced(user: Option<Uid>, group: Option<Gid>, own_user: Uid, own_group: Gid) -> u32 {
    if user.is_some_and(|user| user.is_root() || user == own_user) {
        USER
    } else if group == Some(own_group) {
        GROUP
    } else {
        ALL
    }
}

fn uid(text: &str) -> Option<Uid> {
    let number = text.parse().ok().map(Uid::from_raw);
    number.or_else(|| User::from_name(text).ok().flatten().map(|user| user.uid))
}

fn gid(text: &str) -> Option<Gid> {
    let number = text.parse().ok().map(Gid::from_raw);
    number.or_else(|| Group::from_name(text).ok().flatten().map(|group| group.gid))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mode_is_deduced_from_the_user_of_haproxy() {
        let (ours, others) = (Uid::from_raw(7), Uid::from_raw(8));
        let (our_group, other_group) = (Gid::from_raw(7), Gid::from_raw(8));
        for (user, group, want) in [
            (None, None, ALL),
            (Some(ours), None, USER),
            (Some(Uid::from_raw(0)), Some(other_group), USER),
            (Some(others), None, ALL),
            (Some(others), Some(our_group), GROUP),
            (Some(others), Some(other_group), ALL),
            (None, Some(our_group), GROUP),
        ] {
            assert_eq!(deduced(user, group, ours, our_group), want, "{user:?} {group:?}");
        }
        assert_eq!((uid("root"), uid("12")), (Some(Uid::from_raw(0)), Some(Uid::from_raw(12))));
        assert_eq!((gid("root"), uid("no-such-user")), (Some(Gid::from_raw(0)), None));
    }
}
