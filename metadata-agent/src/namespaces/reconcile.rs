//! Brings a site in step with the links of its namespace and their addresses, whenever something there changes.
//!
//! The subnets that guests may send from are those that the interface itself has an address in: whoever is behind it
//! cannot pass for a guest of another network of the same router.

use std::net::Ipv4Addr;

use metadata_ebpf::abi::MAX_PORT_IPV4;

use super::place::faces_guests;
use super::site::{Site, SiteError};
use crate::datapath::{Hook, PortPolicy};
use crate::ids::{IfIndex, NetworkOrRouter};
use crate::net::netlink::Link;
use crate::net::portal::HOST_END;

impl Site {
    /// Attaches, lets go and tells the kernel what there is to tell. What cannot be attached holds up nothing else; the
    /// first of those errors is told.
    pub(super) async fn reconcile(&mut self) -> Result<(), SiteError> {
        let links = self.netlink.links().await?;
        if !links.iter().any(|link| link.index == self.annex.outer && link.name == HOST_END) {
            return Err(SiteError::WayLost);
        }
        let addresses = self.netlink.ipv4_addresses().await?;
        let (wanted, others): (Vec<Link>, Vec<Link>) =
            links.into_iter().partition(|link| faces_guests(self.scope, link));
        let is_gone = |index: &IfIndex| !wanted.iter().any(|link| link.index == *index);
        for index in self.attached.keys().copied().filter(is_gone).collect::<Vec<_>>() {
            self.let_go(index, &others).await?;
        }
        let mut outcome = Ok(());
        for link in &wanted {
            let policy = self.policy(link, &addresses);
            let kept = match self.attached.get_mut(&link.index) {
                Some(attached) => {
                    attached.link.clone_from(link);
                    Ok(self.datapath.set_policy(link.index, None, &policy)?)
                }
                None => self.attach(link, &policy).await,
            };
            outcome = outcome.and(kept).and(fits(link, &policy));
        }
        outcome = outcome.and(self.keep_filters().await);
        self.datapath.remove_orphans()?;
        for mark in self.datapath.filters()? {
            if !self.attached.contains_key(&mark.index) || self.datapath.hook() == Hook::Tcx {
                self.take_filter_off(mark.index, &wanted).await?;
            }
        }
        outcome
    }

    /// No network that is not the interface's own, and none of the metadata service's itself, which a DHCP server's has.
    fn policy(&self, link: &Link, addresses: &[(IfIndex, Ipv4Addr, u8)]) -> PortPolicy {
        let own =
            addresses.iter().filter(|(index, address, _)| *index == link.index && !address.is_link_local());
        let network = match self.scope {
            NetworkOrRouter::Network(network) => Some(network),
            NetworkOrRouter::Router(_) => None,
        };
        PortPolicy {
            network,
            mac: None,
            addresses: Some(own.map(|(_, address, len)| (*address, *len)).collect()),
            shared: true,
            confined: self.confined,
        }
    }
}

fn fits(link: &Link, policy: &PortPolicy) -> Result<(), SiteError> {
    let count = policy.addresses.as_ref().map_or(0, Vec::len);
    if count <= MAX_PORT_IPV4 {
        Ok(())
    } else {
        Err(SiteError::Subnets { interface: link.name.clone(), count })
    }
}
