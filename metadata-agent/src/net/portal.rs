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
//! host. [`Portal::establish`] inspects the portal and creates what is missing, so a new agent
//! adopts the portal of an earlier one. All clients are behind one gateway with a fixed MAC
//! address, so the neighbour table has one entry for any number of guests.
//!
//! Guests behind another namespace, a router's or a DHCP server's, enter by a veth pair of that
//! namespace ([`Portal::add_uplink`]). Routes of their attachments send the replies back the same
//! way ([`PortalUplink::add_routes`]).

use std::net::{Ipv6Addr, SocketAddrV6, TcpListener};
use std::time::Duration;
use std::{fs, io};

use futures_util::{Stream, StreamExt};
use metadata_ebpf::from_guest::METADATA_MAC;
use metadata_ebpf::identity::{
    ATTACHMENT_PREFIX_LEN, AttachmentId, ClientAddress, IDENTITY_PREFIX, METADATA_PORT, PORTAL_ADDRESS,
};
use socket2::{Domain, Protocol, Socket, TcpKeepalive, Type};
use tracing::{debug, info, warn};

use crate::ids::{IfIndex, MacAddress};
use crate::net::netlink::{Link, LinkEvent, Netlink, NetlinkError, VethPair};
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

/// Sysctls of the portal's namespace, below `/proc/sys/net`, and their required values.
const SYSCTLS: [(&str, &str); 7] = [
    ("ipv6/conf/all/disable_ipv6", "0"),
    ("ipv6/conf/default/disable_ipv6", "0"),
    ("ipv6/conf/lo/disable_ipv6", "0"),
    ("ipv6/conf/md0/disable_ipv6", "0"),
    ("ipv6/conf/all/forwarding", "0"),
    ("ipv4/tcp_syncookies", "1"),
    // Applies to IPv6 too. Finds a path MTU below 1,280 bytes, which ICMPv6 cannot report, and one
    // whose ICMP errors are lost.
    ("ipv4/tcp_mtu_probing", "1"),
];

#[derive(Debug, thiserror::Error)]
pub enum PortalError {
    #[error(transparent)]
    Netns(#[from] NetnsError),
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// A link that was just created does not exist.
    #[error("interface {name} of the portal vanished while it was set up")]
    Vanished { name: &'static str },
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
}

/// The portal after set-up.
#[derive(Debug)]
pub struct Portal {
    netns: Netns,
    inside: Netlink,
    mtu: u32,
    /// Index of the host end of the veth pair.
    pub host_ifindex: IfIndex,
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
        let pair = VethPair { name: HOST_END, peer: PORTAL_END, peer_netns: &netns, mtu, peer_mac: None };
        let (host_end, portal_end) = establish_veth(&host, &inside, &pair).await?;

        // Set up the sysctls and the host end.
        netns.run(apply_sysctls)??;
        let mac = portal_end.mac.ok_or(PortalError::Vanished { name: PORTAL_END })?;
        let nsid = host_end.peer_nsid.and_then(|id| u32::try_from(id).ok()).ok_or(PortalError::NoNsid)?;
        host.disable_link_local(host_end.index).await?;
        host.set_up(host_end.index, mtu).await?;

        // Set up the portal's end and the address that the agent listens on.
        let lo = inside.link("lo").await?.ok_or(PortalError::Vanished { name: "lo" })?;
        inside.set_up(lo.index, lo.mtu).await?;
        inside.set_address(lo.index, PORTAL_ADDRESS.into(), 128).await?;
        set_up_portal_end(&inside, portal_end.index, mtu).await?;
        inside.set_route(identity_prefix(), GATEWAY, portal_end.index).await?;
        Ok(Self { netns, inside, mtu, host_ifindex: host_end.index, nsid, mac })
    }

    /// Connects another namespace to the portal by a veth pair, or creates the missing parts of it.
    /// `outside` is a socket in that namespace and `inode` identifies it.
    ///
    /// # Errors
    /// The kernel refuses, or the namespace is removed meanwhile.
    pub(crate) async fn add_uplink(
        &self,
        outside: &Netlink,
        inode: u32,
    ) -> Result<PortalUplink, PortalError> {
        let peer = format!("md{inode}");
        let (mtu, peer_mac) = (self.mtu, Some(self.mac));
        let pair = VethPair { name: HOST_END, peer: &peer, peer_netns: &self.netns, mtu, peer_mac };
        let (outer, inner) = establish_veth(outside, &self.inside, &pair).await?;
        let nsid = outer.peer_nsid.and_then(|id| u32::try_from(id).ok()).ok_or(PortalError::NoNsid)?;
        // The program takes frames before the network stack sees them, so that namespace does not
        // need IPv6.
        if let Err(error) = outside.disable_link_local(outer.index).await {
            debug!(%error, "cannot disable link-local address of portal uplink");
        }
        outside.set_up(outer.index, self.mtu).await?;
        set_up_portal_end(&self.inside, inner.index, self.mtu).await?;
        Ok(PortalUplink {
            inside: self.inside.clone(),
            inner: inner.index,
            outer: outer.index,
            nsid,
            mac: self.mac,
        })
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
        if let Some(link) = host.link(HOST_END).await? {
            host.delete_link(link.index).await?;
        }
        Netns::remove(name)?;
        Ok(())
    }
}

/// A connection into the portal from a namespace other than the host's.
#[derive(Debug)]
pub(crate) struct PortalUplink {
    inside: Netlink,
    inner: IfIndex,
    /// Index of its outer end, [`HOST_END`].
    pub outer: IfIndex,
    /// Namespace id of the portal as seen from that namespace.
    pub nsid: u32,
    /// MAC address of the portal's end. All uplinks have the same one, because the programs store
    /// only one.
    pub mac: MacAddress,
}

impl PortalUplink {
    /// Routes replies to the clients of an attachment through this uplink.
    ///
    /// # Errors
    /// The uplink is gone.
    pub(crate) async fn add_routes(&self, attachment: AttachmentId) -> Result<(), PortalError> {
        for prefix in ClientAddress::prefixes(attachment) {
            self.inside.set_route((prefix.into(), ATTACHMENT_PREFIX_LEN), GATEWAY, self.inner).await?;
        }
        Ok(())
    }

    /// Removes these routes, if they exist.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) async fn remove_routes(&self, attachment: AttachmentId) -> Result<(), PortalError> {
        for prefix in ClientAddress::prefixes(attachment) {
            self.inside.delete_route((prefix.into(), ATTACHMENT_PREFIX_LEN), GATEWAY, self.inner).await?;
        }
        Ok(())
    }
}

/// Brings up the portal's end of a veth pair and sets the gateway's MAC address, so that it needs
/// no resolution.
async fn set_up_portal_end(inside: &Netlink, end: IfIndex, mtu: u32) -> Result<(), PortalError> {
    inside.disable_link_local(end).await?;
    inside.set_up(end, mtu).await?;
    Ok(inside.set_neighbour(end, GATEWAY, MacAddress(METADATA_MAC)).await?)
}

/// Waits until the host end of the portal is deleted or moved away. Without it, redirected packets
/// have no destination.
pub(crate) async fn wait_until_lost(
    index: IfIndex,
    mut events: impl Stream<Item = LinkEvent> + Unpin,
    netlink: Netlink,
) {
    while let Some(event) = events.next().await {
        let is_gone = match event {
            LinkEvent::Present(_) => false,
            LinkEvent::Gone(gone) => gone == index,
            LinkEvent::Overrun => match netlink.links().await {
                Ok(links) => !links.iter().any(|link| link.index == index),
                Err(_) => false,
            },
        };
        if is_gone {
            return;
        }
    }
}

/// Returns both ends of a veth pair. Creates the pair again unless both ends exist and belong
/// together.
async fn establish_veth(
    host: &Netlink,
    inside: &Netlink,
    pair: &VethPair<'_>,
) -> Result<(Link, Link), PortalError> {
    let found = (host.link(pair.name).await?, inside.link(pair.peer).await?);
    if let (Some(host_end), Some(portal_end)) = &found
        && host_end.peer_index == Some(portal_end.index)
        && portal_end.peer_index == Some(host_end.index)
        && (pair.peer_mac.is_none() || pair.peer_mac == portal_end.mac)
    {
        info!(interface = pair.name, "portal interface adopted");
        return Ok((host_end.clone(), portal_end.clone()));
    }
    for (netlink, stray) in [(host, found.0), (inside, found.1)] {
        if let Some(stray) = stray {
            netlink.delete_link(stray.index).await?;
        }
    }
    host.add_veth(pair).await?;
    let host_end = host.link(pair.name).await?.ok_or(PortalError::Vanished { name: HOST_END })?;
    let portal_end = inside.link(pair.peer).await?.ok_or(PortalError::Vanished { name: PORTAL_END })?;
    info!(interface = pair.name, "portal interface created");
    Ok((host_end, portal_end))
}

/// Writes the sysctls that differ. In a container `/proc/sys` is read-only, and new namespaces
/// usually have the right values already. Only a disabled IPv6 is an error.
fn apply_sysctls() -> Result<(), PortalError> {
    for (name, want) in SYSCTLS {
        let path = format!("/proc/sys/net/{name}");
        let found = fs::read_to_string(&path).map_err(|source| PortalError::NoIpv6 { source })?;
        let found = found.trim().to_owned();
        if found == want {
            continue;
        }
        match fs::write(&path, want) {
            Ok(()) => {}
            Err(source) if name.ends_with("disable_ipv6") => {
                return Err(PortalError::Sysctl { name, found, want, source });
            }
            Err(error) => {
                warn!(sysctl = name, %found, %want, %error, "cannot set sysctl of portal");
            }
        }
    }
    Ok(())
}

fn identity_prefix() -> (Ipv6Addr, u8) {
    let (prefix, len) = IDENTITY_PREFIX;
    (Ipv6Addr::new(u16::from_be_bytes(prefix), 0, 0, 0, 0, 0, 0, 0), len)
}
