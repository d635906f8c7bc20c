//! IPv6 state of a namespace as the kernel lists it: addresses, neighbours, routes and rules.

use std::fmt;
use std::future::ready;
use std::net::{IpAddr, Ipv6Addr};

use futures_util::TryStreamExt;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteProtocol, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use nix::errno::Errno;
use rtnetlink::{AddressMessageBuilder, IpVersion, RouteMessageBuilder};

use super::error::{errno, ignore_absent, refused};
use super::{Netlink, NetlinkError, route};
use crate::ids::{IfIndex, MacAddress};

/// `RT_TABLE_LOCAL` and `RT_TABLE_MAIN` of linux/rtnetlink.h.
const LOCAL: u32 = 255;
const MAIN: u32 = 254;

/// An entry of the neighbour table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Neighbour {
    pub index: IfIndex,
    pub address: Ipv6Addr,
    pub mac: Option<MacAddress>,
    pub is_permanent: bool,
}

/// A route of any table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Route {
    pub prefix: (Ipv6Addr, u8),
    pub gateway: Option<Ipv6Addr>,
    pub index: Option<IfIndex>,
    /// True if the kernel made it for an address or a link.
    pub is_kernels: bool,
    table: u32,
    kind: RouteType,
    message: RouteMessage,
}

impl Route {
    /// The route that [`Netlink::set_route`] makes.
    pub(crate) fn new(prefix: (Ipv6Addr, u8), gateway: Ipv6Addr, index: IfIndex) -> Self {
        Self::from(route(prefix, gateway, index))
    }

    /// The kernel's route for an address of the namespace itself.
    #[cfg(test)]
    pub(crate) fn local_of(address: Ipv6Addr) -> Self {
        let route = Self::new((address, 128), address, IfIndex(1));
        Self { gateway: None, is_kernels: true, table: LOCAL, kind: RouteType::Local, ..route }
    }

    /// Returns true if the kernel treats both the same.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        let key = |route: &Self| (route.prefix, route.gateway, route.index, route.table, route.kind);
        key(self) == key(other)
    }

    /// Returns true if this is the kernel's route for an address of the namespace itself.
    pub(crate) fn is_local_of(&self, address: Ipv6Addr) -> bool {
        self.prefix == (address, 128) && self.table == LOCAL && self.kind == RouteType::Local
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (address, length) = self.prefix;
        if self.kind != RouteType::Unicast {
            write!(f, "{:?} ", self.kind)?;
        }
        write!(f, "{address}/{length}")?;
        if let Some(gateway) = self.gateway {
            write!(f, " via {gateway}")?;
        }
        match self.index {
            Some(index) => write!(f, " dev {index}"),
            None => Ok(()),
        }
    }
}

impl From<RouteMessage> for Route {
    fn from(message: RouteMessage) -> Self {
        let header = &message.header;
        let mut route = Self {
            prefix: (Ipv6Addr::UNSPECIFIED, header.destination_prefix_length),
            gateway: None,
            index: None,
            is_kernels: header.protocol == RouteProtocol::Kernel,
            table: header.table.into(),
            kind: header.kind,
            message: RouteMessage::default(),
        };
        for attribute in &message.attributes {
            #[expect(clippy::wildcard_enum_match_arm, reason = "the others do not select packets")]
            match attribute {
                RouteAttribute::Destination(RouteAddress::Inet6(address)) => route.prefix.0 = *address,
                RouteAttribute::Gateway(RouteAddress::Inet6(gateway)) => route.gateway = Some(*gateway),
                RouteAttribute::Oif(index) => route.index = Some(IfIndex(*index)),
                RouteAttribute::Table(table) => route.table = *table,
                _ => {}
            }
        }
        Self { message, ..route }
    }
}

/// A rule that selects a routing table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rule {
    pub priority: u32,
    table: u32,
    /// True if it applies to all packets.
    is_plain: bool,
    message: RuleMessage,
}

impl Rule {
    /// The rules of a new namespace (net/ipv6/fib6_rules.c, `fib6_rules_net_init`).
    pub(crate) fn defaults() -> [Self; 2] {
        [(0, LOCAL), (32_766, MAIN)].map(|(priority, table)| Self {
            priority,
            table,
            is_plain: true,
            message: RuleMessage::default(),
        })
    }

    /// Returns true if the kernel treats both the same.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        let key = |rule: &Self| (rule.priority, rule.table, rule.is_plain);
        key(self) == key(other)
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rule {}", self.priority)
    }
}

impl From<RuleMessage> for Rule {
    fn from(message: RuleMessage) -> Self {
        let header = &message.header;
        let (mut priority, mut table) = (0, header.table.into());
        let mut is_plain = header.action == RuleAction::ToTable
            && (header.src_len, header.dst_len, header.tos) == (0, 0, 0)
            && !header.flags.contains(RuleFlags::Invert);
        for attribute in &message.attributes {
            #[expect(clippy::wildcard_enum_match_arm, reason = "all others select packets")]
            match attribute {
                RuleAttribute::Priority(found) => priority = *found,
                RuleAttribute::Table(found) => table = *found,
                RuleAttribute::Protocol(_) | RuleAttribute::SuppressPrefixLen(u32::MAX) => {}
                _ => is_plain = false,
            }
        }
        Self { priority, table, is_plain, message }
    }
}

/// Lists.
impl Netlink {
    /// Returns the IPv6 addresses of all links with their prefix lengths, in no particular order.
    ///
    /// # Errors
    /// The kernel refuses the dump.
    pub(crate) async fn ipv6_addresses(&self) -> Result<Vec<(IfIndex, Ipv6Addr, u8)>, NetlinkError> {
        let mut request = self.handle.address().get();
        request.message_mut().header.family = AddressFamily::Inet6;
        let dump = request.execute().try_collect::<Vec<_>>().await;
        let dump = dump.map_err(|source| refused("list", "IPv6 addresses", source))?;
        let of = |message: AddressMessage| {
            let address = message.attributes.iter().find_map(|part| {
                if let AddressAttribute::Address(IpAddr::V6(address)) = part { Some(*address) } else { None }
            });
            Some((IfIndex(message.header.index), address?, message.header.prefix_len))
        };
        Ok(dump.into_iter().filter_map(of).collect())
    }

    /// Returns the IPv6 neighbours.
    ///
    /// # Errors
    /// The kernel refuses the dump.
    pub(crate) async fn ipv6_neighbours(&self) -> Result<Vec<Neighbour>, NetlinkError> {
        let request = self.handle.neighbours().get().set_address_family(AddressFamily::Inet6);
        let dump = request.execute().try_collect::<Vec<_>>().await;
        let dump = dump.map_err(|source| refused("list", "neighbours", source))?;
        Ok(dump.iter().filter_map(neighbour).collect())
    }

    /// Returns the IPv6 routes of all tables, without the exceptions that the kernel makes for path
    /// MTUs. Their number and content is up to the peers, and the kernel lists them as well
    /// (net/ipv6/ip6_fib.c, `inet6_dump_fib`).
    ///
    /// # Errors
    /// The kernel refuses the dump.
    pub(crate) async fn ipv6_routes(&self) -> Result<Vec<Route>, NetlinkError> {
        let all = RouteMessageBuilder::<Ipv6Addr>::new().build();
        let is_route = |message: &RouteMessage| !message.header.flags.contains(RouteFlags::Cloned);
        let listed = self.handle.route().get(all).execute();
        let routes = listed.try_filter(|message| ready(is_route(message))).map_ok(Route::from);
        routes.try_collect().await.map_err(|source| refused("list", "IPv6 routes", source))
    }

    /// Returns the IPv6 rules.
    ///
    /// # Errors
    /// The kernel refuses the dump.
    pub(crate) async fn ipv6_rules(&self) -> Result<Vec<Rule>, NetlinkError> {
        let dump = self.handle.rule().get(IpVersion::V6).execute().map_ok(Rule::from).try_collect().await;
        dump.map_err(|source| refused("list", "IPv6 rules", source))
    }
}

/// Changes.
impl Netlink {
    /// Removes an address from a link, if it has it.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) async fn delete_address(
        &self,
        index: IfIndex,
        address: Ipv6Addr,
        prefix: u8,
    ) -> Result<(), NetlinkError> {
        let message =
            AddressMessageBuilder::<Ipv6Addr>::new().index(index.0).address(address, prefix).build();
        match self.handle.address().del(message).execute().await {
            Err(error) if errno(&error) == Some(Errno::EADDRNOTAVAIL) => Ok(()),
            deleted => ignore_absent(deleted).map_err(|source| refused("delete address", address, source)),
        }
    }

    /// Removes a route that [`Self::ipv6_routes`] returned, if it is still there.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) async fn delete_listed_route(&self, route: &Route) -> Result<(), NetlinkError> {
        let deleted = self.handle.route().del(route.message.clone()).execute().await;
        ignore_absent(deleted).map_err(|source| refused("delete route", route, source))
    }

    /// Adds a rule for all packets, unless it is there.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) async fn set_rule(&self, rule: &Rule) -> Result<(), NetlinkError> {
        let request = self.handle.rule().add().v6().table_id(rule.table).action(RuleAction::ToTable);
        match request.priority(rule.priority).execute().await {
            Err(error) if errno(&error) == Some(Errno::EEXIST) => Ok(()),
            added => added.map_err(|source| refused("add", rule, source)),
        }
    }

    /// Removes a rule that [`Self::ipv6_rules`] returned, if it is still there.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) async fn delete_rule(&self, rule: &Rule) -> Result<(), NetlinkError> {
        let deleted = self.handle.rule().del(rule.message.clone()).execute().await;
        ignore_absent(deleted).map_err(|source| refused("delete", rule, source))
    }
}

fn neighbour(message: &NeighbourMessage) -> Option<Neighbour> {
    let (mut address, mut mac) = (None, None);
    for attribute in &message.attributes {
        #[expect(clippy::wildcard_enum_match_arm, reason = "the others are statistics")]
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(found)) => address = Some(*found),
            NeighbourAttribute::LinkLayerAddress(octets) => {
                mac = <[u8; 6]>::try_from(octets.as_slice()).ok().map(MacAddress);
            }
            _ => {}
        }
    }
    let is_permanent = message.header.state == NeighbourState::Permanent;
    Some(Neighbour { index: IfIndex(message.header.ifindex), address: address?, mac, is_permanent })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_default_rule_is_recognised_and_others_are_not() {
        let mut message = RuleMessage::default();
        message.header.action = RuleAction::ToTable;
        message.header.table = 254;
        message.attributes =
            vec![RuleAttribute::Priority(32_766), RuleAttribute::SuppressPrefixLen(u32::MAX)];
        let [local, main] = Rule::defaults();
        assert!(Rule::from(message.clone()).is_same(&main));
        assert!(!Rule::from(message.clone()).is_same(&local));
        let mut selective = message.clone();
        selective.attributes.push(RuleAttribute::Iifname("md0".to_owned()));
        assert!(!Rule::from(selective).is_same(&main));
        message.header.action = RuleAction::Prohibit;
        assert!(!Rule::from(message).is_same(&main));
    }

    #[test]
    fn routes_are_the_same_if_the_kernel_treats_them_so() {
        let gateway = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
        let prefix = (Ipv6Addr::new(0xfd64, 0, 0, 0, 0, 0, 0, 0), 14);
        let route = Route::new(prefix, gateway, IfIndex(2));
        let mut listed = route.message.clone();
        listed.header.protocol = RouteProtocol::Boot;
        listed.attributes.push(RouteAttribute::Priority(1024));
        assert!(Route::from(listed).is_same(&route));
        assert!(!Route::new(prefix, gateway, IfIndex(3)).is_same(&route));
        assert!(!Route::new((prefix.0, 48), gateway, IfIndex(2)).is_same(&route));
        assert_eq!(route.to_string(), "fd64::/14 via fe80::1 dev 2");
    }
}
