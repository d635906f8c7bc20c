//! Finds clients by network or router and by address: those of haproxies, and guests behind a
//! shared attachment.
//!
//! [`InventoryLookup`] knows the ports of this host by network and address. It knows neither
//! routers nor ports of other hosts. [`NeutronLookup`] asks Neutron about those: the router or DHCP
//! server of a guest on another host may be on this one.
//!
//! An address may have moved to another port since a source reported it, so an address alone
//! identifies a port of the inventory only if its source follows such changes. Otherwise the MAC
//! address that the kernel saw must be the port's too (`docs/design/address-and-mac.md`).
//!
//! A source may lose a port for a moment. The guest was up for days and takes a quick 404 for the
//! end of the service, so its look-ups are unavailable for the grace first, as on a tap.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tokio::sync::watch;

use crate::directory::{Credentials, Owner};
use crate::ids::{NetworkId, NetworkOrRouter};
use crate::inventory::{Entry, Inventory, Port, PortAddressing, Snapshot, SourceKind};
use crate::proxy::{ClientLookup, ClientQuery, LookupFuture, LookupOutcome, PortMatch};
use crate::sources::SourceState;
use crate::sources::neutron::{self, Lookup, LookupQuery, LookupResult, PortSelector};

/// All look-ups that this host can make.
#[derive(Debug)]
pub(crate) struct HostLookup {
    pub inventory: InventoryLookup,
    /// Asked about clients that the inventory does not know.
    pub neutron: Option<NeutronLookup>,
}

impl ClientLookup for HostLookup {
    fn find<'a>(&'a self, query: &'a ClientQuery) -> LookupFuture<'a> {
        Box::pin(async move {
            let local = self.inventory.find(query);
            match &self.neutron {
                Some(neutron) => local.or_else(|| neutron.find(query)).await,
                None => local,
            }
        })
    }
}

/// Finds ports of this host.
#[derive(Debug)]
pub(crate) struct InventoryLookup {
    inventory: Arc<Inventory>,
    sources: Vec<watch::Receiver<SourceState>>,
    credentials: Credentials,
    /// Time after a loss in which a port may come back.
    grace: Duration,
    /// Built from a snapshot by the first look-up after it, so that it costs nothing else.
    index: ArcSwap<Index>,
}

impl InventoryLookup {
    /// Creates a look-up in an inventory that is complete once all `sources` are ready.
    #[must_use]
    pub(crate) fn new(
        inventory: Arc<Inventory>,
        sources: Vec<watch::Receiver<SourceState>>,
        credentials: Credentials,
        grace: Duration,
    ) -> Self {
        Self { inventory, sources, credentials, grace, index: ArcSwap::default() }
    }

    fn find(&self, query: &ClientQuery) -> LookupOutcome {
        let network = match query.scope {
            NetworkOrRouter::Router(router) => {
                tracing::debug!(%router, "the inventory does not know the networks of a router");
                return self.not_found();
            }
            NetworkOrRouter::Network(network) => network,
        };
        let index = self.index();
        match index.found(network, query).as_slice() {
            [] if index.was_lost(network, query, self.grace) => LookupOutcome::Unavailable,
            [] => self.not_found(),
            [Entry::NoInstance(_)] => LookupOutcome::NotAnInstance,
            [entry] => outcome(entry, &self.credentials),
            [_, _, ..] => LookupOutcome::Ambiguous,
        }
    }

    /// Returns the index of the present snapshot.
    fn index(&self) -> Arc<Index> {
        let snapshot = self.inventory.load();
        let index = self.index.load_full();
        if index.version == snapshot.version() {
            return index;
        }
        let index = Arc::new(Index::from_snapshot(&snapshot, &index, self.grace));
        self.index.store(Arc::clone(&index));
        index
    }

    /// A port that is missing may still be reported by a source that is not ready.
    fn not_found(&self) -> LookupOutcome {
        let complete = self.sources.iter().all(|source| source.borrow().ready);
        if complete { LookupOutcome::NotFound } else { LookupOutcome::Unavailable }
    }
}

/// Returns true if the match of a port and a client is more than an address that may be outdated.
fn is_evident(port: &PortAddressing, query: &ClientQuery) -> bool {
    match (query.mac, query.port_match()) {
        (Some(seen), _) => port.mac == Some(seen),
        // A link-local address names the port by its MAC address, which does not move.
        (None, Some(PortMatch::Mac(_))) => true,
        (None, Some(PortMatch::Address(_))) => port.follows_changes(),
        (None, None) => false,
    }
}

/// Finds ports of any host, by a query to Neutron.
#[derive(Debug)]
pub(crate) struct NeutronLookup {
    lookup: Lookup,
    credentials: Credentials,
}

impl NeutronLookup {
    #[must_use]
    pub(crate) fn new(lookup: Lookup, credentials: Credentials) -> Self {
        Self { lookup, credentials }
    }

    async fn find(&self, query: &ClientQuery) -> LookupOutcome {
        let target = match query.port_match() {
            Some(PortMatch::Address(address)) => PortSelector::Ip(address, query.mac),
            Some(PortMatch::Mac(mac)) => PortSelector::Mac(mac),
            None => return LookupOutcome::NotFound,
        };
        match self.lookup.find(LookupQuery { scope: query.scope, target }).await {
            Ok(LookupResult::Instance(found)) => self.identify(&found),
            Ok(LookupResult::NotAnInstance) => LookupOutcome::NotAnInstance,
            Ok(LookupResult::NotFound) => LookupOutcome::NotFound,
            Ok(LookupResult::Ambiguous) => LookupOutcome::Ambiguous,
            Err(error) => {
                tracing::debug!(%error, "client look-up in Neutron failed");
                LookupOutcome::Unavailable
            }
        }
    }

    /// Uses the project of the port, as Neutron's metadata agent does.
    fn identify(&self, found: &neutron::InstancePort) -> LookupOutcome {
        let port = Port {
            id: Some(found.port),
            device: None,
            instance: found.instance,
            project: found.project.clone(),
            addressing: PortAddressing {
                network: Some(found.network),
                mac: found.mac,
                fixed_ips: found.fixed_ips.clone(),
                fixed_ips_source: Some(SourceKind::Neutron),
                ..PortAddressing::default()
            },
        };
        outcome(&Entry::Agreed(Arc::new(port)), &self.credentials)
    }
}

fn outcome(entry: &Entry, credentials: &Credentials) -> LookupOutcome {
    match credentials.identity(&Owner::from_entry(entry, credentials.auth())) {
        Some(identity) => LookupOutcome::Identified(identity),
        None => LookupOutcome::Unavailable,
    }
}

/// The ports of one snapshot, without disputed ones, whose addresses are not trustworthy.
#[derive(Debug, Default)]
struct Index {
    version: u64,
    entries: HashMap<IndexKey, Vec<Entry>>,
    /// Entries of earlier snapshots that this one lacks.
    lost: HashMap<IndexKey, LostEntries>,
}

type IndexKey = (NetworkId, PortMatch);

#[derive(Clone, Debug)]
struct LostEntries {
    since: Instant,
    entries: Vec<Entry>,
}

impl Index {
    fn from_snapshot(snapshot: &Snapshot, before: &Self, grace: Duration) -> Self {
        let mut entries: HashMap<IndexKey, Vec<Entry>> = HashMap::new();
        for entry in snapshot.unordered() {
            let Some(PortAddressing { network: Some(network), mac, fixed_ips, .. }) = entry.addressing()
            else {
                continue;
            };
            let addresses = fixed_ips.iter().copied().map(PortMatch::Address);
            for by in addresses.chain(mac.map(PortMatch::Mac)) {
                entries.entry((*network, by)).or_default().push(entry.clone());
            }
        }
        let since = Instant::now();
        let is_missing = |key: &IndexKey| !entries.contains_key(key);
        let earlier =
            before.lost.iter().filter(|(key, lost)| is_missing(key) && lost.since.elapsed() < grace);
        let earlier = earlier.map(|(key, lost)| (*key, lost.clone()));
        let now = before.entries.iter().filter(|(key, _)| is_missing(key));
        let now = now.map(|(key, entries)| (*key, LostEntries { since, entries: entries.clone() }));
        let lost = earlier.chain(now).collect();
        Self { version: snapshot.version(), entries, lost }
    }

    /// Returns the ports that are evidently the client's.
    fn found(&self, network: NetworkId, query: &ClientQuery) -> Vec<Entry> {
        let mut entries = self.by(network, query.port_match());
        entries.retain(|entry| entry.addressing().is_some_and(|port| is_evident(port, query)));
        if entries.is_empty() && query.port_match().is_some() {
            // Without a statement of its allowed sources, the port may send from any address with
            // its MAC address. Its listed addresses may be out of date.
            entries = self.by(network, query.mac.map(PortMatch::Mac));
            entries.retain(|entry| entry.addressing().is_some_and(|port| port.allowed_sources.is_none()));
        }
        entries
    }

    fn by(&self, network: NetworkId, by: Option<PortMatch>) -> Vec<Entry> {
        by.and_then(|by| self.entries.get(&(network, by)).cloned()).unwrap_or_default()
    }

    /// Returns true if the client's port was lost within the grace.
    fn was_lost(&self, network: NetworkId, query: &ClientQuery, grace: Duration) -> bool {
        let keys = [query.port_match(), query.mac.map(PortMatch::Mac)].into_iter().flatten();
        let mut lost = keys.filter_map(|by| self.lost.get(&(network, by)));
        lost.any(|LostEntries { since, entries }| {
            let mut ports = entries.iter().filter_map(Entry::addressing);
            since.elapsed() < grace && ports.any(|port| is_evident(port, query))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inventory::{DeviceOwner, Event, PortRecord, SourcePolicy};
    use crate::proxy::NetworkHeader;
    use crate::secrets::Signer;
    use crate::sources::Reporter;
    use tokio::sync::mpsc;
    use tokio_util::sync::CancellationToken;

    const RED: &str = "11111111-1111-4111-8111-111111111111";
    const BLUE: &str = "22222222-2222-4222-8222-222222222222";
    const MAC: &str = "fa:16:3e:00:00:01";
    const LINK_LOCAL: &str = "fe80::f816:3eff:fe00:1";
    const GRACE: Duration = Duration::from_mins(2);

    fn port(number: u8, network: &str, address: &str) -> Port {
        Port {
            id: Some(format!("0000000{number}-0000-4000-8000-000000000000").parse().unwrap()),
            device: None,
            instance: format!("{number}0000000-0000-4000-8000-000000000000").parse().unwrap(),
            project: "acme".parse().unwrap(),
            addressing: PortAddressing {
                network: Some(network.parse().unwrap()),
                fixed_ips: vec![address.parse().unwrap()],
                ..PortAddressing::default()
            },
        }
    }

    async fn inventory_lookup(
        source: SourceKind,
        ports: Vec<PortRecord>,
        credentials: Credentials,
    ) -> InventoryLookup {
        let (inventory, publisher) = Inventory::new();
        let (events, queue) = mpsc::channel(1);
        events.send(Event { source, key: "f".to_owned(), ports }).await.unwrap();
        drop(events);
        publisher.run(queue, CancellationToken::new()).await;
        InventoryLookup::new(inventory, Vec::new(), credentials, GRACE)
    }

    /// Makes a look-up of ports that this source reports, for Nova.
    async fn reported(source: SourceKind, ports: impl IntoIterator<Item = PortRecord>) -> InventoryLookup {
        let credentials = Credentials::Signed(Signer::new("secret".into()));
        inventory_lookup(source, ports.into_iter().collect(), credentials).await
    }

    /// Makes a look-up of ports whose addresses are up to date.
    async fn signed(ports: impl IntoIterator<Item = PortRecord>) -> InventoryLookup {
        reported(SourceKind::OvnSouthbound, ports).await
    }

    fn found(lookup: &InventoryLookup, network: &str, address: &str) -> String {
        found_from(lookup, network, address, None)
    }

    fn found_from(lookup: &InventoryLookup, network: &str, address: &str, mac: Option<&str>) -> String {
        let scope = NetworkOrRouter::Network(network.parse().unwrap());
        let mac = mac.map(|mac| mac.parse().unwrap());
        match lookup.find(&ClientQuery { scope, address: address.parse().unwrap(), mac }) {
            LookupOutcome::Identified(identity) => {
                identity.instance().map_or("network".to_owned(), |id| id.to_string())
            }
            other @ (LookupOutcome::NotFound
            | LookupOutcome::Ambiguous
            | LookupOutcome::NotAnInstance
            | LookupOutcome::Unavailable) => format!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn ports_with_one_address_differ_by_their_networks() {
        let mut red = port(1, RED, "10.0.0.5");
        red.addressing.mac = Some(MAC.parse().unwrap());
        let blue = port(2, BLUE, "10.0.0.5");
        let lookup = signed([red.clone().into(), blue.clone().into()]).await;
        assert_eq!(found(&lookup, RED, "10.0.0.5"), red.instance.to_string());
        assert_eq!(found(&lookup, BLUE, "10.0.0.5"), blue.instance.to_string());
        assert_eq!(found(&lookup, RED, LINK_LOCAL), red.instance.to_string());
        for (network, address) in [(BLUE, LINK_LOCAL), (RED, "10.0.0.6"), (RED, "fe80::1")] {
            assert_eq!(found(&lookup, network, address), "NotFound", "{network} {address}");
        }
    }

    /// The address may belong to another port by now: only OVN reports that.
    #[tokio::test]
    async fn an_address_counts_only_with_the_mac_or_a_following_source() {
        let mut red = port(1, RED, "10.0.0.5");
        red.addressing.mac = Some(MAC.parse().unwrap());
        let own = red.instance.to_string();
        for source in SourceKind::ALL {
            let lookup = reported(*source, [red.clone().into()]).await;
            let by_address = if source.follows_addresses() { own.as_str() } else { "NotFound" };
            assert_eq!(found(&lookup, RED, "10.0.0.5"), by_address, "{source}");
            assert_eq!(found(&lookup, RED, LINK_LOCAL), own, "{source}");
            assert_eq!(found_from(&lookup, RED, "10.0.0.5", Some(MAC)), own, "{source}");
            assert_eq!(found_from(&lookup, RED, LINK_LOCAL, Some(MAC)), own, "{source}");
            for address in ["10.0.0.5", LINK_LOCAL] {
                let other = found_from(&lookup, RED, address, Some("fa:16:3e:00:00:02"));
                assert_eq!(other, "NotFound", "{source} {address}");
            }
        }
    }

    /// libvirt and Open vSwitch do not learn of another address.
    #[tokio::test]
    async fn a_changed_address_is_found_by_the_mac_if_none_is_forbidden() {
        let mut red = port(1, RED, "10.0.0.5");
        red.addressing.mac = Some(MAC.parse().unwrap());
        let mut stated = red.clone();
        let fixed = stated.addressing.fixed_ips.clone();
        stated.addressing.allowed_sources = Some(SourcePolicy::secured(MAC.parse().unwrap(), &fixed, []));
        for (port, found) in [(&red, red.instance.to_string()), (&stated, "NotFound".to_owned())] {
            let source = if found == "NotFound" { SourceKind::StaticFile } else { SourceKind::Libvirt };
            let lookup = reported(source, [port.clone().into()]).await;
            assert_eq!(found_from(&lookup, RED, "10.0.0.50", Some(MAC)), found, "{source}");
            for (network, address, mac) in [
                (RED, "10.0.0.50", None),
                (RED, "10.0.0.50", Some("fa:16:3e:00:00:02")),
                (RED, "fe80::1", Some(MAC)),
                (BLUE, "10.0.0.50", Some(MAC)),
            ] {
                assert_eq!(found_from(&lookup, network, address, mac), "NotFound", "{source} {address}");
            }
        }
    }

    #[tokio::test]
    async fn a_lost_port_is_unavailable_for_the_grace() {
        for (grace, after_loss) in [(GRACE, "Unavailable"), (Duration::ZERO, "NotFound")] {
            let (inventory, publisher) = Inventory::new();
            let (events, queue) = mpsc::channel(1);
            let run = tokio::spawn(publisher.run(queue, CancellationToken::new()));
            let credentials = Credentials::Signed(Signer::new("secret".into()));
            let lookup = InventoryLookup::new(Arc::clone(&inventory), Vec::new(), credentials, grace);
            let mut red = port(1, RED, "10.0.0.5");
            red.addressing.mac = Some(MAC.parse().unwrap());
            let publish = async |ports: Vec<PortRecord>| {
                let mut changes = inventory.subscribe();
                changes.mark_unchanged();
                let event = Event { source: SourceKind::Libvirt, key: "f".to_owned(), ports };
                events.send(event).await.unwrap();
                changes.changed().await.unwrap();
            };
            let own = red.instance.to_string();
            for _ in 0..2 {
                publish(vec![red.clone().into()]).await;
                assert_eq!(found_from(&lookup, RED, "10.0.0.5", Some(MAC)), own);
                publish(Vec::new()).await;
                for address in ["10.0.0.5", "10.0.0.50"] {
                    assert_eq!(found_from(&lookup, RED, address, Some(MAC)), after_loss, "{address}");
                }
                let other = found_from(&lookup, RED, "10.0.0.5", Some("fa:16:3e:00:00:02"));
                assert_eq!(other, "NotFound", "it was never that one's");
            }
            run.abort();
        }
    }

    #[tokio::test]
    async fn the_mac_address_decides_between_two_ports_with_one_address() {
        let [mut old, mut new] = [port(1, RED, "10.0.0.5"), port(2, RED, "10.0.0.5")];
        old.addressing.mac = Some(MAC.parse().unwrap());
        new.addressing.mac = Some("fa:16:3e:00:00:02".parse().unwrap());
        let lookup = reported(SourceKind::Libvirt, [old.clone().into(), new.clone().into()]).await;
        for port in [old, new] {
            let mac = port.addressing.mac.unwrap().to_string();
            assert_eq!(found_from(&lookup, RED, "10.0.0.5", Some(&mac)), port.instance.to_string());
        }
    }

    #[tokio::test]
    async fn ambiguous_and_incomplete_ports_are_not_guessed() {
        let twice = [port(1, RED, "10.0.0.5").into(), port(2, RED, "10.0.0.5").into()];
        assert_eq!(found(&signed(twice).await, RED, "10.0.0.5"), "Ambiguous");
        let half = PortRecord { tenant: None, ..port(1, RED, "10.0.0.5").into() };
        assert_eq!(found(&signed([half.clone()]).await, RED, "10.0.0.5"), "Unavailable");
        let router = PortRecord { device_owner: DeviceOwner::new("network:dhcp"), ..half.clone() };
        assert_eq!(found(&signed([router]).await, RED, "10.0.0.5"), "NotAnInstance");
        let credentials = Credentials::ByNetwork(NetworkHeader::Ovn);
        let forwarded = inventory_lookup(SourceKind::OvnSouthbound, vec![half], credentials).await;
        assert_eq!(found(&forwarded, RED, "10.0.0.5"), "network");
    }

    #[tokio::test]
    async fn not_found_needs_all_sources_to_be_ready() {
        let mut lookup = signed([]).await;
        let (_reporter, state) = Reporter::new(SourceKind::Libvirt);
        lookup.sources.push(state);
        assert_eq!(found(&lookup, RED, "10.0.0.5"), "Unavailable");
        lookup.sources.clear();
        assert_eq!(found(&lookup, RED, "10.0.0.5"), "NotFound");
        let router = NetworkOrRouter::Router(RED.parse().unwrap());
        let query = ClientQuery { scope: router, address: "10.0.0.5".parse().unwrap(), mac: None };
        assert!(matches!(lookup.find(&query), LookupOutcome::NotFound));
    }
}
