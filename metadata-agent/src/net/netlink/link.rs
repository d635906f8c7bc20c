//! Descriptions of links.

use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkInfo, LinkMessage};

use crate::ids::{IfIndex, MacAddress};
use crate::net::netns::Netns;

/// A network interface as the kernel describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub index: IfIndex,
    pub name: String,
    /// `None` if the link does not have a MAC address of six octets.
    pub mac: Option<MacAddress>,
    /// Kind as in `ip -d link`: `tun`, `veth`, `bridge`. Empty for a device without a kind.
    pub kind: String,
    pub mtu: u32,
    /// True if the link is administratively up.
    pub up: bool,
    /// Index of the bridge, bond or VRF that has the link.
    pub controller: Option<IfIndex>,
    /// Index of the other end of a veth pair, in that end's namespace.
    pub peer_index: Option<IfIndex>,
    /// Namespace id of the other end of a veth pair, if it is in another namespace.
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
            controller: None,
            peer_index: None,
            peer_nsid: None,
        };
        for attribute in message.attributes {
            #[expect(clippy::wildcard_enum_match_arm, reason = "sixty attributes are of no interest here")]
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                LinkAttribute::Address(octets) => link.mac = octets.try_into().ok().map(MacAddress),
                LinkAttribute::Controller(index) => link.controller = Some(IfIndex(index)),
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

/// The ends of a veth pair.
#[derive(Debug)]
pub(crate) struct VethPair<'a> {
    /// Name of the end in the socket's namespace.
    pub name: &'a str,
    /// Name of the other end.
    pub peer: &'a str,
    /// Namespace of the other end.
    pub peer_netns: &'a Netns,
    /// MTU of both ends, in bytes.
    pub mtu: u32,
    /// MAC address of the end in the socket's namespace; `None` lets the kernel choose.
    pub mac: Option<MacAddress>,
    /// MAC address of the other end; `None` lets the kernel choose.
    pub peer_mac: Option<MacAddress>,
}
