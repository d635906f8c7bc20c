//! Whose requests Neutron's haproxies pass on: [`InventoryLookup`], as far as the inventory of this host tells, which knows ports
//! by network and address, but no router, and no port of another host; and [`NeutronLookup`], as Neutron tells, for a guest
//! of another host whose router, or whose DHCP server, is on this one.
//!
//! The local look-up has an index of its own, made of a snapshot when the first caller comes after it, so that nobody else pays
//! for it.

use std::collections::HashMap;
use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::sync::watch;

use crate::directory::Owner;
use crate::ids::{NetworkId, NetworkOrRouter};
use crate::inventory::{Entry, Inventory, Port, Snapshot};
use crate::proxy::{self, ClientQuery, LookupOutcome, PortMatch, UpstreamAuth};
use crate::sources::SourceState;
use crate::sources::neutron::{self, Lookup, LookupQuery, LookupResult, PortSelector};

/// The ports of this host, by where haproxies meet them.
#[derive(Debug)]
pub struct InventoryLookup {
    inventory: Arc<Inventory>,
    sources: Vec<watch::Receiver<SourceState>>,
    introduction: UpstreamAuth,
    index: ArcSwap<Index>,
}

impl InventoryLookup {
    /// Looks into the inventory, which is complete once all sources are ready.
    #[must_use]
    pub fn new(
        inventory: Arc<Inventory>,
        sources: Vec<watch::Receiver<SourceState>>,
        introduction: UpstreamAuth,
    ) -> Self {
        Self { inventory, sources, introduction, index: ArcSwap::default() }
    }

    /// What the index of the present snapshot has.
    fn entries(&self, network: NetworkId, caller: &ClientQuery) -> Vec<Entry> {
        let snapshot = self.inventory.load();
        let mut index = self.index.load_full();
        if index.version != snapshot.version() {
            index = Arc::new(Index::of(&snapshot));
            self.index.store(Arc::clone(&index));
        }
        caller.mark().and_then(|mark| index.entries.get(&(network, mark)).cloned()).unwrap_or_default()
    }

    /// Nobody is there, or is not told of yet.
    fn absent(&self) -> LookupOutcome {
        let complete = self.sources.iter().all(|source| source.borrow().ready);
        if complete { LookupOutcome::NotFound } else { LookupOutcome::Unavailable }
    }
}

impl proxy::ClientLookup for InventoryLookup {
    fn find(&self, caller: &ClientQuery) -> impl Future<Output = LookupOutcome> + Send {
        let found = match caller.scope {
            NetworkOrRouter::Router(router) => {
                tracing::debug!(%router, "no source knows the networks of a router");
                self.absent()
            }
            NetworkOrRouter::Network(network) => match self.entries(network, caller).as_slice() {
                [] => self.absent(),
                [Entry::NoInstance(_)] => LookupOutcome::NotAnInstance,
                [entry] => match Owner::from_entry(entry, &self.introduction).identity() {
                    Some(identity) => LookupOutcome::Identified(Arc::clone(identity)),
                    None => LookupOutcome::Unavailable,
                },
                [_, _, ..] => LookupOutcome::Ambiguous,
            },
        };
        std::future::ready(found)
    }
}

/// The ports that Neutron knows, wherever they are.
#[derive(Debug)]
pub struct NeutronLookup {
    lookup: Lookup,
    introduction: UpstreamAuth,
}

impl NeutronLookup {
    /// Asks by this look-up.
    #[must_use]
    pub fn new(lookup: Lookup, introduction: UpstreamAuth) -> Self {
        Self { lookup, introduction }
    }

    /// As Neutron's agent does it, the project is the port's.
    fn found(&self, found: &neutron::InstancePort) -> LookupOutcome {
        let port = Port {
            id: Some(found.port),
            device: None,
            instance: found.instance,
            project: found.project.clone(),
            network: Some(found.network),
            mac: None,
            fixed_ips: found.fixed_ips.clone(),
            allowed_addresses: Vec::new(),
        };
        match Owner::from_entry(&Entry::Agreed(Arc::new(port)), &self.introduction).identity() {
            Some(identity) => LookupOutcome::Identified(Arc::clone(identity)),
            None => LookupOutcome::Unavailable,
        }
    }
}

impl proxy::ClientLookup for NeutronLookup {
    async fn find(&self, caller: &ClientQuery) -> LookupOutcome {
        let target = match caller.mark() {
            Some(PortMatch::Address(address)) => PortSelector::Ip(address, caller.mac),
            Some(PortMatch::Mac(mac)) => PortSelector::Mac(mac),
            None => return LookupOutcome::NotFound,
        };
        match self.lookup.find(LookupQuery { scope: caller.scope, target }).await {
            Ok(LookupResult::Instance(found)) => self.found(&found),
            Ok(LookupResult::NotAnInstance) => LookupOutcome::NotAnInstance,
            Ok(LookupResult::NotFound) => LookupOutcome::NotFound,
            Ok(LookupResult::Ambiguous) => LookupOutcome::Ambiguous,
            Err(error) => {
                tracing::debug!(%error, "Neutron cannot tell who asks");
                LookupOutcome::Unavailable
            }
        }
    }
}

/// As much as can be known on this host.
#[derive(Debug)]
pub enum HostLookup {
    /// Without Neutron.
    Local(InventoryLookup),
    /// With Neutron, which is asked of whomever this host does not know.
    Anywhere((InventoryLookup, NeutronLookup)),
}

impl proxy::ClientLookup for HostLookup {
    async fn find(&self, caller: &ClientQuery) -> LookupOutcome {
        match self {
            Self::Local(local) => local.find(caller).await,
            Self::Anywhere(both) => both.find(caller).await,
        }
    }
}

/// The ports of one snapshot. A disputed one has no address that could be believed.
#[derive(Debug, Default)]
struct Index {
    version: u64,
    entries: HashMap<(NetworkId, PortMatch), Vec<Entry>>,
}

impl Index {
    fn of(snapshot: &Snapshot) -> Self {
        let mut index = Self { version: snapshot.version(), entries: HashMap::new() };
        for entry in snapshot.unordered() {
            let (network, mac, addresses) = match entry {
                Entry::Agreed(port) => (port.network, port.mac, &port.fixed_ips),
                Entry::Incomplete(facts) | Entry::NoInstance(facts) => {
                    (facts.network, facts.mac, &facts.fixed_ips)
                }
                Entry::Disputed(_) => continue,
            };
            let Some(network) = network else { continue };
            let addresses = addresses.iter().copied().map(PortMatch::Address);
            for mark in addresses.chain(mac.map(PortMatch::Mac)) {
                index.entries.entry((network, mark)).or_default().push(entry.clone());
            }
        }
        index
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inventory::{DeviceOwner, Event, PortRecord, SourceKind};
    use crate::proxy::{ClientLookup as _, NetworkHeader, Signer};
    use crate::sources::Reporter;
    use tokio::sync::mpsc;
    use tokio_util::sync::CancellationToken;

    const RED: &str = "11111111-1111-4111-8111-111111111111";
    const BLUE: &str = "22222222-2222-4222-8222-222222222222";
    const MAC: &str = "fa:16:3e:00:00:01";
    const LINK_LOCAL: &str = "fe80::f816:3eff:fe00:1";

    fn port(number: u8, network: &str, address: &str) -> Port {
        Port {
            id: Some(format!("0000000{number}-0000-4000-8000-000000000000").parse().unwrap()),
            device: None,
            instance: format!("{number}0000000-0000-4000-8000-000000000000").parse().unwrap(),
            project: "acme".parse().unwrap(),
            network: Some(network.parse().unwrap()),
            mac: None,
            fixed_ips: vec![address.parse().unwrap()],
            allowed_addresses: Vec::new(),
        }
    }

    async fn callers(ports: Vec<PortRecord>, introduction: UpstreamAuth) -> InventoryLookup {
        let (inventory, publisher) = Inventory::new();
        let (events, queue) = mpsc::channel(1);
        let event = Event { source: SourceKind::StaticFile, key: "f".to_owned(), ports };
        events.send(event).await.unwrap();
        drop(events);
        publisher.run(queue, CancellationToken::new()).await;
        InventoryLookup::new(inventory, Vec::new(), introduction)
    }

    async fn signed(ports: impl IntoIterator<Item = PortRecord>) -> InventoryLookup {
        callers(ports.into_iter().collect(), UpstreamAuth::Signed(Signer::new("secret".into()))).await
    }

    async fn found(callers: &InventoryLookup, network: &str, address: &str) -> String {
        let scope = NetworkOrRouter::Network(network.parse().unwrap());
        match callers.find(&ClientQuery { scope, address: address.parse().unwrap(), mac: None }).await {
            LookupOutcome::Identified(identity) => {
                identity.instance().map_or("network".to_owned(), |id| id.to_string())
            }
            nobody @ (LookupOutcome::NotFound
            | LookupOutcome::Ambiguous
            | LookupOutcome::NotAnInstance
            | LookupOutcome::Unavailable) => {
                format!("{nobody:?}")
            }
        }
    }

    #[tokio::test]
    async fn two_ports_with_one_address_are_told_apart_by_their_networks() {
        let red = Port { mac: Some(MAC.parse().unwrap()), ..port(1, RED, "10.0.0.5") };
        let blue = port(2, BLUE, "10.0.0.5");
        let callers = signed([red.clone().into(), blue.clone().into()]).await;
        assert_eq!(found(&callers, RED, "10.0.0.5").await, red.instance.to_string());
        assert_eq!(found(&callers, BLUE, "10.0.0.5").await, blue.instance.to_string());
        assert_eq!(found(&callers, RED, LINK_LOCAL).await, red.instance.to_string());
        for (network, address) in [(BLUE, LINK_LOCAL), (RED, "10.0.0.6"), (RED, "fe80::1")] {
            assert_eq!(found(&callers, network, address).await, "NotFound", "{network} {address}");
        }
    }

    #[tokio::test]
    async fn neither_two_of_a_kind_nor_half_a_port_is_guessed() {
        let twice = [port(1, RED, "10.0.0.5").into(), port(2, RED, "10.0.0.5").into()];
        assert_eq!(found(&signed(twice).await, RED, "10.0.0.5").await, "Ambiguous");
        let half = PortRecord { tenant: None, ..port(1, RED, "10.0.0.5").into() };
        assert_eq!(found(&signed([half.clone()]).await, RED, "10.0.0.5").await, "Unavailable");
        let router = PortRecord { device_owner: DeviceOwner::new("network:dhcp"), ..half.clone() };
        assert_eq!(found(&signed([router]).await, RED, "10.0.0.5").await, "NotAnInstance");
        let forwarded = callers(vec![half], UpstreamAuth::ByNetwork(NetworkHeader::Neutron)).await;
        assert_eq!(found(&forwarded, RED, "10.0.0.5").await, "network");
    }

    #[tokio::test]
    async fn nobody_is_an_answer_only_once_all_sources_have_spoken() {
        let mut callers = signed([]).await;
        let (_reporter, state) = Reporter::new(SourceKind::Libvirt);
        callers.sources.push(state);
        assert_eq!(found(&callers, RED, "10.0.0.5").await, "Unavailable");
        callers.sources.clear();
        assert_eq!(found(&callers, RED, "10.0.0.5").await, "NotFound");
        let router = NetworkOrRouter::Router(RED.parse().unwrap());
        let caller = ClientQuery { scope: router, address: "10.0.0.5".parse().unwrap(), mac: None };
        assert!(matches!(callers.find(&caller).await, LookupOutcome::NotFound));
    }
}
