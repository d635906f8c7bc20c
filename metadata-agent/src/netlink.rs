//! Links, addresses, routes and qdiscs over rtnetlink: the only module that names the `rtnetlink` crates.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::{StreamExt, TryStreamExt};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags,
    LinkInfo, LinkMessage,
};
use netlink_packet_route::tc::{TcAttribute, TcFilterBpfOption, TcHandle, TcMessage, TcOption};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::errno::Errno;
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::{
    Handle, LinkMessageBuilder, LinkUnspec, LinkVeth, MulticastGroup, RouteMessageBuilder, new_connection,
    new_multicast_connection,
};
use tokio::runtime;
use tokio_util::task::AbortOnDropHandle;

use crate::ids::{IfIndex, MacAddress};
use crate::netns::{Netns, NetnsError};

/// What can go wrong with a netlink request.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// No socket.
    #[error("cannot open a netlink socket: {source}")]
    Socket {
        /// Why not.
        source: std::io::Error,
    },
    /// No way into the namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The kernel refused.
    #[error("cannot {operation} {object}: {source}")]
    Refused {
        /// What was asked.
        operation: &'static str,
        /// Of what.
        object: String,
        /// The kernel's answer.
        source: rtnetlink::Error,
    },
}

/// An interface as the kernel describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its index.
    pub index: IfIndex,
    /// Its name.
    pub name: String,
    /// Its MAC address, if it has one of six octets.
    pub mac: Option<MacAddress>,
    /// Its kind as `ip -d link` shows it: `tun`, `veth`, `bridge`; empty for a device without one.
    pub kind: String,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Whether it is administratively up.
    pub up: bool,
    /// Index of the other end of a veth, in the namespace where that is.
    pub peer_index: Option<IfIndex>,
    /// The namespace id of the other end, for a veth whose peer is elsewhere.
    pub peer_nsid: Option<i32>,
}

impl From<LinkMessage> for Link {
    fn from(message: LinkMessage) -> Self {
        let mut link = Self {
            index: IfIndex(message.header.index),
            name: String::new(),
            mac: None,
            kind: String::new(),
            mtu: 0,
            up: message.header.flags.contains(LinkFlags::Up),
            peer_index: None,
            peer_nsid: None,
        };
        for attribute in message.attributes {
            #[expect(clippy::wildcard_enum_match_arm, reason = "sixty attributes are of no interest here")]
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                LinkAttribute::Address(octets) => link.mac = octets.try_into().ok().map(MacAddress),
                LinkAttribute::Link(index) => link.peer_index = Some(IfIndex(index)),
                LinkAttribute::LinkNetNsId(id) => link.peer_nsid = Some(id),
                LinkAttribute::LinkInfo(info) => {
                    for part in info {
                        if let LinkInfo::Kind(kind) = part {
                            link.kind = kind.to_string();
                        }
                    }
                }
                _ => {}
            }
        }
        link
    }
}

/// What happens to the links of a namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkEvent {
    /// A link appeared or changed.
    Present(Link),
    /// A link is gone.
    Gone(IfIndex),
    /// Events were lost: look at all links anew.
    Overrun,
}

/// What happens to the ingress hooks of a namespace's links.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HookEvent {
    /// A link has a new qdisc, maybe one with an ingress hook.
    QdiscNew(IfIndex),
    /// A qdisc is gone from a link, and every filter on it.
    QdiscGone(IfIndex),
    /// A filter came, changed or went.
    Filter(IfIndex),
    /// Events were lost: look at all links anew.
    Overrun,
}

/// Where a veth pair's ends are and what they are called.
#[derive(Debug)]
pub struct VethPair<'a> {
    /// Name of the end in the namespace of the socket.
    pub name: &'a str,
    /// Name of the other end.
    pub peer: &'a str,
    /// Namespace of the other end.
    pub peer_netns: &'a Netns,
    /// MTU of both, in bytes.
    pub mtu: u32,
    /// MAC address of the other end, where it matters.
    pub peer_mac: Option<MacAddress>,
}

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
        let (connection, handle, _) = new_connection().map_err(|source| NetlinkError::Socket { source })?;
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

    /// All links, in the order of their indexes.
    ///
    /// # Errors
    /// The kernel refuses the dump.
    pub async fn links(&self) -> Result<Vec<Link>, NetlinkError> {
        let dump = self.handle.link().get().execute().map_ok(Link::from).try_collect().await;
        dump.map_err(|source| refused("list", "links", source))
    }

    /// The IPv4 addresses of all links, with the lengths of their prefixes, in no order.
    ///
    /// # Errors
    /// The kernel refuses the dump.
    pub async fn ipv4_addresses(&self) -> Result<Vec<(IfIndex, Ipv4Addr, u8)>, NetlinkError> {
        let dump = self.handle.address().get().execute().try_collect::<Vec<_>>().await;
        let dump = dump.map_err(|source| refused("list", "addresses", source))?;
        let address = |message: &AddressMessage| {
            // The interface's own; `Address` is the other end of a point-to-point link.
            message.attributes.iter().find_map(|part| {
                if let AddressAttribute::Local(IpAddr::V4(address)) = part { Some(*address) } else { None }
            })
        };
        let of = |message: AddressMessage| {
            Some((IfIndex(message.header.index), address(&message)?, message.header.prefix_len))
        };
        Ok(dump.into_iter().filter_map(of).collect())
    }

    /// One link by name.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn link(&self, name: &str) -> Result<Option<Link>, NetlinkError> {
        // Not by a dump: the portal has as many links as there are namespaces.
        let asked = self.handle.link().get().match_name(name.to_owned()).execute().try_next().await;
        match asked {
            Err(error) if is_absence(&error) => Ok(None),
            asked => asked
                .map(|link| link.map(Link::from))
                .map_err(|source| refused("look for link", name, source)),
        }
    }

    /// Makes a veth pair, both ends down.
    ///
    /// # Errors
    /// A name is taken, or the kernel refuses otherwise.
    pub async fn add_veth(&self, pair: &VethPair<'_>) -> Result<(), NetlinkError> {
        let peer = LinkMessageBuilder::<LinkUnspec>::new()
            .name(pair.peer)
            .mtu(pair.mtu)
            .setns_by_fd(pair.peer_netns.as_raw_fd());
        let peer = match pair.peer_mac {
            Some(mac) => peer.address(mac.0.to_vec()).build(),
            None => peer.build(),
        };
        let message = LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth)
            .name(pair.name)
            .mtu(pair.mtu)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
            .build();
        let added = self.handle.link().add(message).execute().await;
        added.map_err(|source| refused("add veth pair", pair.name, source))
    }

    /// Keeps the kernel from giving a link an IPv6 link-local address. To be done before the link is up.
    ///
    /// # Errors
    /// The link is gone, or IPv6 is off there.
    pub async fn forgo_link_local(&self, index: IfIndex) -> Result<(), NetlinkError> {
        let mode = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
        let message = LinkUnspec::new_with_index(index.0)
            .append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![mode]))
            .build();
        let set = self.handle.link().set(message).execute().await;
        set.map_err(|source| refused("forgo the link-local address of link", index, source))
    }

    /// Sets a link up and gives it an MTU in bytes.
    ///
    /// # Errors
    /// The link is gone, or the MTU is out of its range.
    pub async fn set_up(&self, index: IfIndex, mtu: u32) -> Result<(), NetlinkError> {
        let message = LinkUnspec::new_with_index(index.0).up().mtu(mtu).build();
        self.handle
            .link()
            .set(message)
            .execute()
            .await
            .map_err(|source| refused("set up link", index, source))
    }

    /// Deletes a link; fine if it is gone.
    ///
    /// # Errors
    /// The link cannot be deleted.
    pub async fn delete_link(&self, index: IfIndex) -> Result<(), NetlinkError> {
        let deleted = self.handle.link().del(index.0).execute().await;
        absent_is_fine(deleted).map_err(|source| refused("delete link", index, source))
    }

    /// Gives a link an address, without duplicate address detection; fine if it has it.
    ///
    /// # Errors
    /// The link is gone, or IPv6 is off there.
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

    /// Pins the MAC address of a neighbour.
    ///
    /// # Errors
    /// The link is gone or down.
    pub async fn set_neighbour(
        &self,
        index: IfIndex,
        of: Ipv6Addr,
        mac: MacAddress,
    ) -> Result<(), NetlinkError> {
        let request =
            self.handle.neighbours().add(index.0, IpAddr::V6(of)).link_layer_address(&mac.0).replace();
        request.execute().await.map_err(|source| refused("set neighbour", of, source))
    }

    /// Routes a prefix by a gateway on a link.
    ///
    /// # Errors
    /// The link is gone or down.
    pub async fn set_route(
        &self,
        prefix: (Ipv6Addr, u8),
        gateway: Ipv6Addr,
        index: IfIndex,
    ) -> Result<(), NetlinkError> {
        let message = RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(prefix.0, prefix.1)
            .gateway(gateway)
            .output_interface(index.0)
            .build();
        let set = self.handle.route().add(message).replace().execute().await;
        set.map_err(|source| refused("set route", format_args!("{}/{}", prefix.0, prefix.1), source))
    }

    /// Removes a route made by [`Self::set_route`]; fine if it, or the link, is gone.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn delete_route(
        &self,
        prefix: (Ipv6Addr, u8),
        gateway: Ipv6Addr,
        index: IfIndex,
    ) -> Result<(), NetlinkError> {
        let message = RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(prefix.0, prefix.1)
            .gateway(gateway)
            .output_interface(index.0)
            .build();
        let deleted = self.handle.route().del(message).execute().await;
        absent_is_fine(deleted)
            .map_err(|source| refused("delete route", format_args!("{}/{}", prefix.0, prefix.1), source))
    }

    /// Gives a link an `ingress` qdisc. `false` if it has a qdisc with an ingress hook already, of whatever kind.
    ///
    /// `ingress`, and not the newer `clsact`: Open vSwitch, libvirt and Neutron all delete the `ingress` qdisc, if any, before
    /// they make theirs, and fail where they find one that is not called so.
    ///
    /// # Errors
    /// The link is gone, or the kernel refuses otherwise.
    pub async fn add_ingress_qdisc(&self, index: IfIndex) -> Result<bool, NetlinkError> {
        match self.handle.qdisc().add(index.0.cast_signed()).ingress().execute().await {
            Ok(()) => Ok(true),
            Err(error) if errno(&error) == Some(Errno::EEXIST) => Ok(false),
            Err(source) => Err(refused("add an ingress qdisc to link", index, source)),
        }
    }

    /// The ids of the BPF programs in the ingress filters of a link.
    ///
    /// # Errors
    /// The kernel refuses the dump.
    pub async fn filter_programs(&self, index: IfIndex) -> Result<Vec<u32>, NetlinkError> {
        let dump = self.handle.traffic_filter(index.0.cast_signed()).get().ingress().execute();
        let filters: Result<Vec<TcMessage>, _> = dump.try_collect().await;
        let filters = filters.map_err(|source| refused("list filters of", index, source))?;
        Ok(filters.iter().filter_map(program_of).collect())
    }

    /// Whether a link has filters on ingress or egress.
    ///
    /// # Errors
    /// The kernel refuses the dump.
    pub async fn has_filters(&self, index: IfIndex) -> Result<bool, NetlinkError> {
        let at = || self.handle.traffic_filter(index.0.cast_signed()).get();
        for request in [at().ingress(), at().egress()] {
            let filters: Result<Vec<TcMessage>, _> = request.execute().try_collect().await;
            if !filters.map_err(|source| refused("list filters of", index, source))?.is_empty() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Removes the qdisc with the ingress hook of a link, `ingress` or `clsact`, and every filter on it; fine if it, or the
    /// link, is gone.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn delete_ingress_qdisc(&self, index: IfIndex) -> Result<(), NetlinkError> {
        let mut request = self.handle.qdisc().del(index.0.cast_signed());
        request.message_mut().header.parent = TcHandle::CLSACT;
        request.message_mut().header.handle = TcHandle { major: 0xffff, minor: 0 };
        absent_is_fine(request.execute().await)
            .map_err(|source| refused("delete the ingress qdisc of link", index, source))
    }
}

/// Follows the links of the namespace of the calling thread. What is already there is not told.
///
/// # Errors
/// No socket is to be had.
pub fn watch_links() -> Result<impl futures_util::Stream<Item = LinkEvent> + Unpin, NetlinkError> {
    let (connection, _, messages) = new_multicast_connection(&[MulticastGroup::Link])
        .map_err(|source| NetlinkError::Socket { source })?;
    tokio::spawn(connection);
    Ok(messages.filter_map(|(message, _)| std::future::ready(link_event(message))))
}

/// Tells that something about links or IPv4 addresses of another namespace has changed.
///
/// # Errors
/// No socket is to be had, or the namespace cannot be entered.
pub fn watch_changes_in(
    netns: &Netns,
) -> Result<impl futures_util::Stream<Item = ()> + Unpin + Send + use<>, NetlinkError> {
    let runtime = runtime::Handle::current();
    netns.run(|| {
        let _on_runtime = runtime.enter();
        let groups = [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr];
        let (connection, _, messages) =
            new_multicast_connection(&groups).map_err(|source| NetlinkError::Socket { source })?;
        // An open socket would keep the namespace alive, and the connection alone does not notice that nobody listens.
        let connection = AbortOnDropHandle::new(tokio::spawn(connection));
        Ok(messages.map(move |_| {
            let _lasts = &connection;
        }))
    })?
}

/// A bridge tells of its ports in the same group (family `AF_BRIDGE`), also when a port merely leaves it
/// (net/bridge/br_netlink.c, `br_ifinfo_notify`). Those messages describe the port, not the link.
fn link_event(message: NetlinkMessage<RouteNetlinkMessage>) -> Option<LinkEvent> {
    let is_the_links = |link: &LinkMessage| link.header.interface_family == AddressFamily::Unspec;
    #[expect(clippy::wildcard_enum_match_arm, reason = "the group carries link messages and overruns")]
    match message.payload {
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => {
            is_the_links(&link).then(|| LinkEvent::Present(link.into()))
        }
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(link)) => {
            is_the_links(&link).then_some(LinkEvent::Gone(IfIndex(link.header.index)))
        }
        NetlinkPayload::Overrun(_) => Some(LinkEvent::Overrun),
        _ => None,
    }
}

/// Follows the ingress hooks of the links of the namespace of the calling thread.
///
/// # Errors
/// No socket is to be had.
pub fn watch_hooks() -> Result<impl futures_util::Stream<Item = HookEvent> + Unpin, NetlinkError> {
    let (connection, _, messages) =
        new_multicast_connection(&[MulticastGroup::Tc]).map_err(|source| NetlinkError::Socket { source })?;
    tokio::spawn(connection);
    Ok(messages.filter_map(|(message, _)| std::future::ready(hook_event(&message))))
}

fn hook_event(message: &NetlinkMessage<RouteNetlinkMessage>) -> Option<HookEvent> {
    let link = |about: &TcMessage| IfIndex(about.header.index.cast_unsigned());
    #[expect(clippy::wildcard_enum_match_arm, reason = "classes and chains carry no program")]
    match &message.payload {
        NetlinkPayload::InnerMessage(message) => match message {
            RouteNetlinkMessage::NewQueueDiscipline(qdisc) => Some(HookEvent::QdiscNew(link(qdisc))),
            RouteNetlinkMessage::DelQueueDiscipline(qdisc) => {
                has_ingress_hook(qdisc).then(|| HookEvent::QdiscGone(link(qdisc)))
            }
            RouteNetlinkMessage::NewTrafficFilter(filter) | RouteNetlinkMessage::DelTrafficFilter(filter) => {
                Some(HookEvent::Filter(link(filter)))
            }
            _ => None,
        },
        NetlinkPayload::Overrun(_) => Some(HookEvent::Overrun),
        _ => None,
    }
}

fn has_ingress_hook(qdisc: &TcMessage) -> bool {
    let hooks =
        |part: &TcAttribute| matches!(part, TcAttribute::Kind(kind) if kind == "clsact" || kind == "ingress");
    qdisc.attributes.iter().any(hooks)
}

/// The id of the BPF program that a filter runs.
fn program_of(filter: &TcMessage) -> Option<u32> {
    filter.attributes.iter().find_map(|part| {
        let TcAttribute::Options(options) = part else { return None };
        options.iter().find_map(|option| {
            if let TcOption::Bpf(TcFilterBpfOption::ProgId(id)) = option { Some(*id) } else { None }
        })
    })
}

/// What was to be deleted is gone, or the link that it was on.
fn absent_is_fine(deleted: Result<(), rtnetlink::Error>) -> Result<(), rtnetlink::Error> {
    match deleted {
        Err(error) if is_absence(&error) => Ok(()),
        deleted => deleted,
    }
}

/// A link, a qdisc or a route is not there.
fn is_absence(error: &rtnetlink::Error) -> bool {
    matches!(errno(error), Some(Errno::ENODEV | Errno::ENOENT | Errno::ESRCH))
}

/// The kernel's own word in a refusal.
fn errno(error: &rtnetlink::Error) -> Option<Errno> {
    let rtnetlink::Error::NetlinkError(refusal) = error else { return None };
    Some(Errno::from_raw(refusal.raw_code().saturating_neg()))
}

fn refused(operation: &'static str, object: impl fmt::Display, source: rtnetlink::Error) -> NetlinkError {
    NetlinkError::Refused { operation, object: format!("{object}"), source }
}
