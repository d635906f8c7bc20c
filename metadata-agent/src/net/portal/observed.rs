//! The state of the portal as the kernel has it.

use std::net::Ipv6Addr;

use super::sysctl::{self, WrongSysctl};
use super::{HOST_END, Portal, PortalError};
use crate::ids::IfIndex;
use crate::net::netlink::{Link, Neighbour, Route, Rule};
use crate::net::netns::Netns;

/// The owner of the portal's name under `/run/netns`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Name {
    Own,
    Missing,
    /// Another namespace has it.
    Others,
}

/// Everything in which damage shows.
#[derive(Debug)]
pub(super) struct Observed {
    pub(super) name: Name,
    /// The host end of the veth pair.
    pub(super) outer: Option<Link>,
    /// The links in the portal.
    pub(super) links: Vec<Link>,
    pub(super) addresses: Vec<(IfIndex, Ipv6Addr, u8)>,
    pub(super) neighbours: Vec<Neighbour>,
    pub(super) routes: Vec<Route>,
    pub(super) rules: Vec<Rule>,
    pub(super) sysctls: Vec<WrongSysctl>,
}

impl Observed {
    /// Returns a link in the portal.
    pub(super) fn link(&self, name: &str) -> Option<&Link> {
        self.links.iter().find(|link| link.name == name)
    }

    pub(super) fn has_route(&self, desired: &Route) -> bool {
        self.routes.iter().any(|route| route.is_same(desired))
    }
}

impl Portal {
    /// Reads the state of the portal.
    pub(super) async fn observe(&self) -> Result<Observed, PortalError> {
        let outer = self.host.link(HOST_END).await?;
        Ok(Observed {
            name: self.name()?,
            outer: outer.filter(|link| link.name == HOST_END),
            links: self.inside.links().await?,
            addresses: self.inside.ipv6_addresses().await?,
            neighbours: self.inside.ipv6_neighbours().await?,
            routes: self.inside.ipv6_routes().await?,
            rules: self.inside.ipv6_rules().await?,
            sysctls: self.netns.run(sysctl::wrong)??,
        })
    }

    fn name(&self) -> Result<Name, PortalError> {
        Ok(match Netns::named(self.netns.name())? {
            Some(named) if named.inode()? == self.netns.inode()? => Name::Own,
            Some(_) => Name::Others,
            None => Name::Missing,
        })
    }
}
