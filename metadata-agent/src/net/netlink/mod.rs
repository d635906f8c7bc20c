//! Links, addresses, routes and qdiscs over rtnetlink: the only module that names the `rtnetlink` crates.

mod address;
mod error;
mod link;
mod qdisc;
mod turns;
mod watch;

pub use error::NetlinkError;
pub use link::{Link, VethPair};
pub use watch::{HookEvent, LinkEvent, watch_changes_in, watch_hooks, watch_links};

use rtnetlink::{Handle, new_connection_with_socket};
use tokio::runtime;

use self::turns::Connection;
use crate::net::netns::Netns;

/// A netlink socket in one namespace.
#[derive(Clone, Debug)]
pub struct Netlink {
    handle: Handle,
}

impl Netlink {
    /// Opens a socket in the namespace of the calling thread. The runtime that this is called on drives it.
    ///
    /// # Errors
    /// No socket is to be had.
    pub fn connect() -> Result<Self, NetlinkError> {
        let (connection, handle, _): (Connection, _, _) =
            new_connection_with_socket().map_err(|source| NetlinkError::Socket { source })?;
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    /// Opens a socket in another namespace.
    ///
    /// # Errors
    /// As [`Self::connect`], or the namespace cannot be entered.
    pub fn connect_in(netns: &Netns) -> Result<Self, NetlinkError> {
        let runtime = runtime::Handle::current();
        netns.run(|| {
            let _on_runtime = runtime.enter();
            Self::connect()
        })?
    }
}
