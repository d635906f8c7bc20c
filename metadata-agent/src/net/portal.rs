//! The portal: a network namespace that belongs to the agent alone and in which no process lives.
//!
//! ```text
//! host namespace                       portal namespace
//!   md-portal  <------ veth ------>  md0   fd6d::/16 via fe80::1
//!   [md_to_guest]                     lo    fd6d::a9fe:a9fe/128   <- the agent's listener
//! ```
//!
//! Guest connections end there, so they meet no conntrack, no netfilter rule, no rp_filter and no route of the host, and a fault
//! of ours gives a guest no way to the host's other sockets. [`Portal::establish`] observes what there is and makes what is
//! missing, so a new agent adopts what a dead one left. All clients are behind one gateway with a pinned MAC address:
//! the neighbour table holds one entry however many guests ask.
//!
//! Guests that are met in another namespace, a router's or a DHCP server's, come by a veth pair of that namespace's own
//! ([`Portal::add_uplink`]), and routes of their attachments lead the answers back by it ([`PortalUplink::add_routes`]).

use std::net::{Ipv6Addr, SocketAddrV6, TcpListener};
use std::{fs, io};

use futures_util::{Stream, StreamExt};
use metadata_ebpf::from_guest::METADATA_MAC;
use metadata_ebpf::identity::{AttachmentId, ClientAddress, IDENTITY_PREFIX, METADATA_PORT, PORTAL_ADDRESS};
use socket2::{Domain, Protocol, Socket, Type};
use tracing::{debug, info, warn};

use crate::ids::{IfIndex, MacAddress};
use crate::net::netlink::{Link, LinkEvent, Netlink, NetlinkError, VethPair};
use crate::net::netns::{Netns, NetnsError};

/// Name of the host end of the veth pair.
pub const HOST_END: &str = "md-portal";
const PORTAL_END: &str = "md0";

/// The next hop of all clients: an address that only a route names, behind the host end.
const GATEWAY: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// Per-namespace settings that the portal relies on; `net.` and path separators aside, as `sysctl -a` prints them.
const SYSCTLS: [(&str, &str); 6] = [
    ("ipv6/conf/all/disable_ipv6", "0"),
    ("ipv6/conf/default/disable_ipv6", "0"),
    ("ipv6/conf/lo/disable_ipv6", "0"),
    ("ipv6/conf/md0/disable_ipv6", "0"),
    ("ipv6/conf/all/forwarding", "0"),
    ("ipv4/tcp_syncookies", "1"),
];

/// What can go wrong with the portal.
#[derive(Debug, thiserror::Error)]
pub enum PortalError {
    /// The namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// A link, an address or a route.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// A link that was just made is not there.
    #[error("interface {name} of the portal vanished while it was set up")]
    Vanished {
        /// Its name.
        name: &'static str,
    },
    /// The kernel knows no id for the portal's namespace.
    #[error("the kernel gives no namespace id for the peer of {HOST_END}")]
    NoNsid,
    /// IPv6 is off and cannot be switched on.
    #[error("net.{name} is {found} in the portal and cannot be set to {want}: {source}")]
    Sysctl {
        /// The setting, with slashes.
        name: &'static str,
        /// What it is.
        found: String,
        /// What it must be.
        want: &'static str,
        /// Why it cannot be set.
        source: io::Error,
    },
    /// This kernel has no IPv6.
    #[error("this kernel has no IPv6 (ipv6.disable=1?), which carries the identity of guests: {source}")]
    NoIpv6 {
        /// The first file that is missing.
        source: io::Error,
    },
    /// The listener.
    #[error("cannot listen on [{}]:{METADATA_PORT} in the portal: {source}", Ipv6Addr::from(PORTAL_ADDRESS))]
    Listen {
        /// Why not.
        source: io::Error,
    },
}

/// The portal, set up.
#[derive(Debug)]
pub struct Portal {
    netns: Netns,
    inside: Netlink,
    mtu: u32,
    /// Index of the host end of the veth pair.
    pub host_ifindex: IfIndex,
    /// Namespace id of the portal as the host's namespace sees it.
    pub nsid: u32,
    /// MAC address of the portal's end.
    pub mac: MacAddress,
}

impl Portal {
    /// Makes the portal, or what is missing of it. `mtu` is the veth pair's, in bytes: it bounds the segments that guests
    /// and agent send each other, as guests' own MTU does.
    ///
    /// # Errors
    /// Without `CAP_SYS_ADMIN` and `CAP_NET_ADMIN`, or on a kernel without IPv6.
    pub async fn establish(name: &str, mtu: u32) -> Result<Self, PortalError> {
        let netns = match Netns::named(name)? {
            Some(netns) => netns,
            None => Netns::create(name)?,
        };
        let host = Netlink::connect()?;
        let inside = Netlink::connect_in(&netns)?;
        let pair = VethPair { name: HOST_END, peer: PORTAL_END, peer_netns: &netns, mtu, peer_mac: None };
        let (host_end, portal_end) = establish_veth(&host, &inside, &pair).await?;

        netns.run(settle_sysctls)??;
        let mac = portal_end.mac.ok_or(PortalError::Vanished { name: PORTAL_END })?;
        let nsid = host_end.peer_nsid.and_then(|id| u32::try_from(id).ok()).ok_or(PortalError::NoNsid)?;
        host.disable_link_local(host_end.index).await?;
        host.set_up(host_end.index, mtu).await?;
        let lo = inside.link("lo").await?.ok_or(PortalError::Vanished { name: "lo" })?;
        inside.set_up(lo.index, lo.mtu).await?;
        inside.set_address(lo.index, PORTAL_ADDRESS.into(), 128).await?;
        ready_for_clients(&inside, portal_end.index, mtu).await?;
        inside.set_route(identity_prefix(), GATEWAY, portal_end.index).await?;
        Ok(Self { netns, inside, mtu, host_ifindex: host_end.index, nsid, mac })
    }

    /// Makes a way into the portal from another namespace, or what is missing of it. `outside` is a socket there, and
    /// `number` tells that namespace from all others.
    ///
    /// # Errors
    /// The kernel refuses, or the namespace goes away meanwhile.
    pub async fn add_uplink(&self, outside: &Netlink, number: u32) -> Result<PortalUplink, PortalError> {
        let peer = format!("md{number}");
        let (mtu, peer_mac) = (self.mtu, Some(self.mac));
        let pair = VethPair { name: HOST_END, peer: &peer, peer_netns: &self.netns, mtu, peer_mac };
        let (outer, inner) = establish_veth(outside, &self.inside, &pair).await?;
        let nsid = outer.peer_nsid.and_then(|id| u32::try_from(id).ok()).ok_or(PortalError::NoNsid)?;
        // Frames are taken before any stack sees them, so it does not matter whether that namespace has IPv6.
        if let Err(error) = outside.disable_link_local(outer.index).await {
            debug!(%error, "the portal's interface there may have a link-local address");
        }
        outside.set_up(outer.index, self.mtu).await?;
        ready_for_clients(&self.inside, inner.index, self.mtu).await?;
        Ok(PortalUplink {
            inside: self.inside.clone(),
            inner: inner.index,
            outer: outer.index,
            nsid,
            mac: self.mac,
        })
    }

    /// Opens a listener in the portal. Several agents may hold one at the same time (`SO_REUSEPORT`), so that one can take over
    /// from another.
    ///
    /// # Errors
    /// Without `CAP_NET_BIND_SERVICE`, or when another kind of listener is there.
    pub fn listen(&self, backlog: i32) -> Result<TcpListener, PortalError> {
        let listen = || -> io::Result<TcpListener> {
            let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP))?;
            socket.set_only_v6(true)?;
            socket.set_reuse_address(true)?;
            socket.set_reuse_port(true)?;
            socket.set_nonblocking(true)?;
            socket.bind(&SocketAddrV6::new(PORTAL_ADDRESS.into(), METADATA_PORT, 0, 0).into())?;
            socket.listen(backlog)?;
            Ok(socket.into())
        };
        self.netns.run(listen)?.map_err(|source| PortalError::Listen { source })
    }

    /// Removes the portal of that name, or what there is of it.
    ///
    /// # Errors
    /// The kernel refuses to remove a link or a mount.
    pub async fn remove(name: &str) -> Result<(), PortalError> {
        // Deleting one end deletes the other at once; the namespace itself goes asynchronously.
        let host = Netlink::connect()?;
        if let Some(link) = host.link(HOST_END).await? {
            host.delete_link(link.index).await?;
        }
        Netns::remove(name)?;
        Ok(())
    }
}

/// A way into the portal from a namespace other than the host's.
#[derive(Debug)]
pub struct PortalUplink {
    inside: Netlink,
    inner: IfIndex,
    /// Index of its outer end, [`HOST_END`].
    pub outer: IfIndex,
    /// Namespace id of the portal as that namespace sees it.
    pub nsid: u32,
    /// MAC address of the portal's end, which is the same for all: the programs keep one.
    pub mac: MacAddress,
}

impl PortalUplink {
    /// Leads answers to the clients of an attachment by this way.
    ///
    /// # Errors
    /// The way is gone.
    pub async fn add_routes(&self, attachment: AttachmentId) -> Result<(), PortalError> {
        for prefix in ClientAddress::prefixes(attachment) {
            self.inside.set_route((prefix.into(), 64), GATEWAY, self.inner).await?;
        }
        Ok(())
    }

    /// Takes that back; fine if it is gone.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn remove_routes(&self, attachment: AttachmentId) -> Result<(), PortalError> {
        for prefix in ClientAddress::prefixes(attachment) {
            self.inside.delete_route((prefix.into(), 64), GATEWAY, self.inner).await?;
        }
        Ok(())
    }
}

/// The portal's end of a veth pair, up and with a gateway that needs no resolving.
async fn ready_for_clients(inside: &Netlink, end: IfIndex, mtu: u32) -> Result<(), PortalError> {
    inside.disable_link_local(end).await?;
    inside.set_up(end, mtu).await?;
    Ok(inside.set_neighbour(end, GATEWAY, MacAddress(METADATA_MAC)).await?)
}

/// Waits until the host end of the portal is no more: deleted by somebody, or moved away. Without it guests' packets lead
/// nowhere.
pub async fn wait_until_lost(
    index: IfIndex,
    mut events: impl Stream<Item = LinkEvent> + Unpin,
    netlink: Netlink,
) {
    while let Some(event) = events.next().await {
        let is_lost = match event {
            LinkEvent::Present(_) => false,
            LinkEvent::Gone(gone) => gone == index,
            LinkEvent::Overrun => match netlink.links().await {
                Ok(links) => !links.iter().any(|link| link.index == index),
                Err(_) => false,
            },
        };
        if is_lost {
            return;
        }
    }
}

/// Both ends, made anew unless both are there and are each other's.
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
        info!(interface = pair.name, "portal adopted");
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
    info!(interface = pair.name, "portal made");
    Ok((host_end, portal_end))
}

/// Writes what is not as wanted. A container's `/proc/sys` is read-only, where new namespaces mostly have these values already;
/// only IPv6 itself is worth failing for.
fn settle_sysctls() -> Result<(), PortalError> {
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
                warn!(sysctl = name, %found, %want, %error, "a setting of the portal stays as it is");
            }
        }
    }
    Ok(())
}

fn identity_prefix() -> (Ipv6Addr, u8) {
    (Ipv6Addr::new(u16::from_be_bytes(IDENTITY_PREFIX), 0, 0, 0, 0, 0, 0, 0), 16)
}
