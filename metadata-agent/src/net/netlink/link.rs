//! Links: what the kernel says of one, and making, changing and deleting them.

use futures_util::TryStreamExt;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVeth, LinkAttribute, LinkExtentMask,
    LinkFlags, LinkInfo, LinkMessage,
};
use rtnetlink::{LinkMessageBuilder, LinkUnspec, LinkVeth};

use super::error::{absent_is_fine, is_absence, refused};
use super::{Netlink, NetlinkError};
use crate::ids::{IfIndex, MacAddress};
use crate::net::netns::Netns;

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

impl Netlink {
    /// All links, in the order of their indexes.
    ///
    /// # Errors
    /// The kernel refuses the dump.
    pub async fn links(&self) -> Result<Vec<Link>, NetlinkError> {
        // Statistics are half of what the kernel would write.
        let all =
            self.handle.link().get().set_filter_mask(AddressFamily::Unspec, vec![LinkExtentMask::SkipStats]);
        let dump = all.execute().map_ok(Link::from).try_collect().await;
        dump.map_err(|source| refused("list", "links", source))
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
    pub async fn disable_link_local(&self, index: IfIndex) -> Result<(), NetlinkError> {
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
}
