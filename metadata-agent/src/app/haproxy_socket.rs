//! The unix socket for requests of Neutron's haproxy processes.
//!
//! A process that can use the socket can read the metadata of any guest. So access is never wider
//! than with Neutron's own agent. Our user is root, and the haproxies may run as another user, to
//! which we cannot give the file without another capability. We can give it to a group that the
//! process is in. Otherwise the mode has to admit all users, and the check of the peer's user
//! admits one.

use std::convert::Infallible;
use std::os::unix::net::UnixListener;

use nix::unistd::{Gid, Group, Uid, User, getgroups};
use tokio::sync::watch;
use tracing::{info, warn};

use crate::config::{Config, SocketMode};
use crate::net::damage::{DamageReports, Part};
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
    /// The group of the file, if it is not the process's own.
    group: Option<Gid>,
    users: HaproxyUsers,
}

impl HaproxySocket {
    /// Binds the socket, if it is configured. Clients can connect, and wait until it is served.
    pub(super) fn bind(config: &Config) -> Result<Option<Self>, SocketFileError> {
        if !config.serve_metadata_proxy_socket {
            return Ok(None);
        }
        let path = &config.metadata_proxy_socket;
        let SocketAccess { mode, group, users } = SocketAccess::from_config(config);
        let file = SocketFile::bind_for_group(path, mode, group)?;
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

    /// Publishes the listener, and another one whenever other software has removed the file.
    pub(super) async fn keep(
        &mut self,
        listeners: watch::Sender<Option<UnixListener>>,
        damage: DamageReports,
    ) -> Infallible {
        loop {
            listeners.send_replace(Some(self.file.listener()));
            self.file.restored(Part::HaproxySocket, &damage).await;
        }
    }

    pub(super) fn users(&self) -> HaproxyUsers {
        self.users.clone()
    }
}

impl SocketAccess {
    fn from_config(config: &Config) -> Self {
        let own = Uid::effective();
        let group = config.metadata_proxy_group.as_deref().and_then(gid);
        match config.metadata_proxy_socket_mode {
            SocketMode::User => Self { mode: USER, group: None, users: only([Uid::from_raw(0), own]) },
            SocketMode::Group => Self { mode: GROUP, group, users: HaproxyUsers::Any },
            SocketMode::All => Self { mode: ALL, group: None, users: HaproxyUsers::Any },
            SocketMode::Deduce => {
                let user = match config.metadata_proxy_user.as_deref() {
                    Some(name) => configured_user(name),
                    None => uid(NEUTRON_USER),
                };
                let mut own_groups = getgroups().unwrap_or_default();
                own_groups.push(Gid::effective());
                Self::deduced(user, group, own, &own_groups)
            }
        }
    }

    /// Deduces the access like `_get_socket_mode` in neutron/agent/metadata/agent.py, and permits
    /// only the user of haproxy.
    fn deduced(user: Option<Uid>, group: Option<Gid>, own_user: Uid, own_groups: &[Gid]) -> Self {
        let root = Uid::from_raw(0);
        match user {
            Some(user) if user != root && user != own_user => {
                let group = group.filter(|group| own_groups.contains(group));
                let mode = if group.is_some() { GROUP } else { ALL };
                Self { mode, group, users: only([root, own_user, user]) }
            }
            Some(_) | None => Self { mode: USER, group: None, users: only([root, own_user]) },
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
        let [our_group, joined, other_group] = [7, 9, 8].map(Gid::from_raw);
        for (user, group, mode, users) in [
            (None, None, USER, &[0, 7][..]),
            (None, Some(our_group), USER, &[0, 7]),
            (None, Some(other_group), USER, &[0, 7]),
            (Some(ours), None, USER, &[0, 7]),
            (Some(Uid::from_raw(0)), Some(other_group), USER, &[0, 7]),
            (Some(others), None, ALL, &[0, 7, 8]),
            (Some(others), Some(our_group), GROUP, &[0, 7, 8]),
            (Some(others), Some(joined), GROUP, &[0, 7, 8]),
            (Some(others), Some(other_group), ALL, &[0, 7, 8]),
        ] {
            let users = HaproxyUsers::Only(users.to_vec());
            let want = SocketAccess { mode, group: group.filter(|_| mode == GROUP), users };
            let found = SocketAccess::deduced(user, group, ours, &[our_group, joined]);
            assert_eq!(found, want, "{user:?} {group:?}");
        }
        assert_eq!(only([Uid::from_raw(0), Uid::from_raw(0)]), HaproxyUsers::Only(vec![0]));
        assert_eq!((uid("root"), uid("12")), (Some(Uid::from_raw(0)), Some(Uid::from_raw(12))));
        assert_eq!((gid("root"), uid("no-such-user")), (Some(Gid::from_raw(0)), None));
    }
}
