//! Addresses, neighbours and routes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::TryStreamExt;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::route::RouteMessage;
use rtnetlink::RouteMessageBuilder;

use super::error::{absent_is_fine, refused};
use super::{Netlink, NetlinkError};
use crate::ids::{IfIndex, MacAddress};

impl Netlink {
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
        let set = self.handle.route().add(route(prefix, gateway, index)).replace().execute().await;
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
        let deleted = self.handle.route().del(route(prefix, gateway, index)).execute().await;
        absent_is_fine(deleted)
            .map_err(|source| refused("delete route", format_args!("{}/{}", prefix.0, prefix.1), source))
    }
}

fn route((destination, length): (Ipv6Addr, u8), gateway: Ipv6Addr, index: IfIndex) -> RouteMessage {
    RouteMessageBuilder::<Ipv6Addr>::new()
        .destination_prefix(destination, length)
        .gateway(gateway)
        .output_interface(index.0)
        .build()
}
