//! The desired state of the portal, and its differences from what the kernel has. Pure functions.
//!
//! The portal belongs to the agent alone, so a route or rule there that the agent did not make is
//! damage too, if it can lead packets astray.

use std::collections::BTreeMap;
use std::net::Ipv6Addr;

use metadata_ebpf::from_guest::METADATA_MAC;
use metadata_ebpf::identity::{ATTACHMENT_PREFIX_LEN, PORTAL_ADDRESS};

use super::observed::{Name, Observed};
use super::sysctl::WrongSysctl;
use super::uplink::{RegisteredUplink, is_inner_end};
use super::{GATEWAY, HOST_END, PORTAL_END, identity_prefix, veth};
use crate::ids::{IfIndex, MacAddress};
use crate::net::damage::{DamageKind, Effect};
use crate::net::netlink::{Link, Neighbour, Route, Rule};

/// The desired state, apart from constants.
pub(super) struct Desired<'a> {
    pub(super) mtu: u32,
    /// MAC address of the portal's end, which the programs know.
    pub(super) mac: MacAddress,
    /// Optional sysctls that cannot be written on this host.
    pub(super) unwritable: &'a [&'static str],
    /// `None` while uplinks change. Then they are not compared.
    pub(super) uplinks: Option<&'a BTreeMap<IfIndex, RegisteredUplink>>,
}

/// One difference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Damage {
    pub(super) kind: DamageKind,
    /// Words for the log and for `/ready`.
    pub(super) found: String,
    pub(super) repair: Repair,
}

/// The step that repairs a difference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Repair {
    /// Complete the portal as at the start.
    Complete,
    /// The same, after the address was removed: a replacement would not restore its local route.
    ReplaceAddress,
    /// The same, but guests are served meanwhile.
    SetSysctl,
    RestoreName,
    DeleteRoute(Route),
    AddRule(Rule),
    DeleteRule(Rule),
    RestoreUplink(IfIndex),
    /// The owner of the uplink must create it again.
    ReplaceUplink(IfIndex),
}

impl Repair {
    /// Returns the effect of the damage until it is repaired.
    pub(super) fn effect(&self) -> Effect {
        match self {
            Self::Complete
            | Self::ReplaceAddress
            | Self::DeleteRoute(_)
            | Self::AddRule(_)
            | Self::DeleteRule(_) => Effect::Stopped,
            // An uplink serves the guests of one router or network, not of the host.
            Self::SetSysctl | Self::RestoreName | Self::RestoreUplink(_) | Self::ReplaceUplink(_) => {
                Effect::Served
            }
        }
    }

    pub(super) fn is_about_uplink(&self) -> bool {
        matches!(self, Self::RestoreUplink(_) | Self::ReplaceUplink(_))
    }
}

impl Damage {
    fn new(kind: DamageKind, repair: Repair, found: impl Into<String>) -> Self {
        Self { kind, found: found.into(), repair }
    }
}

impl Desired<'_> {
    /// Returns all differences, in the order in which they are best repaired.
    pub(super) fn compare(&self, observed: &Observed) -> Vec<Damage> {
        let mut damage = Vec::new();
        match observed.name {
            Name::Own => {}
            Name::Missing => damage.push(Damage::new(
                DamageKind::Namespace,
                Repair::RestoreName,
                "the portal's namespace has no name",
            )),
            Name::Others => damage.push(Damage::new(
                DamageKind::Namespace,
                Repair::RestoreName,
                "another namespace has the portal's name",
            )),
        }
        damage.extend(observed.sysctls.iter().filter_map(|wrong| self.sysctl(wrong)));
        match self.ends(observed) {
            Ok(portal_end) => {
                self.links(observed, portal_end, &mut damage);
                Self::addresses(observed, &mut damage);
                damage.extend(next_hop(observed, portal_end.index, PORTAL_END, Repair::Complete));
                self.routes(observed, portal_end.index, &mut damage);
            }
            // All else depends on the pair.
            Err(found) => damage.push(Damage::new(DamageKind::Link, Repair::Complete, found)),
        }
        Self::rules(observed, &mut damage);
        damage
    }

    fn sysctl(&self, wrong: &WrongSysctl) -> Option<Damage> {
        let WrongSysctl { name, found, is_required, .. } = wrong;
        if !is_required && self.unwritable.contains(name) {
            return None;
        }
        let repair = if *is_required { Repair::Complete } else { Repair::SetSysctl };
        Some(Damage::new(DamageKind::Sysctl, repair, format!("net.{name} is {found}")))
    }

    /// Returns the portal's end if both ends are there and belong together.
    fn ends<'a>(&self, observed: &'a Observed) -> Result<&'a Link, String> {
        let outer = observed.outer.as_ref().ok_or_else(|| format!("{HOST_END} is gone"))?;
        let inner = observed.link(PORTAL_END).ok_or_else(|| format!("{PORTAL_END} is gone"))?;
        if let Some(mismatch) = veth::mismatch(outer, inner, (HOST_END, PORTAL_END)) {
            return Err(mismatch);
        }
        if inner.mac != Some(self.mac) {
            return Err(format!("{PORTAL_END} has another MAC address"));
        }
        Ok(inner)
    }

    fn links(&self, observed: &Observed, portal_end: &Link, damage: &mut Vec<Damage>) {
        let ends = observed.outer.iter().chain([portal_end]);
        let mut found: Vec<_> = ends.filter_map(|link| link_damage(link, self.mtu)).collect();
        if !observed.link("lo").is_some_and(|lo| lo.up) {
            found.push("lo is down".to_owned());
        }
        damage.extend(found.into_iter().map(|found| Damage::new(DamageKind::Link, Repair::Complete, found)));
        for (index, uplink) in self.uplinks.into_iter().flatten() {
            damage.extend(self.uplink(observed, *index, uplink));
        }
    }

    fn addresses(observed: &Observed, damage: &mut Vec<Damage>) {
        let address = Ipv6Addr::from(PORTAL_ADDRESS);
        let (kind, text) = (DamageKind::Address, format!("{address} is gone"));
        if !observed.addresses.iter().any(|(_, found, _)| *found == address) {
            damage.push(Damage::new(kind, Repair::Complete, text));
        } else if !observed.routes.iter().any(|route| route.is_local_of(address)) {
            let text = format!("the local route of {address} is gone");
            damage.push(Damage::new(DamageKind::Route, Repair::ReplaceAddress, text));
        }
    }

    /// Compares the inner end of an uplink, which may be gone, replaced or incomplete.
    fn uplink(&self, observed: &Observed, index: IfIndex, uplink: &RegisteredUplink) -> Vec<Damage> {
        let name = &uplink.name;
        let replace = |found| vec![Damage::new(DamageKind::Link, Repair::ReplaceUplink(index), found)];
        let Some(link) = observed.links.iter().find(|link| link.index == index && link.name == *name) else {
            return replace(format!("{name} is gone"));
        };
        if link.mac != Some(self.mac) || link.controller.is_some() {
            return replace(format!("{name} was changed"));
        }
        let restore = Repair::RestoreUplink(index);
        let mut damage = Vec::new();
        if let Some(found) = link_damage(link, self.mtu) {
            damage.push(Damage::new(DamageKind::Link, restore.clone(), found));
        }
        damage.extend(next_hop(observed, index, name, restore.clone()));
        for route in uplink.routes(index).filter(|route| !observed.has_route(route)) {
            damage.push(Damage::new(DamageKind::Route, restore.clone(), format!("route {route} is gone")));
        }
        damage
    }

    fn routes(&self, observed: &Observed, portal_end: IfIndex, damage: &mut Vec<Damage>) {
        let own = Route::new(identity_prefix(), GATEWAY, portal_end);
        if !observed.has_route(&own) {
            damage.push(Damage::new(DamageKind::Route, Repair::Complete, format!("route {own} is gone")));
        }
        let Some(uplinks) = self.uplinks else { return };
        let behind_uplinks: Vec<Route> =
            uplinks.iter().flat_map(|(index, uplink)| uplink.routes(*index)).collect();
        let is_desired = |route: &Route| {
            route.is_same(&own) || behind_uplinks.iter().any(|desired| desired.is_same(route))
        };
        // An uplink that an earlier agent left may be adopted later.
        let may_be_adopted = |route: &Route| {
            let link = observed.links.iter().find(|link| Some(link.index) == route.index);
            route.gateway == Some(GATEWAY)
                && route.prefix.1 == ATTACHMENT_PREFIX_LEN
                && link.is_some_and(|link| is_inner_end(&link.name))
                && !behind_uplinks.iter().any(|desired| desired.prefix == route.prefix)
        };
        for route in &observed.routes {
            if is_foreign(route) && !is_desired(route) && !may_be_adopted(route) {
                let repair = Repair::DeleteRoute(route.clone());
                damage.push(Damage::new(DamageKind::Route, repair, format!("route {route} was added")));
            }
        }
    }

    fn rules(observed: &Observed, damage: &mut Vec<Damage>) {
        let defaults = Rule::defaults();
        for rule in &defaults {
            if !observed.rules.iter().any(|found| found.is_same(rule)) {
                let repair = Repair::AddRule(rule.clone());
                damage.push(Damage::new(DamageKind::Rule, repair, format!("{rule} is gone")));
            }
        }
        for rule in &observed.rules {
            if !defaults.iter().any(|default| default.is_same(rule)) {
                let repair = Repair::DeleteRule(rule.clone());
                damage.push(Damage::new(DamageKind::Rule, repair, format!("{rule} was added")));
            }
        }
    }
}

/// Returns what is wrong with a link that must be up with this MTU, or `None` if nothing is.
pub(super) fn link_damage(link: &Link, mtu: u32) -> Option<String> {
    let name = &link.name;
    if !link.up {
        return Some(format!("{name} is down"));
    }
    (link.mtu != mtu).then(|| format!("the MTU of {name} is {}", link.mtu))
}

/// Returns the damage to the one neighbour of a link in the portal.
fn next_hop(observed: &Observed, index: IfIndex, name: &str, repair: Repair) -> Option<Damage> {
    let mac = Some(MacAddress(METADATA_MAC));
    let desired = Neighbour { index, address: GATEWAY, mac, is_permanent: true };
    let found = format!("neighbour {GATEWAY} of {name} is gone or was changed");
    (!observed.neighbours.contains(&desired)).then(|| Damage::new(DamageKind::Neighbour, repair, found))
}

/// Returns true if a route is not one of those that the kernel makes for addresses and links. None
/// of these covers an identity address.
fn is_foreign(route: &Route) -> bool {
    let (prefix, length) = identity_prefix();
    let mask = u128::MAX << (128 - u32::from(length));
    let is_within = route.prefix.1 >= length && u128::from(route.prefix.0) & mask == u128::from(prefix);
    !route.is_kernels || is_within
}

#[cfg(test)]
mod tests {
    use metadata_ebpf::identity::AttachmentId;

    use super::*;

    const MTU: u32 = 1500;
    const MAC: MacAddress = MacAddress([2, 0, 0, 0, 0, 9]);
    const UPLINK: IfIndex = IfIndex(7);

    fn link(index: u32, name: &str, peer: Option<u32>) -> Link {
        Link {
            index: IfIndex(index),
            name: name.to_owned(),
            mac: Some(MAC),
            kind: "veth".to_owned(),
            mtu: MTU,
            up: true,
            controller: None,
            peer_index: peer.map(IfIndex),
            peer_nsid: Some(0),
        }
    }

    fn uplinks() -> BTreeMap<IfIndex, RegisteredUplink> {
        let attachments = [AttachmentId::new(3).unwrap()].into();
        let uplink =
            RegisteredUplink { name: "md4026".to_owned(), attachments, ..RegisteredUplink::default() };
        [(UPLINK, uplink)].into()
    }

    /// The state of a whole portal with one uplink.
    fn whole() -> Observed {
        let neighbour = |index| Neighbour {
            index,
            address: GATEWAY,
            mac: Some(MacAddress(METADATA_MAC)),
            is_permanent: true,
        };
        let mut routes =
            vec![Route::new(identity_prefix(), GATEWAY, IfIndex(2)), Route::local_of(PORTAL_ADDRESS.into())];
        routes.extend(uplinks()[&UPLINK].routes(UPLINK));
        Observed {
            name: Name::Own,
            outer: Some(link(40, HOST_END, Some(2))),
            links: vec![link(1, "lo", None), link(2, PORTAL_END, Some(40)), link(7, "md4026", Some(3))],
            addresses: vec![(IfIndex(1), PORTAL_ADDRESS.into(), 128)],
            neighbours: [IfIndex(2), UPLINK].map(neighbour).into(),
            routes,
            rules: Rule::defaults().into(),
            sysctls: Vec::new(),
        }
    }

    fn compare(observed: &Observed) -> Vec<(DamageKind, String)> {
        let uplinks = uplinks();
        let desired = Desired { mtu: MTU, mac: MAC, unwritable: &["ipv4/x"], uplinks: Some(&uplinks) };
        desired.compare(observed).into_iter().map(|damage| (damage.kind, damage.found)).collect()
    }

    /// Returns the damage after a change of a whole portal.
    fn after(change: impl FnOnce(&mut Observed)) -> Vec<(DamageKind, String)> {
        let mut observed = whole();
        change(&mut observed);
        compare(&observed)
    }

    fn only(kind: DamageKind, found: &str) -> Vec<(DamageKind, String)> {
        vec![(kind, found.to_owned())]
    }

    #[test]
    fn a_whole_portal_has_no_damage() {
        assert_eq!(compare(&whole()), []);
    }

    #[test]
    fn each_change_of_links_is_found() {
        let outer = |change: fn(&mut Link)| after(|all| all.outer.iter_mut().for_each(change));
        assert_eq!(outer(|link| link.up = false), only(DamageKind::Link, "md-portal is down"));
        assert_eq!(outer(|link| link.mtu = 600), only(DamageKind::Link, "the MTU of md-portal is 600"));
        let controlled = "md-portal belongs to a bridge, bond or VRF";
        assert_eq!(outer(|link| link.controller = Some(IfIndex(9))), only(DamageKind::Link, controlled));
        assert_eq!(after(|all| all.outer = None), only(DamageKind::Link, "md-portal is gone"));
        let inside = |at: usize, change: fn(&mut Link)| after(|all| change(&mut all.links[at]));
        assert_eq!(inside(0, |lo| lo.up = false), only(DamageKind::Link, "lo is down"));
        let other_mac = inside(1, |link| link.mac = None);
        assert_eq!(other_mac, only(DamageKind::Link, "md0 has another MAC address"));
        assert_eq!(
            inside(1, |link| link.name = "x".to_owned()),
            only(DamageKind::Link, "md0 is gone"),
            "the rest depends on it"
        );
        assert_eq!(inside(2, |link| link.up = false), only(DamageKind::Link, "md4026 is down"));
        assert_eq!(inside(2, |link| link.mac = None), only(DamageKind::Link, "md4026 was changed"));
    }

    #[test]
    fn each_change_of_addresses_and_neighbours_is_found() {
        let gone = after(|all| all.addresses.clear());
        assert_eq!(gone, only(DamageKind::Address, "fd6d::a9fe:a9fe is gone"));
        let local = after(|all| drop(all.routes.remove(1)));
        assert_eq!(local, only(DamageKind::Route, "the local route of fd6d::a9fe:a9fe is gone"));
        for (at, name) in [(0, "md0"), (1, "md4026")] {
            let found = after(|all| all.neighbours[at].mac = None);
            assert_eq!(found.len(), 1, "{found:?}");
            assert_eq!(found[0].0, DamageKind::Neighbour);
            assert!(found[0].1.contains(name), "{found:?}");
        }
    }

    #[test]
    fn missing_and_foreign_routes_are_found() {
        let base = after(|all| drop(all.routes.remove(0)));
        assert_eq!(base, only(DamageKind::Route, "route fd64::/14 via fe80::1 dev 2 is gone"));
        assert_eq!(after(|all| drop(all.routes.pop())).len(), 1, "a route of an uplink");
        let guests = (Ipv6Addr::new(0xfd64, 0, 3, 0, 0, 0, 0, 0), ATTACHMENT_PREFIX_LEN);
        let foreign = Route::new(guests, GATEWAY, IfIndex(2));
        let found = after(|all| all.routes.push(foreign.clone()));
        assert_eq!(found, only(DamageKind::Route, &format!("route {foreign} was added")));
    }

    #[test]
    fn routes_of_an_earlier_agents_uplink_are_left_alone() {
        let left = after(|all| {
            all.links.push(link(8, "md4027", Some(3)));
            let prefix = (Ipv6Addr::new(0xfd64, 0, 9, 0, 0, 0, 0, 0), ATTACHMENT_PREFIX_LEN);
            all.routes.push(Route::new(prefix, GATEWAY, IfIndex(8)));
        });
        assert_eq!(left, []);
    }

    #[test]
    fn uplinks_are_not_compared_while_they_change() {
        let mut observed = whole();
        observed.links.pop();
        let desired = Desired { mtu: MTU, mac: MAC, unwritable: &[], uplinks: None };
        assert_eq!(desired.compare(&observed), []);
    }

    #[test]
    fn rules_sysctls_and_the_name_are_compared() {
        let gone = after(|all| drop(all.rules.pop()));
        assert_eq!(gone, only(DamageKind::Rule, "rule 32766 is gone"));
        let wrong = |name, is_required| WrongSysctl { name, found: "1".to_owned(), want: "0", is_required };
        let found = after(|all| all.sysctls.push(wrong("ipv6/x", true)));
        assert_eq!(found, only(DamageKind::Sysctl, "net.ipv6/x is 1"));
        assert_eq!(after(|all| all.sysctls.push(wrong("ipv4/x", false))), [], "it cannot be written");
        let name = after(|all| all.name = Name::Others);
        assert_eq!(name, only(DamageKind::Namespace, "another namespace has the portal's name"));
    }
}
