//! The portal: a network namespace that belongs to the agent and contains no process.
//!
//! ```text
//!  host namespace                       portal namespace
//!    md-portal  <------ veth ------>  md0   fd64::/14 via fe80::1
//!    [md_to_guest]                     lo    fd6d::a9fe:a9fe/128   <- the agent's listener
//! ```
//!
//! Guest connections end in the portal. There they meet no conntrack, netfilter rule, rp_filter or
//! route of the host, and a bug of the agent does not give a guest access to other sockets of the
//! host. All clients are behind one gateway with a fixed MAC address, so the neighbour table has
//! one entry for any number of guests.
//!
//! [`Portal::establish`] inspects the portal and creates what is missing, so a new agent adopts the
//! portal of an earlier one. [`PortalGuard`] does the same when other software changed something:
//! it compares what is [observed](observed) with what is [desired](desired).
//!
//! Guests behind another namespace, a router's or a DHCP server's, enter by a veth pair of that
//! namespace ([`Portal::add_uplink`]). Routes of their attachments send the replies back the same
//! way ([`PortalUplink::add_routes`]).

mod desired;
mod guard;
mod host_end;
mod observed;
mod repair;
mod sysctl;
mod uplink;
mod veth;

pub(crate) use guard::PortalGuard;
pub(crate) use host_end::{HostEndUser, host_end};
pub(crate) use uplink::PortalUplink;

use std::io;
use std::net::{Ipv6Addr, SocketAddrV6, TcpListener};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use metadata_ebpf::from_guest::METADATA_MAC;
use metadata_ebpf::identity::{IDENTITY_PREFIX, METADATA_PORT, PORTAL_ADDRESS};
use socket2::{Domain, Protocol, Socket, TcpKeepalive, Type};
use tracing::warn;

use self::sysctl::WrongSysctl;
use self::uplink::Uplinks;
use crate::ids::{IfIndex, MacAddress};
use crate::net::netlink::{Link, Netlink, NetlinkError, VethPair};
use crate::net::netns::{Netns, NetnsError};

/// Name of the host end of the veth pair.
pub(crate) const HOST_END: &str = "md-portal";
const PORTAL_END: &str = "md0";

/// The next hop of all clients: an address that exists only in routes, behind the host end.
const GATEWAY: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// Buffers of a guest's connection (`SO_SNDBUF`, `SO_RCVBUF`), which it inherits from the listener.
/// They replace the kernel's automatic sizes, which grow to several MiB for a guest that reads fast
/// at first. The host's sysctls and a read-only `/proc/sys` have no influence on them.
const SEND_BUFFER: usize = 64 * 1024;
const RECEIVE_BUFFER: usize = 24 * 1024;

/// Largest packet, with the kernel's overhead, that goes into a buffer that is nearly full.
const LARGEST_PACKET: usize = 68 * 1024;

/// Most kernel memory that the buffers of one connection use. The kernel doubles the options to
/// allow for its overhead.
pub const SOCKET_MEMORY: usize = 2 * (SEND_BUFFER + RECEIVE_BUFFER) + 2 * LARGEST_PACKET;

/// The kernel probes a connection that carries nothing for this long, and resets it if no probe is
/// answered. If the agent hangs, the programs leave the guest's answers to the host's own path.
/// Then that path or this reset ends the connection. A guest may pause for 20 s.
const KEEPALIVE: TcpKeepalive = TcpKeepalive::new()
    .with_time(Duration::from_secs(5))
    .with_interval(Duration::from_secs(5))
    .with_retries(3);

#[derive(Debug, thiserror::Error)]
pub enum PortalError {
    #[error(transparent)]
    Netns(#[from] NetnsError),
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// A link that was just created does not exist.
    #[error("interface {name} of the portal vanished while it was set up")]
    Vanished { name: String },
    /// The kernel has not assigned an id to the portal's namespace.
    #[error("the kernel has no namespace id for the peer of {HOST_END}")]
    NoNsid,
    /// IPv6 is disabled and cannot be enabled.
    #[error("net.{name} is {found} in the portal and cannot be set to {want}: {source}")]
    Sysctl { name: &'static str, found: String, want: &'static str, source: io::Error },
    /// This kernel has no IPv6.
    #[error("this kernel has no IPv6 (ipv6.disable=1?), which carries the identity of guests: {source}")]
    NoIpv6 { source: io::Error },
    #[error("cannot listen on [{}]:{METADATA_PORT} in the portal: {source}", Ipv6Addr::from(PORTAL_ADDRESS))]
    Listen { source: io::Error },
    /// The interface was created again, and the program is not on it yet.
    #[error("{HOST_END} has no program that returns packets to guests")]
    NotConnected,
}

/// The portal after set-up.
#[derive(Debug)]
pub struct Portal {
    netns: Netns,
    host: Netlink,
    inside: Netlink,
    mtu: u32,
    /// Index of the host end of the veth pair.
    host_ifindex: AtomicU32,
    /// Names of optional sysctls that cannot be written.
    unwritable: Mutex<Vec<&'static str>>,
    uplinks: Uplinks,
    /// Namespace id of the portal as seen from the host's namespace.
    pub nsid: u32,
    /// MAC address of the portal's end.
    pub mac: MacAddress,
}

impl Portal {
    /// Creates the portal, or the missing parts of it. `mtu` is that of the veth pair, in bytes. It
    /// bounds the segments between guests and agent, as the guests' own MTU does.
    ///
    /// # Errors
    /// `CAP_SYS_ADMIN` or `CAP_NET_ADMIN` is missing, or the kernel has no IPv6.
    pub async fn establish(name: &str, mtu: u32) -> Result<Self, PortalError> {
        // Open or create the namespace and the veth pair into it.
        let netns = match Netns::named(name)? {
            Some(netns) => netns,
            None => Netns::create(name)?,
        };
        let host = Netlink::connect()?;
        let inside = Netlink::connect_in(&netns)?;
        let pair =
            VethPair { name: HOST_END, peer: PORTAL_END, peer_netns: &netns, mtu, mac: None, peer_mac: None };
        let (host_end, portal_end) = veth::establish(&host, &inside, &pair).await?;

        // Set up both ends.
        let mac = portal_end.mac.ok_or_else(|| PortalError::Vanished { name: PORTAL_END.to_owned() })?;
        let nsid = link_nsid(&host_end)?;
        let portal = Self {
            netns,
            host,
            inside,
            mtu,
            host_ifindex: AtomicU32::new(host_end.index.0),
            unwritable: Mutex::default(),
            uplinks: Uplinks::default(),
            nsid,
            mac,
        };
        portal.complete().await?;
        Ok(portal)
    }

    /// Returns the index of the host end of the veth pair.
    pub fn host_ifindex(&self) -> IfIndex {
        IfIndex(self.host_ifindex.load(Ordering::Relaxed))
    }

    fn set_host_ifindex(&self, index: IfIndex) {
        self.host_ifindex.store(index.0, Ordering::Relaxed);
    }

    fn unwritable(&self) -> Vec<&'static str> {
        self.unwritable.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Logs sysctls that cannot be written. They do not count as damage later.
    fn note_unwritable(&self, refused: Vec<(WrongSysctl, io::Error)>) {
        let mut unwritable = self.unwritable.lock().unwrap_or_else(PoisonError::into_inner);
        for (WrongSysctl { name, found, want, .. }, error) in refused {
            if !unwritable.contains(&name) {
                warn!(sysctl = name, %found, %want, %error, "cannot set sysctl of portal");
                unwritable.push(name);
            }
        }
    }

    /// Opens a listener in the portal. Several agents may hold one at the same time
    /// (`SO_REUSEPORT`), so that one agent can take over from another.
    ///
    /// # Errors
    /// `CAP_NET_BIND_SERVICE` is missing, or a listener without `SO_REUSEPORT` exists.
    pub fn listen(&self, backlog: i32) -> Result<TcpListener, PortalError> {
        let listen = || -> io::Result<TcpListener> {
            let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP))?;
            socket.set_only_v6(true)?;
            socket.set_reuse_address(true)?;
            socket.set_reuse_port(true)?;
            socket.set_nonblocking(true)?;
            socket.set_send_buffer_size(SEND_BUFFER)?;
            socket.set_recv_buffer_size(RECEIVE_BUFFER)?;
            // Connections inherit it, even those that the agent never accepts.
            socket.set_tcp_keepalive(&KEEPALIVE)?;
            socket.bind(&SocketAddrV6::new(PORTAL_ADDRESS.into(), METADATA_PORT, 0, 0).into())?;
            socket.listen(backlog)?;
            Ok(socket.into())
        };
        self.netns.run(listen)?.map_err(|source| PortalError::Listen { source })
    }

    /// Removes the portal with this name, or the remaining parts of it.
    ///
    /// # Errors
    /// The kernel refuses to remove a link or a mount.
    pub(crate) async fn remove(name: &str) -> Result<(), PortalError> {
        // Deleting one end deletes the other end at once. The namespace itself is freed
        // asynchronously.
        let host = Netlink::connect()?;
        if let Some(link) = host.link(HOST_END).await?.filter(|link| link.name == HOST_END) {
            host.delete_link(link.index).await?;
        }
        Netns::remove(name)?;
        Ok(())
    }
}

/// Brings up the portal's end of a veth pair and sets the gateway's MAC address, so that it needs
/// no resolution.
async fn set_up_inner_end(inside: &Netlink, end: IfIndex, mtu: u32) -> Result<(), PortalError> {
    inside.disable_link_local(end).await?;
    inside.set_up(end, mtu).await?;
    Ok(inside.set_neighbour(end, GATEWAY, MacAddress(METADATA_MAC)).await?)
}

/// Returns the id by which the namespace of an outer end refers to the portal.
fn link_nsid(outer: &Link) -> Result<u32, PortalError> {
    outer.peer_nsid.and_then(|id| u32::try_from(id).ok()).ok_or(PortalError::NoNsid)
}

fn identity_prefix() -> (Ipv6Addr, u8) {
    let (prefix, len) = IDENTITY_PREFIX;
    (Ipv6Addr::new(u16::from_be_bytes(prefix), 0, 0, 0, 0, 0, 0, 0), len)
}
