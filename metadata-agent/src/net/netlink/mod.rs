//! Links, addresses, routes and qdiscs over rtnetlink: the only module that names the `rtnetlink`
//! crates.

mod cooperative_socket;
mod error;
mod ipv6;
mod link;
mod watch;

pub use error::NetlinkError;
pub(crate) use ipv6::{Neighbour, Route, Rule};
pub use link::Link;
pub(crate) use link::VethPair;
pub(crate) use watch::{HookEvent, LinkEvent, watch_changes_in, watch_hooks, watch_ipv6_in, watch_links};

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::TryStreamExt;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVeth, LinkAttribute, LinkExtentMask,
};
use netlink_packet_route::route::RouteMessage;
use netlink_packet_route::tc::{TcAttribute, TcFilterBpfOption, TcHandle, TcMessage, TcOption};
use nix::errno::Errno;
use rtnetlink::{
    Handle, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder, new_connection_with_socket,
};
use tokio::runtime;

use self::cooperative_socket::Connection;
use self::error::{errno, ignore_absent, is_absence, refused};
use crate::ids::{IfIndex, MacAddress};
use crate::net::netns::Netns;

/// The origin of a link's ingress qdisc.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IngressQdisc {
    /// It was created just now, and is ours.
    Created,
    /// The link had it before.
    Found,
}

/// A netlink socket in one namespace.
#[derive(Clone, Debug)]
pub struct Netlink {
    handle: Handle,
}

impl Netlink {
    /// Opens a socket in the namespace of the calling thread. The current runtime drives it.
    ///
    /// # Errors
    /// The kernel provides no socket.
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
    pub(crate) fn connect_in(netns: &Netns) -> Result<Self, NetlinkError> {
        let runtime = runtime::Handle::current();
        netns.run(|| {
            let _on_runtime = runtime.enter();
            Self::connect()
        })?
    }
}

/// Links.
impl Netlink {
    /// Returns all links in the order of their indexes.
    ///
    /// # Errors
    /// The kernel refuses the dump.
    pub(crate) async fn links(&self) -> Result<Vec<Link>, NetlinkError> {
        // Statistics would be half of the response.
        let all =
            self.handle.link().get().set_filter_mask(AddressFamily::Unspec, vec![LinkExtentMask::SkipStats]);
        let dump = all.execute().map_ok(Link::from).try_collect().await;
        dump.map_err(|source| refused("list", "links", source))
    }

    /// Returns one link by name.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn link(&self, name: &str) -> Result<Option<Link>, NetlinkError> {
        // Not a dump: the portal has as many links as there are namespaces.
        let asked = self.handle.link().get().match_name(name.to_owned()).execute().try_next().await;
        match asked {
            Err(error) if is_absence(&error) => Ok(None),
            asked => {
                asked.map(|link| link.map(Link::from)).map_err(|source| refused("find link", name, source))
            }
        }
    }

    /// Returns the id by which the socket's namespace refers to a named namespace. `None` if it has
    /// no id there, as long as no link leads to it, or if it is gone.
    pub(crate) async fn namespace_id(&self, name: &str) -> Option<i32> {
        // A refusal means that there is no such namespace any more.
        self.handle.link().get_netns_id(name).execute().await.ok().flatten()
    }

    /// Creates a veth pair; both ends are down.
    ///
    /// # Errors
    /// A name is in use, or the kernel refuses.
    pub(crate) async fn add_veth(&self, pair: &VethPair<'_>) -> Result<(), NetlinkError> {
        let peer = LinkMessageBuilder::<LinkUnspec>::new()
            .name(pair.peer)
            .mtu(pair.mtu)
            .setns_by_fd(pair.peer_netns.as_raw_fd());
        let peer = match pair.peer_mac {
            Some(mac) => peer.address(mac.0.to_vec()).build(),
            None => peer.build(),
        };
        let own = LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth)
            .name(pair.name)
            .mtu(pair.mtu)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)));
        let own = match pair.mac {
            Some(mac) => own.address(mac.0.to_vec()).build(),
            None => own.build(),
        };
        let added = self.handle.link().add(own).execute().await;
        added.map_err(|source| refused("add veth pair", pair.name, source))
    }

    /// Prevents the kernel from assigning an IPv6 link-local address to a link. Must be called
    /// before the link is up.
    ///
    /// # Errors
    /// The link is gone, or IPv6 is disabled on it.
    pub(crate) async fn disable_link_local(&self, index: IfIndex) -> Result<(), NetlinkError> {
        let mode = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
        let message = LinkUnspec::new_with_index(index.0)
            .append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![mode]))
            .build();
        let set = self.handle.link().set(message).execute().await;
        set.map_err(|source| refused("disable the link-local address of link", index, source))
    }

    /// Sets the MTU of a link in bytes. Below 1,280 bytes a link loses all of its IPv6 state, and
    /// gets back only the defaults.
    ///
    /// # Errors
    /// The link is gone, or the MTU is out of range.
    pub(crate) async fn set_mtu(&self, index: IfIndex, mtu: u32) -> Result<(), NetlinkError> {
        let message = LinkUnspec::new_with_index(index.0).mtu(mtu).build();
        let set = self.handle.link().set(message).execute().await;
        set.map_err(|source| refused("set the MTU of link", index, source))
    }

    /// Brings a link up and sets its MTU in bytes.
    ///
    /// # Errors
    /// The link is gone, or the MTU is out of range.
    pub(crate) async fn set_up(&self, index: IfIndex, mtu: u32) -> Result<(), NetlinkError> {
        let message = LinkUnspec::new_with_index(index.0).up().mtu(mtu).build();
        self.handle
            .link()
            .set(message)
            .execute()
            .await
            .map_err(|source| refused("set up link", index, source))
    }

    /// Deletes a link, if it exists.
    ///
    /// # Errors
    /// The link cannot be deleted.
    pub(crate) async fn delete_link(&self, index: IfIndex) -> Result<(), NetlinkError> {
        let deleted = self.handle.link().del(index.0).execute().await;
        ignore_absent(deleted).map_err(|source| refused("delete link", index, source))
    }
}

/// Addresses, neighbours and routes.
impl Netlink {
    /// Returns the IPv4 addresses of all links with their prefix lengths, in no particular order.
    ///
    /// # Errors
    /// The kernel refuses the dump.
    pub(crate) async fn ipv4_addresses(&self) -> Result<Vec<(IfIndex, Ipv4Addr, u8)>, NetlinkError> {
        let dump = self.handle.address().get().execute().try_collect::<Vec<_>>().await;
        let dump = dump.map_err(|source| refused("list", "addresses", source))?;
        let address = |message: &AddressMessage| {
            // `Local` is the interface's own address; `Address` is the other end of a
            // point-to-point link.
            message.attributes.iter().find_map(|part| {
                if let AddressAttribute::Local(IpAddr::V4(address)) = part { Some(*address) } else { None }
            })
        };
        let of = |message: AddressMessage| {
            Some((IfIndex(message.header.index), address(&message)?, message.header.prefix_len))
        };
        Ok(dump.into_iter().filter_map(of).collect())
    }

    /// Adds an address to a link, without duplicate address detection. Succeeds if the link already
    /// has it.
    ///
    /// # Errors
    /// The link is gone, or IPv6 is disabled on it.
    pub async fn set_address(
        &self,
        index: IfIndex,
        address: Ipv6Addr,
        prefix: u8,
    ) -> Result<(), NetlinkError> {
        let mut request = self.handle.address().add(index.0, IpAddr::V6(address), prefix).replace();
        let message = request.message_mut();
        message.header.flags = AddressHeaderFlags::Nodad;
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad | AddressFlags::Noprefixroute));
        request.execute().await.map_err(|source| refused("set address", address, source))
    }

    /// Adds an IPv4 address to a link, with the route to its subnet. Succeeds if the link already
    /// has it.
    ///
    /// # Errors
    /// The link is gone.
    pub(crate) async fn set_ipv4_address(
        &self,
        index: IfIndex,
        address: Ipv4Addr,
        prefix: u8,
    ) -> Result<(), NetlinkError> {
        let request = self.handle.address().add(index.0, IpAddr::V4(address), prefix).replace();
        request.execute().await.map_err(|source| refused("set address", address, source))
    }

    /// Sets a permanent MAC address for a neighbour.
    ///
    /// # Errors
    /// The link is gone or down.
    pub(crate) async fn set_neighbour(
        &self,
        index: IfIndex,
        of: Ipv6Addr,
        mac: MacAddress,
    ) -> Result<(), NetlinkError> {
        let request =
            self.handle.neighbours().add(index.0, IpAddr::V6(of)).link_layer_address(&mac.0).replace();
        request.execute().await.map_err(|source| refused("set neighbour", of, source))
    }

    /// Routes a prefix through a gateway on a link.
    ///
    /// # Errors
    /// The link is gone or down.
    pub(crate) async fn set_route(
        &self,
        prefix: (Ipv6Addr, u8),
        gateway: Ipv6Addr,
        index: IfIndex,
    ) -> Result<(), NetlinkError> {
        let set = self.handle.route().add(route(prefix, gateway, index)).replace().execute().await;
        set.map_err(|source| refused("set route", format_args!("{}/{}", prefix.0, prefix.1), source))
    }

    /// Removes a route made by [`Self::set_route`]. Succeeds if the route or the link is gone.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) async fn delete_route(
        &self,
        prefix: (Ipv6Addr, u8),
        gateway: Ipv6Addr,
        index: IfIndex,
    ) -> Result<(), NetlinkError> {
        let deleted = self.handle.route().del(route(prefix, gateway, index)).execute().await;
        ignore_absent(deleted)
            .map_err(|source| refused("delete route", format_args!("{}/{}", prefix.0, prefix.1), source))
    }
}

/// Qdiscs with an ingress hook, and filters on them.
impl Netlink {
    /// Adds an `ingress` qdisc to a link, unless the link has a qdisc with an ingress hook of
    /// either kind.
    ///
    /// The kind is `ingress` and not the newer `clsact`: Open vSwitch, libvirt and Neutron delete
    /// the `ingress` qdisc, if there is one, before they add theirs, and they fail if they find one
    /// of another kind.
    ///
    /// # Errors
    /// The link is gone, or the kernel refuses.
    pub(crate) async fn add_ingress_qdisc(&self, index: IfIndex) -> Result<IngressQdisc, NetlinkError> {
        match self.handle.qdisc().add(index.0.cast_signed()).ingress().execute().await {
            Ok(()) => Ok(IngressQdisc::Created),
            Err(error) if errno(&error) == Some(Errno::EEXIST) => Ok(IngressQdisc::Found),
            Err(source) => Err(refused("add an ingress qdisc to link", index, source)),
        }
    }

    /// Returns the ids of the BPF programs in the ingress filters of a link.
    ///
    /// # Errors
    /// The kernel refuses the dump.
    pub(crate) async fn filter_programs(&self, index: IfIndex) -> Result<Vec<u32>, NetlinkError> {
        let dump = self.handle.traffic_filter(index.0.cast_signed()).get().ingress().execute();
        let filters: Result<Vec<TcMessage>, _> = dump.try_collect().await;
        let filters = filters.map_err(|source| refused("list filters of", index, source))?;
        Ok(filters.iter().filter_map(program_of).collect())
    }

    /// Returns true if a link has filters on ingress or egress.
    ///
    /// # Errors
    /// The kernel refuses the dump.
    pub(crate) async fn has_filters(&self, index: IfIndex) -> Result<bool, NetlinkError> {
        let at = || self.handle.traffic_filter(index.0.cast_signed()).get();
        for request in [at().ingress(), at().egress()] {
            let filters: Result<Vec<TcMessage>, _> = request.execute().try_collect().await;
            if !filters.map_err(|source| refused("list filters of", index, source))?.is_empty() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Removes the qdisc with the ingress hook of a link, `ingress` or `clsact`, with every filter
    /// on it. Succeeds if the qdisc or the link is gone.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) async fn delete_ingress_qdisc(&self, index: IfIndex) -> Result<(), NetlinkError> {
        let mut request = self.handle.qdisc().del(index.0.cast_signed());
        request.message_mut().header.parent = TcHandle::CLSACT;
        request.message_mut().header.handle = TcHandle { major: 0xffff, minor: 0 };
        ignore_absent(request.execute().await)
            .map_err(|source| refused("delete the ingress qdisc of link", index, source))
    }
}

fn route((destination, length): (Ipv6Addr, u8), gateway: Ipv6Addr, index: IfIndex) -> RouteMessage {
    RouteMessageBuilder::<Ipv6Addr>::new()
        .destination_prefix(destination, length)
        .gateway(gateway)
        .output_interface(index.0)
        .build()
}

/// Returns the id of the BPF program that a filter runs.
fn program_of(filter: &TcMessage) -> Option<u32> {
    filter.attributes.iter().find_map(|part| {
        let TcAttribute::Options(options) = part else { return None };
        options.iter().find_map(|option| {
            if let TcOption::Bpf(TcFilterBpfOption::ProgId(id)) = option { Some(*id) } else { None }
        })
    })
}
