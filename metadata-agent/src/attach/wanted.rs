//! Decides which interfaces to attach, and with which policy.
//!
//! The host and the other namespaces differ only here. On the host, a tap leads to one
//! guest, and the inventory knows its port. In the namespace of a router or a DHCP server, all
//! guests of a network share an interface: the namespace owns the addresses, and a guest is
//! identified by its own.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::Arc;

use metadata_ebpf::abi::MAX_PORT_SOURCES;
use tracing::warn;

use super::agent_veths::AgentVeths;
use super::changes::Links;
use crate::datapath::{PortPolicy, SourceRule};
use crate::directory::{Owner, UpstreamAuth};
use crate::ids::{IfIndex, NetworkId, NetworkOrRouter, VlanId};
use crate::inventory::presence::Present;
use crate::inventory::{
    AmbiguousPortError, Entry, Inventory, Port, PortRecord, Snapshot, SourcePolicy, Subport,
};
use crate::net::name_pattern::NamePattern;
use crate::net::netlink::{Link, Netlink};
use crate::net::probe_pair::ProbeInterface;

/// The prefix of a router's interfaces to its networks (neutron/agent/l3/router_info.py,
/// `INTERNAL_DEV_PREFIX`).
const ROUTER_INTERFACE: &str = "qr-";
/// The prefixes of a DHCP server's interface: an internal port of Open vSwitch, or one end of a
/// veth pair with Linux bridge or `ovs_use_veth` (neutron/agent/linux/interface.py,
/// `DEV_NAME_PREFIX`).
const DHCP_INTERFACES: [&str; 2] = ["tap", "ns-"];

/// The interfaces that should be attached in one namespace. Judges each link by the newest
/// inventory.
#[derive(Clone, Copy)]
pub(crate) enum Wanted<'a> {
    HostTaps(&'a HostTaps),
    NamespacePorts(&'a NamespacePorts),
}

/// The way a link should be treated.
#[derive(Debug)]
pub(super) enum Target {
    /// To be attached.
    Attach(Box<AttachSpec>),
    /// Not an instance's port: its packets take the host's own path.
    Bypass(Option<Present>),
    /// Not a guest interface.
    Ignore,
}

/// The specification of an attachment: its policy, clients and subports.
#[derive(Clone, Debug)]
pub(super) struct AttachSpec {
    pub(super) clients: Clients,
    pub(super) policy: PortPolicy,
    pub(super) subports: BTreeMap<VlanId, (Owner, PortPolicy)>,
    pub(super) present: Option<Present>,
    /// The reason why some guests behind the interface are not served.
    pub(super) unserved_subnets: Option<String>,
}

/// The clients behind an attached interface.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Clients {
    /// One guest.
    One(Owner),
    /// The guests of a network, or of a router with all its networks.
    Shared(NetworkOrRouter),
    /// The agent itself, which sends requests through the datapath.
    Agent,
}

impl Clients {
    /// Returns the clients behind an interface after a change. Its network stays known although no
    /// source reports it any more: a router's interface never moves to another network.
    pub(super) fn changed_to(&self, next: Self) -> Self {
        match (self, &next) {
            (Self::Shared(NetworkOrRouter::Network(_)), Self::Shared(NetworkOrRouter::Router(_))) => {
                self.clone()
            }
            _ => next,
        }
    }
}

impl Wanted<'_> {
    pub(super) fn target(self, link: &Link) -> Target {
        match self {
            Self::HostTaps(taps) => taps.target(link),
            Self::NamespacePorts(ports) => ports.target(link),
        }
    }

    /// Returns the entry of a link in presence, if it is a guest interface of the host.
    pub(super) fn present(self, link: &Link) -> Option<Present> {
        match self.target(link) {
            Target::Attach(spec) => spec.present,
            Target::Bypass(present) => present,
            Target::Ignore => None,
        }
    }
}

/// A kind of network interface, as `ip -details link` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LinkKind {
    /// A tap of a virtual machine.
    Tun,
    /// One end of a pair, as containers have.
    Veth,
}

impl LinkKind {
    fn as_str(self) -> &'static str {
        match self {
            Self::Tun => "tun",
            Self::Veth => "veth",
        }
    }
}

/// How strictly the source of a guest's packets is compared with its port's [`SourcePolicy`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SourceCheck {
    /// The pair of MAC address and IPv4 address must be allowed.
    Strict,
    /// The MAC address must be allowed, with any address.
    Mac,
    Off,
}

/// The guest interfaces of the host, and the checks of their packets.
#[derive(Clone, Debug)]
pub(crate) struct GuestRules {
    /// Patterns of interface names.
    pub names: Vec<NamePattern>,
    /// Kinds of links. A virtual machine's `tap*` is a tun; OVN's and the DHCP agent's are veths or
    /// internal ports.
    pub kinds: Vec<LinkKind>,
    /// The parts of a packet's source that must be the port's own.
    pub source_check: SourceCheck,
}

impl GuestRules {
    /// Returns whether a link is a guest interface.
    fn admit(&self, link: &Link) -> bool {
        let kind = self.kinds.iter().any(|kind| kind.as_str() == link.kind);
        kind && self.names.iter().any(|pattern| pattern.matches(&link.name))
    }

    /// Returns the checks of a port. Without a source that states all that it may send from, its
    /// packets are not checked.
    fn policy(&self, owner: &Owner) -> PortPolicy {
        let Some(addressing) = owner.addressing() else { return PortPolicy::default() };
        let sources = match (self.source_check, addressing.source_policy()) {
            (SourceCheck::Off, _) | (_, SourcePolicy::Any) => SourceRule::Any,
            (SourceCheck::Strict, SourcePolicy::Only(sources)) => {
                SourceRule::Pairs(sources.into_iter().collect())
            }
            (SourceCheck::Mac, SourcePolicy::Only(sources)) => {
                let macs: BTreeSet<_> = sources.into_iter().map(|source| source.mac).collect();
                SourceRule::Macs(macs.into_iter().collect())
            }
        };
        PortPolicy { network: addressing.network, sources, confined: false }
    }
}

/// Taps on the host, with one guest each.
pub(crate) struct HostTaps {
    rules: GuestRules,
    inventory: Arc<Inventory>,
    auth: UpstreamAuth,
    agent_veths: AgentVeths,
    /// The agent's own interface, which no rule has to admit.
    probe: ProbeInterface,
}

impl HostTaps {
    pub(super) fn new(
        rules: GuestRules,
        inventory: Arc<Inventory>,
        auth: UpstreamAuth,
        probe: ProbeInterface,
    ) -> Self {
        Self { rules, inventory, auth, agent_veths: AgentVeths::default(), probe }
    }

    /// Finds out which of these links belong to Neutron's agents. Must precede a reconcile with
    /// them.
    pub(super) async fn observe(&mut self, netlink: &Netlink, links: &Links) {
        let rules = &self.rules;
        self.agent_veths.observe(netlink, links, |link| rules.admit(link)).await;
    }

    fn target(&self, link: &Link) -> Target {
        if self.probe.is(link) {
            return Target::Attach(Box::new(AttachSpec {
                clients: Clients::Agent,
                policy: PortPolicy::default(),
                subports: BTreeMap::new(),
                present: None,
                unserved_subnets: None,
            }));
        }
        if !self.rules.admit(link) || self.agent_veths.contains(link) {
            return Target::Ignore;
        }
        self.spec(link, &self.inventory.load())
    }

    fn spec(&self, link: &Link, snapshot: &Snapshot) -> Target {
        let device = link.name.parse().ok();
        let present = device.map(|device| Present::from_snapshot(device, link.index, link.mac, snapshot));
        let owner = match snapshot.find_at(&link.name, link.index, link.mac) {
            Ok(Some(Entry::NoInstance(_))) => return Target::Bypass(present),
            Ok(Some(entry)) => Owner::from_entry(entry, self.auth),
            Ok(None) => Owner::Unknown,
            Err(AmbiguousPortError) => Owner::Disputed,
        };
        let subports = owner.port_id().and_then(|port| snapshot.subports(&port));
        let subports = subports.map_or(&[][..], |subports| subports).iter().filter_map(|subport| {
            let owner = Owner::from_entry(&subport_entry(&owner, subport)?, self.auth);
            let policy = self.rules.policy(&owner);
            Some((subport.vlan, (owner, policy)))
        });
        Target::Attach(Box::new(AttachSpec {
            subports: subports.collect(),
            policy: self.rules.policy(&owner),
            clients: Clients::One(owner),
            present,
            unserved_subnets: None,
        }))
    }
}

/// Returns a subport as a port of its parent's instance, if that is known.
fn subport_entry(parent: &Owner, subport: &Subport) -> Option<Entry> {
    let Subport { id, addressing, .. } = subport.clone();
    match parent {
        Owner::Known(port) => {
            let Port { device, instance, project, .. } = Port::clone(port);
            Some(Entry::Agreed(Arc::new(Port { id, device, instance, project, addressing })))
        }
        Owner::OnNetwork(_) => {
            let record = PortRecord { id, addressing, ..PortRecord::default() };
            Some(Entry::Incomplete(Arc::new(record)))
        }
        Owner::Unknown | Owner::Disputed => None,
    }
}

/// Ports of a router or a DHCP server, in its namespace. The guests of a network share each of
/// them.
///
/// Guests may send from the subnets in which the interface itself has an address, so a guest of one
/// network cannot pass for a guest of another network of the same router.
pub(crate) struct NamespacePorts {
    /// The router or network whose addresses the guests have.
    pub(crate) scope: NetworkOrRouter,
    /// Drops packets while no legacy metadata path listens in the namespace.
    pub(crate) confined: bool,
    /// The IPv4 addresses of the namespace's interfaces, with their prefix lengths.
    pub(crate) addresses: Vec<(IfIndex, Ipv4Addr, u8)>,
    pub(crate) inventory: Arc<Inventory>,
}

impl NamespacePorts {
    /// The prefixes of the interfaces that guests are behind.
    pub(crate) fn interface_prefixes(&self) -> &'static [&'static str] {
        match self.scope {
            NetworkOrRouter::Router(_) => &[ROUTER_INTERFACE],
            NetworkOrRouter::Network(_) => &DHCP_INTERFACES,
        }
    }

    /// Returns true for an interface that guests are behind.
    pub(crate) fn includes(&self, link: &Link) -> bool {
        self.interface_prefixes().iter().any(|prefix| link.name.starts_with(prefix))
    }

    fn target(&self, link: &Link) -> Target {
        if !self.includes(link) {
            return Target::Ignore;
        }
        let subnets = self.subnets(link);
        let unserved_subnets = (subnets.len() > MAX_PORT_SOURCES).then(|| {
            let (interface, count) = (&link.name, subnets.len());
            format!("{interface} is in {count} IPv4 subnets; those beyond {MAX_PORT_SOURCES} are not served")
        });
        let network = match self.scope {
            NetworkOrRouter::Network(network) => Some(network),
            NetworkOrRouter::Router(_) => None,
        };
        let policy = PortPolicy { network, sources: SourceRule::Subnets(subnets), confined: self.confined };
        Target::Attach(Box::new(AttachSpec {
            clients: Clients::Shared(self.scope_of(link)),
            policy,
            subports: BTreeMap::new(),
            present: None,
            unserved_subnets,
        }))
    }

    /// Returns the subnets of an interface's own addresses. The metadata service's own address,
    /// which the interface of a DHCP server has, is not one of them.
    fn subnets(&self, link: &Link) -> Vec<(Ipv4Addr, u8)> {
        let own = self.addresses.iter();
        let own = own.filter(|(index, address, _)| *index == link.index && !address.is_link_local());
        own.map(|(_, address, len)| (*address, *len)).collect()
    }

    /// Returns the network of an interface, if a source knows it, or else the router.
    fn scope_of(&self, link: &Link) -> NetworkOrRouter {
        let network = self.scope.is_router().then(|| network_of(link, &self.inventory.load())).flatten();
        network.map_or(self.scope, NetworkOrRouter::Network)
    }
}

fn network_of(link: &Link, snapshot: &Snapshot) -> Option<NetworkId> {
    let entry = snapshot.find(&link.name, link.mac).ok()??;
    if let Entry::Disputed(_) = entry {
        warn!(interface = link.name, "sources disagree about this router port");
    }
    entry.addressing()?.network
}

#[cfg(test)]
mod tests {
    use super::*;

    const NETWORK: &str = "11111111-1111-4111-8111-111111111111";

    fn link(index: u32, name: &str, kind: &str) -> Link {
        Link {
            index: IfIndex(index),
            name: name.to_owned(),
            mac: None,
            kind: kind.to_owned(),
            mtu: 1500,
            up: true,
            controller: None,
            peer_index: None,
            peer_nsid: None,
        }
    }

    fn dhcp_port(addresses: &[(u32, [u8; 4], u8)]) -> NamespacePorts {
        let address = |(index, address, len): &(u32, [u8; 4], u8)| (IfIndex(*index), (*address).into(), *len);
        NamespacePorts {
            scope: NetworkOrRouter::Network(NETWORK.parse().unwrap()),
            confined: false,
            addresses: addresses.iter().map(address).collect(),
            inventory: Inventory::new().0,
        }
    }

    fn spec(target: Target) -> AttachSpec {
        let Target::Attach(spec) = target else { panic!("not to be attached: {target:?}") };
        *spec
    }

    #[test]
    fn guests_may_send_from_the_subnets_of_their_interface_only() {
        let ports =
            dhcp_port(&[(2, [10, 0, 0, 2], 24), (2, [169, 254, 169, 254], 16), (3, [10, 1, 0, 2], 24)]);
        let AttachSpec { policy, clients, unserved_subnets, .. } = spec(ports.target(&link(2, "tap1", "")));
        assert_eq!(policy.sources, SourceRule::Subnets(vec![([10, 0, 0, 2].into(), 24)]));
        assert!(policy.is_shared() && policy.network.is_some());
        assert_eq!(clients, Clients::Shared(ports.scope));
        assert_eq!(unserved_subnets, None);
        assert!(matches!(ports.target(&link(2, "ns-1", "veth")), Target::Attach(_)), "of Linux bridge");
        assert!(matches!(ports.target(&link(2, "qr-1", "")), Target::Ignore), "not a DHCP server's");
    }

    #[test]
    fn an_interface_in_too_many_subnets_reports_its_shortfall() {
        let most = u8::try_from(MAX_PORT_SOURCES).unwrap();
        for (count, is_short) in [(most, false), (most + 1, true)] {
            let addresses: Vec<_> = (0..count).map(|third| (2, [10, 0, third, 1], 24)).collect();
            let spec = spec(dhcp_port(&addresses).target(&link(2, "tap1", "")));
            assert_eq!(spec.unserved_subnets.is_some(), is_short, "{count}");
        }
    }

    #[test]
    fn the_network_of_a_routers_interface_stays_known() {
        let id = NETWORK.parse().unwrap();
        let [network, router] =
            [NetworkOrRouter::Network(id), NetworkOrRouter::Router(NETWORK.parse().unwrap())]
                .map(Clients::Shared);
        let other = NetworkOrRouter::Network("22222222-2222-4222-8222-222222222222".parse().unwrap());
        assert_eq!(network.changed_to(router.clone()), network);
        assert_eq!(router.changed_to(network.clone()), network);
        assert_eq!(network.changed_to(Clients::Shared(other)), Clients::Shared(other));
        assert_eq!(router.changed_to(router.clone()), router);
    }

    #[test]
    fn a_tap_of_an_unknown_port_is_attached_without_checks() {
        let rules = GuestRules {
            names: vec![NamePattern::parse("tap*").unwrap()],
            kinds: vec![LinkKind::Tun],
            source_check: SourceCheck::Strict,
        };
        let auth = UpstreamAuth::ByNetwork(crate::proxy::NetworkHeader::Neutron);
        let taps = HostTaps::new(rules, Inventory::new().0, auth, ProbeInterface::channel().1);
        let spec = spec(taps.target(&link(5, "tap1", "tun")));
        assert_eq!((spec.clients, spec.policy), (Clients::One(Owner::Unknown), PortPolicy::default()));
        assert!(spec.present.is_some() && spec.subports.is_empty());
        for (name, kind) in [("tap1", "veth"), ("qvo1", "tun")] {
            assert!(matches!(taps.target(&link(5, name, kind)), Target::Ignore), "{name} {kind}");
        }
    }
}
