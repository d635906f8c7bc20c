//! What the kernel tells of unasked: links, addresses and hooks that change.

use futures_util::{Stream, StreamExt, stream};
use netlink_packet_route::link::LinkMessage;
use netlink_packet_route::tc::TcMessage;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::sys::AsyncSocket as _;
use rtnetlink::{MulticastGroup, new_multicast_connection_with_socket};
use tokio::runtime;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use super::qdisc::has_ingress_hook;
use super::turns::Connection;
use super::{Link, NetlinkError};
use crate::ids::IfIndex;
use crate::net::netns::Netns;
use crate::net::socket;

/// Bytes of messages that the kernel keeps until they are read. An attachment takes ten milliseconds, in which nothing is,
/// and what is lost costs a look at all links.
const BACKLOG: usize = 8 << 20;

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

/// Follows the links of the namespace of the calling thread. What is already there is not told.
///
/// # Errors
/// No socket is to be had.
pub fn watch_links() -> Result<impl Stream<Item = LinkEvent> + Unpin, NetlinkError> {
    follow(MulticastGroup::Link, link_event)
}

/// Tells that something about links, IPv4 addresses or filters of another namespace has changed.
///
/// # Errors
/// No socket is to be had, or the namespace cannot be entered.
pub fn watch_changes_in(
    netns: &Netns,
) -> Result<impl Stream<Item = ()> + Unpin + Send + use<>, NetlinkError> {
    let runtime = runtime::Handle::current();
    netns.run(|| {
        let _on_runtime = runtime.enter();
        let groups = [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Tc];
        let (connection, _, messages): (Connection, _, _) = new_multicast_connection_with_socket(&groups)
            .map_err(|source| NetlinkError::Socket { source })?;
        // An open socket would keep the namespace alive, and the connection alone does not notice that nobody listens.
        let connection = AbortOnDropHandle::new(tokio::spawn(connection));
        Ok(messages.map(move |_| {
            let _lasts = &connection;
        }))
    })?
}

/// Turns messages into events as soon as they come. A message is some kilobytes large and an event some dozen bytes; while an
/// agent attaches a thousand interfaces at its start nobody takes either.
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
pub fn watch_hooks() -> Result<impl Stream<Item = HookEvent> + Unpin, NetlinkError> {
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
