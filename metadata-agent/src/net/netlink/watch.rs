//! Notifications from the kernel about links, addresses and TC hooks.

use futures_util::{Stream, StreamExt, stream};
use netlink_packet_route::link::LinkMessage;
use netlink_packet_route::tc::{TcAttribute, TcMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::sys::AsyncSocket as _;
use rtnetlink::{MulticastGroup, new_multicast_connection_with_socket};
use tokio::runtime;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use super::cooperative_socket::Connection;
use super::{Link, NetlinkError};
use crate::ids::IfIndex;
use crate::net::netns::Netns;
use crate::net::socket;

/// Bytes of notifications that the kernel queues. An attachment takes ten milliseconds, in which
/// none are read. After an overflow all links must be listed again.
const BACKLOG: usize = 8 << 20;

/// A change of the links of a namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LinkEvent {
    Present(Link),
    Gone(IfIndex),
    /// Events were lost, so all links must be listed again.
    Overrun,
}

/// A change of the ingress hooks of a namespace's links.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HookEvent {
    /// A link has a new qdisc, possibly one with an ingress hook.
    QdiscNew(IfIndex),
    /// A qdisc with an ingress hook was removed from a link, with every filter on it.
    QdiscGone(IfIndex),
    /// A filter was added, changed or removed.
    Filter(IfIndex),
    /// Events were lost, so all links must be listed again.
    Overrun,
}

/// Watches the links in the namespace of the calling thread. Existing links are not reported.
///
/// # Errors
/// The kernel provides no socket.
pub(crate) fn watch_links() -> Result<impl Stream<Item = LinkEvent> + Unpin, NetlinkError> {
    follow(MulticastGroup::Link, link_event)
}

/// Watches links, IPv4 addresses and filters of another namespace. Each item stands for some
/// change.
///
/// # Errors
/// The kernel provides no socket, or the namespace cannot be entered.
pub(crate) fn watch_changes_in(
    netns: &Netns,
) -> Result<impl Stream<Item = ()> + Unpin + Send + use<>, NetlinkError> {
    watch_groups_in(netns, &[MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Tc])
}

/// Watches links and all IPv6 state of another namespace. Each item stands for some change.
///
/// # Errors
/// The kernel provides no socket, or the namespace cannot be entered.
pub(crate) fn watch_ipv6_in(
    netns: &Netns,
) -> Result<impl Stream<Item = ()> + Unpin + Send + use<>, NetlinkError> {
    let groups = [
        MulticastGroup::Link,
        MulticastGroup::Neigh,
        MulticastGroup::Ipv6Ifaddr,
        MulticastGroup::Ipv6Route,
        MulticastGroup::Ipv6Rule,
    ];
    watch_groups_in(netns, &groups)
}

fn watch_groups_in(
    netns: &Netns,
    groups: &[MulticastGroup],
) -> Result<impl Stream<Item = ()> + Unpin + Send + use<>, NetlinkError> {
    let runtime = runtime::Handle::current();
    netns.run(|| {
        let _on_runtime = runtime.enter();
        let (connection, _, messages): (Connection, _, _) =
            new_multicast_connection_with_socket(groups).map_err(|source| NetlinkError::Socket { source })?;
        // An open socket would keep the namespace alive, and the connection alone does not notice
        // that the receiver is gone.
        let connection = AbortOnDropHandle::new(tokio::spawn(connection));
        Ok(messages.map(move |_| {
            let _lasts = &connection;
        }))
    })?
}

/// Converts messages to events as soon as they arrive. A message takes some kilobytes and an event
/// a few dozen bytes. While an agent attaches a thousand interfaces at its start, neither is
/// consumed.
fn follow<E: Send + 'static>(
    group: MulticastGroup,
    event: impl Fn(NetlinkMessage<RouteNetlinkMessage>) -> Option<E> + Send + 'static,
) -> Result<impl Stream<Item = E> + Unpin, NetlinkError> {
    let (mut connection, _, mut messages): (Connection, _, _) =
        new_multicast_connection_with_socket(&[group]).map_err(|source| NetlinkError::Socket { source })?;
    socket::set_receive_buffer(connection.socket_mut().socket_ref(), BACKLOG)
        .map_err(|source| NetlinkError::Socket { source })?;
    tokio::spawn(connection);
    let (sender, mut events) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some((message, _)) = messages.next().await {
            if event(message).is_some_and(|event| sender.send(event).is_err()) {
                return;
            }
        }
    });
    Ok(stream::poll_fn(move |cx| events.poll_recv(cx)))
}

/// Bridges send messages about their ports in the same group (family `AF_BRIDGE`), also when a port
/// leaves the bridge (net/bridge/br_netlink.c, `br_ifinfo_notify`). These messages do not describe
/// the link.
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

/// Watches the ingress hooks of links in the namespace of the calling thread.
///
/// # Errors
/// The kernel provides no socket.
pub(crate) fn watch_hooks() -> Result<impl Stream<Item = HookEvent> + Unpin, NetlinkError> {
    follow(MulticastGroup::Tc, |message| hook_event(&message))
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
