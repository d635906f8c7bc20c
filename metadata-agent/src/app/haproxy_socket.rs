//! The unix socket for requests of Neutron's haproxy processes.
//!
//! A process that can use the socket can read the metadata of any guest. So access is never wider
//! than with Neutron's own agent. Our user is root, and the haproxies may run as another user, to
//! which we cannot give the file without another capability. The mode then has to admit all users,
//! and the check of the peer's user admits one.

use nix::unistd::{Gid, Group, Uid, User};
use tokio::net::UnixListener;
use tracing::{info, warn};

use crate::config::{Config, SocketMode};
use crate::net::socket_file::{SocketFile, SocketFileError};
use crate::proxy::HaproxyUsers;

/// Modes of Neutron's metadata agent (neutron/agent/metadata/agent.py, `MODE_MAP`). A client needs
/// write access to connect.
const USER: u32 = 0o644;
const GROUP: u32 = 0o664;
const ALL: u32 = 0o666;

/// User of Neutron's agents in distribution packages. Unless they are told otherwise, the agents
/// start haproxy as their own user (`metadata_proxy_user` in
/// neutron/agent/metadata/driver_base.py).
const NEUTRON_USER: &str = "neutron";

/// The bound socket. Dropping it removes its file.
#[derive(Debug)]
pub(super) struct HaproxySocket {
    file: SocketFile,
    users: HaproxyUsers,
}

/// The processes that may use the socket.
#[derive(Debug, PartialEq, Eq)]
struct SocketAccess {
    mode: u32,
    users: HaproxyUsers,
}

impl HaproxySocket {
    /// Binds the socket, if it is configured. Clients can connect, and wait until it is served.
    pub(super) fn bind(config: &Config) -> Result<Option<Self>, SocketFileError> {
        if !config.serve_metadata_proxy_socket {
            return Ok(None);
        }
        let path = &config.metadata_proxy_socket;
        let SocketAccess { mode, users } = SocketAccess::from_config(config);
        let file = SocketFile::bind(path, mode)?;
        info!(socket = %path.display(), mode = format_args!("{mode:04o}"), ?users, "serving haproxy");
        if mode == ALL && users == HaproxyUsers::Any {
            warn!(
                socket = %path.display(),
                "every user of this host can use the socket and read the metadata of any guest, unless its \
                 directory denies access; metadata_proxy_socket_mode restricts it"
            );
        }
        Ok(Some(Self { file, users }))
    }

    /// Takes the listener. The runtime of the caller polls it.
    pub(super) fn listener(&mut self) -> Result<UnixListener, SocketFileError> {
        self.file.listener()
    }

    pub(super) fn users(&self) -> HaproxyUsers {
        self.users.clone()
    }
}

impl SocketAccess {
    fn from_config(config: &Config) -> Self {
        let own = Uid::effective();
        match config.metadata_proxy_socket_mode {
            SocketMode::User => Self { mode: USER, users: only([Uid::from_raw(0), own]) },
            SocketMode::Group => Self { mode: GROUP, users: HaproxyUsers::Any },
            SocketMode::All => Self { mode: ALL, users: HaproxyUsers::Any },
            SocketMode::Deduce => {
                let user = match config.metadata_proxy_user.as_deref() {
                    Some(name) => configured_user(name),
                    None => uid(NEUTRON_USER),
                };
                let group = config.metadata_proxy_group.as_deref().and_then(gid);
                Self::deduced(user, group, own, Gid::effective())
            }
        }
    }

    /// Deduces the access like `_get_socket_mode` in neutron/agent/metadata/agent.py, and permits
    /// only the user of haproxy.
    fn deduced(user: Option<Uid>, group: Option<Gid>, own_user: Uid, own_group: Gid) -> Self {
        let root = Uid::from_raw(0);
        match user {
            Some(user) if user != root && user != own_user => Self {
                mode: if group == Some(own_group) { GROUP } else { ALL },
                users: only([root, own_user, user]),
            },
            Some(_) | None => Self { mode: USER, users: only([root, own_user]) },
        }
    }
}

fn configured_user(name: &str) -> Option<Uid> {
    let user = uid(name);
    if user.is_none() {
        warn!(user = name, "metadata_proxy_user does not exist; only root can use the socket");
    }
    user
}

fn only(users: impl IntoIterator<Item = Uid>) -> HaproxyUsers {
    let mut users: Vec<_> = users.into_iter().map(Uid::as_raw).collect();
    users.dedup();
    HaproxyUsers::Only(users)
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
    fn access_is_deduced_from_the_user_of_haproxy() {
        let (ours, others) = (Uid::from_raw(7), Uid::from_raw(8));
        let (our_group, other_group) = (Gid::from_raw(7), Gid::from_raw(8));
        for (user, group, mode, users) in [
            (None, None, USER, &[0, 7][..]),
            (None, Some(our_group), USER, &[0, 7]),
            (None, Some(other_group), USER, &[0, 7]),
            (Some(ours), None, USER, &[0, 7]),
            (Some(Uid::from_raw(0)), Some(other_group), USER, &[0, 7]),
            (Some(others), None, ALL, &[0, 7, 8]),
            (Some(others), Some(our_group), GROUP, &[0, 7, 8]),
            (Some(others), Some(other_group), ALL, &[0, 7, 8]),
        ] {
            let want = SocketAccess { mode, users: HaproxyUsers::Only(users.to_vec()) };
            assert_eq!(SocketAccess::deduced(user, group, ours, our_group), want, "{user:?} {group:?}");
        }
        assert_eq!(only([Uid::from_raw(0), Uid::from_raw(0)]), HaproxyUsers::Only(vec![0]));
        assert_eq!((uid("root"), uid("12")), (Some(Uid::from_raw(0)), Some(Uid::from_raw(12))));
        assert_eq!((gid("root"), uid("no-such-user")), (Some(Gid::from_raw(0)), None));
    }
}
