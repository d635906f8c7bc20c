//! Connections into the portal from namespaces other than the host's, and the register of what
//! they need in the portal.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv6Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use metadata_ebpf::identity::{ATTACHMENT_PREFIX_LEN, AttachmentId, ClientAddress};
use tracing::debug;

use super::{GATEWAY, HOST_END, Portal, PortalError, link_nsid, set_up_inner_end, sysctl, veth};
use crate::ids::{IfIndex, MacAddress};
use crate::net::netlink::{Link, Netlink, NetlinkError, Route, VethPair};

/// Prefix of the names of inner ends; the rest is the inode of the namespace outside.
const INNER_END: &str = "md";

/// The register of all uplinks.
#[derive(Clone, Debug, Default)]
pub(super) struct Uplinks(Arc<Mutex<Register>>);

#[derive(Debug, Default)]
struct Register {
    uplinks: BTreeMap<IfIndex, RegisteredUplink>,
    /// Number of changes that are being made in the kernel.
    in_progress: usize,
    /// Number of changes that were made.
    version: u64,
}

/// Needs of an uplink in the portal.
#[derive(Clone, Debug, Default)]
pub(super) struct RegisteredUplink {
    pub(super) name: String,
    pub(super) attachments: BTreeSet<AttachmentId>,
    /// True if the inner end is gone or was replaced, so that the pair must be created again.
    pub(super) is_lost: bool,
}

/// A change of uplinks, between the first step in the kernel and its entry in the register.
struct Change(Uplinks);

impl Drop for Change {
    fn drop(&mut self) {
        let mut register = self.0.lock();
        register.in_progress -= 1;
        register.version += 1;
    }
}

impl Uplinks {
    fn lock(&self) -> MutexGuard<'_, Register> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self) -> Change {
        self.lock().in_progress += 1;
        Change(self.clone())
    }

    /// Returns the version of the register, or `None` while it differs from the kernel's state.
    pub(super) fn version(&self) -> Option<u64> {
        let register = self.lock();
        (register.in_progress == 0).then_some(register.version)
    }

    pub(super) fn all(&self) -> BTreeMap<IfIndex, RegisteredUplink> {
        self.lock().uplinks.clone()
    }

    /// Records that an uplink must be created again by its owner.
    pub(super) fn mark_lost(&self, inner: IfIndex) {
        if let Some(uplink) = self.lock().uplinks.get_mut(&inner) {
            uplink.is_lost = true;
        }
    }

    fn update(&self, inner: IfIndex, update: impl FnOnce(&mut RegisteredUplink)) {
        if let Some(uplink) = self.lock().uplinks.get_mut(&inner) {
            update(uplink);
        }
    }
}

impl RegisteredUplink {
    /// Returns the routes to the clients behind the uplink.
    pub(super) fn routes(&self, inner: IfIndex) -> impl Iterator<Item = Route> {
        let prefixes = self.attachments.iter().flat_map(|attachment| prefixes(*attachment));
        prefixes.map(move |prefix| Route::new(prefix, GATEWAY, inner))
    }
}

/// Returns true if a link in the portal has the name of an uplink's inner end.
pub(super) fn is_inner_end(name: &str) -> bool {
    name != super::PORTAL_END
        && name.strip_prefix(INNER_END).is_some_and(|inode| inode.parse::<u32>().is_ok())
}

fn prefixes(attachment: AttachmentId) -> impl Iterator<Item = (Ipv6Addr, u8)> {
    ClientAddress::prefixes(attachment).into_iter().map(|prefix| (prefix.into(), ATTACHMENT_PREFIX_LEN))
}

impl Portal {
    /// Connects another namespace to the portal by a veth pair, or creates the missing parts of it.
    /// `outside` is a socket in that namespace and `inode` identifies it.
    ///
    /// # Errors
    /// The kernel refuses, or the namespace is removed meanwhile.
    pub(crate) async fn add_uplink(
        &self,
        outside: &Netlink,
        inode: u32,
    ) -> Result<PortalUplink, PortalError> {
        let change = self.uplinks.change();
        let peer = format!("{INNER_END}{inode}");
        let (mtu, peer_mac) = (self.mtu, Some(self.mac));
        let pair =
            VethPair { name: HOST_END, peer: &peer, peer_netns: &self.netns, mtu, mac: None, peer_mac };
        let (outer, inner) = veth::establish(outside, &self.inside, &pair).await?;
        let nsid = link_nsid(&outer)?;
        // The program takes frames before the network stack sees them, so that namespace does not
        // need IPv6.
        if let Err(error) = outside.disable_link_local(outer.index).await {
            debug!(%error, "cannot disable link-local address of portal uplink");
        }
        outside.set_up(outer.index, self.mtu).await?;
        set_up_inner_end(&self.inside, inner.index, self.mtu).await?;
        let registered = RegisteredUplink { name: peer, ..RegisteredUplink::default() };
        self.uplinks.lock().uplinks.insert(inner.index, registered);
        drop(change);
        Ok(PortalUplink {
            inside: self.inside.clone(),
            uplinks: self.uplinks.clone(),
            inner: inner.index,
            outer: outer.index,
            mtu: self.mtu,
            nsid,
            mac: self.mac,
        })
    }

    /// Sets up the inner end of an uplink again, with its routes.
    pub(super) async fn restore_uplink(&self, inner: IfIndex) -> Result<(), PortalError> {
        let Some(uplink) = self.uplinks.lock().uplinks.get(&inner).cloned() else { return Ok(()) };
        let name = uplink.name.as_str();
        self.inside.set_mtu(inner, self.mtu).await?;
        let enabled = self.netns.run(|| sysctl::enable_ipv6(name))?;
        enabled.map_err(|source| PortalError::NoIpv6 { source })?;
        set_up_inner_end(&self.inside, inner, self.mtu).await?;
        for route in uplink.routes(inner) {
            self.inside.set_route(route.prefix, GATEWAY, inner).await?;
        }
        Ok(())
    }
}

/// A connection into the portal from a namespace other than the host's.
#[derive(Debug)]
pub(crate) struct PortalUplink {
    inside: Netlink,
    uplinks: Uplinks,
    inner: IfIndex,
    mtu: u32,
    /// Index of its outer end, [`HOST_END`].
    pub outer: IfIndex,
    /// Namespace id of the portal as seen from that namespace.
    pub nsid: u32,
    /// MAC address of the portal's end. All uplinks have the same one, because the programs store
    /// only one.
    pub mac: MacAddress,
}

impl PortalUplink {
    /// Routes replies to the clients of an attachment through this uplink.
    ///
    /// # Errors
    /// The uplink is gone.
    pub(crate) async fn add_routes(&self, attachment: AttachmentId) -> Result<(), PortalError> {
        let _change = self.uplinks.change();
        for prefix in prefixes(attachment) {
            self.inside.set_route(prefix, GATEWAY, self.inner).await?;
        }
        self.uplinks.update(self.inner, |uplink| {
            uplink.attachments.insert(attachment);
        });
        Ok(())
    }

    /// Removes these routes, if they exist.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) async fn remove_routes(&self, attachment: AttachmentId) -> Result<(), PortalError> {
        let _change = self.uplinks.change();
        self.uplinks.update(self.inner, |uplink| {
            uplink.attachments.remove(&attachment);
        });
        for prefix in prefixes(attachment) {
            self.inside.delete_route(prefix, GATEWAY, self.inner).await?;
        }
        Ok(())
    }

    /// Returns true if the inner end is gone, so that the pair must be created again.
    pub(crate) fn is_lost(&self) -> bool {
        self.uplinks.lock().uplinks.get(&self.inner).is_some_and(|uplink| uplink.is_lost)
    }

    /// Returns what is wrong with the outer end, or `None` if nothing is.
    pub(crate) fn damage(&self, outer: &Link) -> Option<String> {
        super::desired::link_damage(outer, self.mtu)
    }

    /// Brings the outer end up again. `outside` is a socket in its namespace.
    ///
    /// # Errors
    /// The outer end is gone.
    pub(crate) async fn restore_outer(&self, outside: &Netlink) -> Result<(), NetlinkError> {
        outside.set_up(self.outer, self.mtu).await
    }
}

impl Drop for PortalUplink {
    fn drop(&mut self) {
        let mut register = self.uplinks.lock();
        register.uplinks.remove(&self.inner);
        register.version += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_register_has_no_version_while_it_differs_from_the_kernel() {
        let uplinks = Uplinks::default();
        let before = uplinks.version();
        let changes = [uplinks.change(), uplinks.change()];
        assert_eq!(uplinks.version(), None);
        drop(changes);
        assert!(uplinks.version().is_some() && uplinks.version() != before);
    }

    #[test]
    fn inner_ends_are_recognised_by_their_names() {
        assert!(is_inner_end("md4026532001"));
        for other in ["md0", "md", "md-portal", "lo", "mdx"] {
            assert!(!is_inner_end(other), "{other}");
        }
    }
}
