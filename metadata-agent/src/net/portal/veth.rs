//! The veth pairs into the portal: found, or created.

use tracing::info;

use super::PortalError;
use crate::net::netlink::{Link, Netlink, VethPair};

/// The ends of a pair, as far as they exist.
struct Found {
    outer: Option<Link>,
    inner: Option<Link>,
}

impl Found {
    fn whole(&self, pair: &VethPair<'_>) -> Option<(Link, Link)> {
        let (outer, inner) = (self.outer.as_ref()?, self.inner.as_ref()?);
        let is_whole = mismatch(outer, inner, (pair.name, pair.peer)).is_none()
            && (pair.peer_mac.is_none() || pair.peer_mac == inner.mac);
        is_whole.then(|| (outer.clone(), inner.clone()))
    }
}

/// Finds the links with the names of the ends. A link that has a name only as an alternative name
/// is another one.
async fn find(outside: &Netlink, inside: &Netlink, pair: &VethPair<'_>) -> Result<Found, PortalError> {
    let outer = outside.link(pair.name).await?.filter(|link| link.name == pair.name);
    let inner = inside.link(pair.peer).await?.filter(|link| link.name == pair.peer);
    Ok(Found { outer, inner })
}

/// Returns the reason why two links are not the ends of this pair, or `None` if they are.
pub(super) fn mismatch(outer: &Link, inner: &Link, pair: (&str, &str)) -> Option<String> {
    let (name, peer) = pair;
    let belong = outer.peer_index == Some(inner.index) && inner.peer_index == Some(outer.index);
    if !belong {
        return Some(format!("{name} and {peer} do not belong together"));
    }
    let controlled = [(name, outer), (peer, inner)].into_iter().find(|(_, link)| link.controller.is_some());
    controlled.map(|(name, _)| format!("{name} belongs to a bridge, bond or VRF"))
}

/// Returns both ends of a veth pair if both exist and belong together.
pub(super) async fn adopt(
    outside: &Netlink,
    inside: &Netlink,
    pair: &VethPair<'_>,
) -> Result<Option<(Link, Link)>, PortalError> {
    Ok(find(outside, inside, pair).await?.whole(pair))
}

/// Returns both ends of a veth pair. Creates the pair again unless both ends exist and belong
/// together.
pub(super) async fn establish(
    outside: &Netlink,
    inside: &Netlink,
    pair: &VethPair<'_>,
) -> Result<(Link, Link), PortalError> {
    let found = find(outside, inside, pair).await?;
    if let Some(ends) = found.whole(pair) {
        info!(interface = pair.name, "portal interface adopted");
        return Ok(ends);
    }
    // Remove what is left of it, wherever its other end is now.
    for (netlink, stray) in [(outside, found.outer), (inside, found.inner)] {
        if let Some(stray) = stray {
            netlink.delete_link(stray.index).await?;
        }
    }
    // Create it.
    outside.add_veth(pair).await?;
    let Found { outer, inner } = find(outside, inside, pair).await?;
    let outer = outer.ok_or_else(|| PortalError::Vanished { name: pair.name.to_owned() })?;
    let inner = inner.ok_or_else(|| PortalError::Vanished { name: pair.peer.to_owned() })?;
    info!(interface = pair.name, "portal interface created");
    Ok((outer, inner))
}
