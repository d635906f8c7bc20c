//! The inventory as its readers see it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Instant;

use proptest::prelude::*;

use super::*;
use crate::ids::{IfIndex, InstanceId, MacAddress, PortId, VlanId};

const PORT: &str = "3f2a9d10-77c1-4e55-9d0c-2b6f4f1f0a01";
/// Shares its first eleven characters with `PORT`.
const TWIN: &str = "3f2a9d10-77ff-4e55-9d0c-2b6f4f1f0a02";
const TAP: &str = "tap3f2a9d10-77";

#[test]
fn a_port_is_found_by_its_device_and_else_by_the_tap_that_nova_would_call_so() {
    let placed = Port { device: device("vnet5"), ..port(Some(PORT), 1) };
    let other = port(Some("aaaaaaaa-bb00-4000-8000-000000000000"), 2);
    let snapshot = fold([says(SourceKind::StaticFile, "f", [placed.clone(), other.clone()])]);
    assert_eq!(snapshot.resolve("vnet5", None), known(&placed));
    assert_eq!(snapshot.resolve(TAP, None), known(&placed), "as with qvo and tap of one hybrid plug");
    assert_eq!(snapshot.resolve("tapaaaaaaaa-bb", None), known(&other));
    assert_eq!(snapshot.resolve("tapaaaaaaaa-bc", None), Resolution::Unknown);
    assert_eq!(snapshot.resolve("", None), Resolution::Unknown);
    assert_eq!(snapshot.counts(), Counts { ports: 2, disputed: 0, ..Counts::default() });
}

#[test]
fn the_device_goes_before_the_tap_name() {
    let placed = Port { device: device(TAP), ..port(Some(TWIN), 1) };
    let snapshot = fold([says(SourceKind::StaticFile, "f", [port(Some(PORT), 2), placed.clone()])]);
    assert_eq!(snapshot.resolve(TAP, None), known(&placed));
}

#[test]
fn an_interface_of_another_index_than_a_source_tells_is_not_the_ports_whoever_else_names_it() {
    let placed = Port { device: device(TAP), ..port(Some(PORT), 1) };
    let told = PortRecord { index: Some(IfIndex(7)), ..placed.clone().into() };
    let snapshot = fold([
        says(SourceKind::Ovsdb, "row", [told.clone()]),
        says(SourceKind::Libvirt, "domain", [placed.clone()]),
        says(SourceKind::Neutron, "port", [port(Some(PORT), 1)]),
    ]);
    assert_eq!(snapshot.resolve_at(TAP, IfIndex(7), None), known(&placed));
    assert_eq!(snapshot.resolve_at(TAP, IfIndex(8), None), Resolution::Unknown);
    assert_eq!(snapshot.resolve(TAP, None), known(&placed), "of an interface of another namespace");

    // The row is written anew, and its index comes later.
    let mut inventory = Ledger::default();
    inventory.apply(says(SourceKind::Ovsdb, "row", [told.clone()]));
    assert_eq!(inventory.settle().unwrap().resolve_at(TAP, IfIndex(8), None), Resolution::Unknown);
    inventory.apply(says(SourceKind::Ovsdb, "row", [placed.clone()]));
    assert_eq!(inventory.settle().unwrap().resolve_at(TAP, IfIndex(8), None), known(&placed));
    inventory.apply(says(SourceKind::Ovsdb, "row", [PortRecord { index: Some(IfIndex(8)), ..told }]));
    assert_eq!(inventory.settle().unwrap().resolve_at(TAP, IfIndex(8), None), known(&placed));
}

#[test]
fn of_two_ports_with_one_name_an_interface_is_the_one_whose_index_it_has() {
    let one = Port { device: device(TAP), ..port(Some(PORT), 1) };
    let two = Port { device: device(TAP), ..port(Some(TWIN), 2) };
    let told = PortRecord { index: Some(IfIndex(7)), ..one.clone().into() };
    let snapshot = fold([says(SourceKind::Ovsdb, "a", [told]), says(SourceKind::Ovsdb, "b", [two.clone()])]);
    assert_eq!(snapshot.resolve_at(TAP, IfIndex(7), None), known(&one));
    assert_eq!(snapshot.resolve_at(TAP, IfIndex(8), None), known(&two));
    assert_eq!(snapshot.resolve(TAP, None), Resolution::Conflict);
}

#[test]
fn the_index_is_that_of_the_device_with_which_it_was_told() {
    let hybrid = Port { device: device(TAP), ..port(Some(PORT), 1) };
    let other: PortRecord = PortRecord {
        index: Some(IfIndex(7)),
        ..Port { device: device("vnet5"), ..port(Some(PORT), 1) }.into()
    };
    let snapshot =
        fold([says(SourceKind::Ovsdb, "a", [hybrid.clone()]), says(SourceKind::Ovsdb, "b", [other])]);
    assert_eq!(snapshot.resolve_at(TAP, IfIndex(8), None), known(&hybrid));
    assert_eq!(snapshot.resolve_at("vnet5", IfIndex(7), None), known(&hybrid));
    assert_eq!(snapshot.resolve_at("vnet5", IfIndex(8), None), Resolution::Unknown);
}

#[test]
fn a_record_without_an_id_belongs_to_the_port_that_is_placed_there_and_to_no_other() {
    let placed = Port { device: device(TAP), ..port(Some("aaaaaaaa-bb00-4000-8000-000000000000"), 1) };
    let nameless = Port { device: device(TAP), ..port(None, 1) };
    let snapshot = fold([
        says(SourceKind::StaticFile, "f", [placed.clone(), port(Some(PORT), 2)]),
        says(SourceKind::Libvirt, "d", [nameless]),
    ]);
    assert_eq!(snapshot.resolve(TAP, None), known(&placed));
    assert_eq!(snapshot.counts(), Counts { ports: 2, disputed: 0, ..Counts::default() });
}

#[test]
fn ports_that_share_a_tap_name_are_told_apart_by_the_mac_address_or_not_at_all() {
    let one = Port { mac: mac("fa:16:3e:00:00:01"), ..port(Some(PORT), 1) };
    let two = Port { mac: mac("fa:16:3e:00:00:02"), ..port(Some(TWIN), 2) };
    let snapshot = fold([
        says(SourceKind::StaticFile, "a", [one.clone()]),
        says(SourceKind::StaticFile, "b", [two.clone()]),
    ]);
    assert_eq!(snapshot.resolve(TAP, mac("fe:16:3e:00:00:01")), known(&one), "as libvirt sets it");
    assert_eq!(snapshot.resolve(TAP, mac("fa:16:3e:00:00:02")), known(&two), "as the guest has it");
    assert_eq!(snapshot.resolve(TAP, mac("fe:16:3e:00:00:03")), Resolution::Conflict);
    assert_eq!(snapshot.resolve(TAP, None), Resolution::Conflict);

    let same_mac = Port { mac: one.mac, ..two };
    let snapshot = fold([says(SourceKind::StaticFile, "a", [one.clone(), same_mac])]);
    assert_eq!(snapshot.resolve(TAP, one.mac), Resolution::Conflict);
}

#[test]
fn sources_are_merged_field_by_field_in_order_of_trust() {
    let file = Port {
        network: Some("11111111-1111-4111-8111-111111111111".parse().unwrap()),
        fixed_ips: vec!["10.0.0.5".parse().unwrap()],
        allowed_addresses: vec!["10.0.0.100".parse().unwrap()],
        ..port(Some(PORT), 1)
    };
    let libvirt = Port {
        device: device(TAP),
        mac: mac("fa:16:3e:00:00:01"),
        fixed_ips: vec!["10.0.0.6".parse().unwrap()],
        ..port(Some(PORT), 1)
    };
    let merged = Port { device: libvirt.device.clone(), mac: libvirt.mac, ..file.clone() };
    let snapshot = fold([
        says(SourceKind::Libvirt, "d", [libvirt.clone()]),
        says(SourceKind::StaticFile, "f", [file.clone()]),
    ]);
    assert_eq!(snapshot.resolve(TAP, None), known(&merged));
    assert_eq!(snapshot.counts(), Counts { ports: 1, disputed: 0, ..Counts::default() });

    let nameless = Port { id: None, ..libvirt };
    let snapshot =
        fold([says(SourceKind::Libvirt, "d", [nameless]), says(SourceKind::StaticFile, "f", [file])]);
    assert_eq!(snapshot.resolve(TAP, None), known(&merged), "a record without an id joins by its device");
    assert_eq!(snapshot.counts(), Counts { ports: 1, disputed: 0, ..Counts::default() });
}

#[test]
fn a_port_is_known_once_sources_that_name_one_instance_know_its_project() {
    let (_, mut publisher) = Inventory::new();
    let inventory = Arc::clone(&publisher.inventory);
    let resolve = || inventory.load().resolve(TAP, None);
    let incomplete = Counts { incomplete: 1, ..Counts::default() };
    let placed = Port { device: device(TAP), ..port(Some(PORT), 1) };

    publisher.publish([says(SourceKind::Ovsdb, "row", [without_project(&placed)])]);
    assert_eq!((resolve(), inventory.load().counts()), (Resolution::Unknown, incomplete));
    publisher.publish([says(SourceKind::Libvirt, "d", [Port { id: None, ..placed.clone() }])]);
    assert_eq!(resolve(), known(&placed));

    let elsewhere = Port { id: None, device: device("vnet7"), ..placed.clone() };
    publisher.publish([says(SourceKind::Libvirt, "d", [elsewhere])]);
    assert_eq!(resolve(), Resolution::Unknown, "it was said of another port");
    publisher.publish([says(SourceKind::Libvirt, "d", [Port { device: device(TAP), ..port(None, 2) }])]);
    assert_eq!(resolve(), Resolution::Conflict, "the project of another instance is no answer");
    publisher.publish([silent(SourceKind::Libvirt, "d")]);
    assert_eq!((resolve(), inventory.load().counts()), (Resolution::Unknown, incomplete));
}

#[test]
fn the_ports_own_project_stands_in_where_nobody_knows_the_instances() {
    let ovn =
        PortRecord { port_project: Some("admin".parse().unwrap()), ..without_project(&port(Some(PORT), 1)) };
    let stands_in = Port { project: "admin".parse().unwrap(), ..port(Some(PORT), 1) };
    let snapshot = fold([says(SourceKind::OvnSouthbound, "row", [ovn.clone()])]);
    assert_eq!(snapshot.resolve(TAP, None), known(&stands_in));

    let libvirt = PortRecord::from(port(Some(PORT), 1));
    let snapshot =
        fold([says(SourceKind::OvnSouthbound, "row", [ovn]), says(SourceKind::Libvirt, "d", [libvirt])]);
    assert_eq!(snapshot.resolve(TAP, None), known(&port(Some(PORT), 1)), "and is no dispute");
}

#[test]
fn a_port_that_is_for_something_else_is_no_instance_unless_somebody_names_one() {
    let dhcp = PortRecord { device_owner: DeviceOwner::new("network:dhcp"), ..nobodys(PORT) };
    let row = says(SourceKind::OvnSouthbound, "row", [dhcp]);
    let snapshot = fold([row.clone()]);
    assert_eq!(snapshot.resolve(TAP, None), Resolution::NoInstance);
    assert_eq!(snapshot.counts(), Counts { no_instance: 1, ..Counts::default() });
    let snapshot = fold([row, says(SourceKind::Libvirt, "d", [port(Some(PORT), 1)])]);
    assert_eq!(snapshot.resolve(TAP, None), Resolution::Conflict);

    let compute = PortRecord { device_owner: DeviceOwner::new("compute:nova"), ..port(Some(PORT), 1).into() };
    let snapshot = fold([says(SourceKind::Neutron, "row", [compute])]);
    assert_eq!(snapshot.resolve(TAP, None), known(&port(Some(PORT), 1)));
    assert_eq!(DeviceOwner::new(""), None, "nobody uses the port yet");
}

#[test]
fn a_dispute_is_settled_by_who_was_asked_about_it_and_agrees_with_a_party() {
    let ovsdb = says(SourceKind::Ovsdb, "row", [without_project(&port(Some(PORT), 1))]);
    let libvirt = says(SourceKind::Libvirt, "d", [port(Some(PORT), 2)]);
    let neutron = |decides: u32, judged: &[u32]| {
        let judged = judged.iter().map(|n| instance(*n)).collect();
        says(SourceKind::Neutron, "port", [PortRecord { judged, ..port(Some(PORT), decides).into() }])
    };
    let resolve = |judge: Event| fold([ovsdb.clone(), libvirt.clone(), judge]).resolve(TAP, None);
    assert_eq!(resolve(neutron(1, &[1, 2])), known(&port(Some(PORT), 1)));
    assert_eq!(resolve(neutron(2, &[1, 2])), known(&port(Some(PORT), 2)));
    assert_eq!(resolve(neutron(3, &[1, 2])), Resolution::Conflict, "nobody else names it");
    assert_eq!(resolve(neutron(1, &[])), Resolution::Conflict, "was not asked to judge");
    assert_eq!(resolve(neutron(2, &[2, 3])), Resolution::Conflict, "was asked about another dispute");
}

#[test]
fn subports_are_found_by_parent_and_tag_and_answer_to_no_device() {
    let parent: PortId = PORT.parse().unwrap();
    let subport = |id: &str, vlan: u64| PortRecord {
        seat: Some(TrunkBinding { parent, vlan: VlanId::try_from(vlan).unwrap() }),
        ..nobodys(id)
    };
    let (five, six) = ("aaaaaaaa-bb00-4000-8000-000000000005", "aaaaaaaa-bb00-4000-8000-000000000006");
    let ovsdb = PortRecord { mac: mac("fa:16:3e:00:00:05"), ..subport(five, 5) };
    let neutron = PortRecord { fixed_ips: vec!["10.5.0.5".parse().unwrap()], ..subport(five, 5) };
    let snapshot = fold([
        says(SourceKind::Ovsdb, "5", [ovsdb]),
        says(SourceKind::Neutron, "5", [neutron]),
        says(SourceKind::Neutron, "6", [subport(six, 6)]),
        says(SourceKind::Ovsdb, "7", [subport(five, 7)]),
        says(SourceKind::Neutron, "7", [subport(six, 7)]),
    ]);
    let found = snapshot.subports(&parent).unwrap();
    let tags: Vec<_> = found.iter().map(|subport| subport.vlan.get()).collect();
    assert_eq!(tags, [5, 6], "what is placed under 7 is contested");
    assert_eq!(found[0].id, Some(five.parse().unwrap()));
    assert_eq!(found[0].mac, mac("fa:16:3e:00:00:05"));
    assert_eq!(found[0].fixed_ips, ["10.5.0.5".parse::<std::net::IpAddr>().unwrap()]);
    assert_eq!(snapshot.resolve("tapaaaaaaaa-bb", None), Resolution::Unknown);
    assert_eq!(snapshot.resolve(TAP, None), Resolution::Unknown, "nor for its parent");
    assert_eq!(snapshot.counts(), Counts::default());
}

#[test]
fn a_port_that_is_not_known_yet_still_stands_in_the_way_of_its_twin() {
    let one = Port { mac: mac("fa:16:3e:00:00:01"), ..port(Some(PORT), 1) };
    let two = Port { mac: mac("fa:16:3e:00:00:02"), ..port(Some(TWIN), 2) };
    let snapshot = fold([
        says(SourceKind::Ovsdb, "a", [without_project(&one)]),
        says(SourceKind::StaticFile, "b", [two.clone()]),
    ]);
    assert_eq!(snapshot.resolve(TAP, two.mac), known(&two));
    assert_eq!(snapshot.resolve(TAP, one.mac), Resolution::Unknown);
    assert_eq!(snapshot.resolve(TAP, None), Resolution::Conflict);
}

#[test]
fn a_port_with_two_owners_is_a_conflict_until_they_agree() {
    let (_, mut publisher) = Inventory::new();
    let inventory = Arc::clone(&publisher.inventory);
    let resolve = || inventory.load().resolve(TAP, mac("fe:16:3e:00:00:01"));
    let old = Port { device: device(TAP), ..port(Some(PORT), 1) };

    publisher.publish([says(SourceKind::Libvirt, "instance-1.xml", [old.clone()])]);
    assert_eq!(resolve(), known(&old));
    let by_project = Port { project: "other".parse().unwrap(), ..old.clone() };
    for claim in [port(Some(PORT), 2), by_project, Port { id: None, device: device(TAP), ..port(None, 2) }] {
        publisher.publish([says(SourceKind::StaticFile, "f", [claim])]);
        assert_eq!(resolve(), Resolution::Conflict);
        assert_eq!(inventory.load().counts(), Counts { ports: 0, disputed: 1, ..Counts::default() });
        let dump = serde_json::to_string(&inventory.load().entries().collect::<Vec<_>>()).unwrap();
        assert!(dump.contains("static_file") && dump.contains("instance-1.xml"), "{dump}");
    }
    let new = Port { instance: instance(2), ..old };
    publisher.publish([says(SourceKind::Libvirt, "instance-2.xml", [new.clone()])]);
    assert_eq!(resolve(), Resolution::Conflict);
    publisher.publish([silent(SourceKind::Libvirt, "instance-1.xml")]);
    assert_eq!(resolve(), known(&Port { id: new.id, ..new }));
    publisher.publish([silent(SourceKind::Libvirt, "instance-2.xml")]);
    publisher.publish([silent(SourceKind::StaticFile, "f")]);
    assert_eq!(resolve(), Resolution::Unknown);
    assert_eq!(inventory.load().counts(), Counts::default());
    assert_eq!(inventory.load().entries().count(), 0);
}

#[test]
fn the_version_ticks_for_each_change_and_only_for_a_change() {
    let (inventory, mut publisher) = Inventory::new();
    let mut version = inventory.subscribe();
    let event = says(SourceKind::Libvirt, "d", [port(Some(PORT), 1)]);
    publisher.publish([event.clone()]);
    assert!(version.has_changed().unwrap());
    assert_eq!(*version.borrow_and_update(), inventory.load().version());
    let before = inventory.load().resolve(TAP, None);
    publisher.publish([event, silent(SourceKind::Libvirt, "e")]);
    assert!(!version.has_changed().unwrap());
    publisher.publish([says(SourceKind::Libvirt, "e", [port(Some(TWIN), 2)])]);
    assert!(version.has_changed().unwrap());
    assert_ne!(before, inventory.load().resolve(TAP, None));
}

#[tokio::test]
async fn a_batch_of_events_is_published_once() {
    let (inventory, publisher) = Inventory::new();
    let mut version = inventory.subscribe();
    let (sender, events) = mpsc::channel(8);
    for n in 0..8 {
        sender.send(says(SourceKind::Libvirt, &n.to_string(), [numbered(n)])).await.unwrap();
    }
    drop(sender);
    publisher.run(events, CancellationToken::new()).await;
    assert_eq!(*version.borrow_and_update(), 1);
    assert_eq!(inventory.load().counts().ports, 8);
}

/// Says what it costs, asserts what it must not get wrong meanwhile.
#[test]
fn ten_thousand_ports_take_a_thousand_changes() {
    let (inventory, mut publisher) = Inventory::new();
    let begin = Instant::now();
    publisher.publish([says(SourceKind::StaticFile, "f", (0..10_000).map(numbered))]);
    let load = begin.elapsed();

    let begin = Instant::now();
    for n in 0..1000 {
        let change = Port { device: device(&format!("vnet{n}")), ..numbered(n) };
        publisher.publish([says(SourceKind::Libvirt, &n.to_string(), [change])]);
    }
    let changes = begin.elapsed();

    let snapshot = inventory.load();
    let begin = Instant::now();
    for n in 0..10_000 {
        let tap = DeviceName::tap_of(&numbered(n).id.unwrap());
        assert!(matches!(snapshot.resolve(tap.as_str(), None), Resolution::Known(_)), "{tap}");
    }
    let lookups = begin.elapsed();
    assert!(matches!(snapshot.resolve("vnet999", None), Resolution::Known(_)));
    assert_eq!(snapshot.counts(), Counts { ports: 10_000, disputed: 0, ..Counts::default() });
    println!(
        "10,000 ports loaded in {load:?}; 1,000 changes, each published: {changes:?}; 10,000 lookups: {lookups:?}"
    );
}

proptest! {
    /// One instance and one project are named: known. More: disputed. Less: incomplete.
    #[test]
    fn facts_add_up_to_a_port_or_to_none(tenants in proptest::collection::vec(tenant(), 1..6)) {
        let instances: BTreeSet<_> = tenants.iter().flatten().map(|tenant| tenant.instance).collect();
        let projects: BTreeSet<_> = tenants.iter().flatten().filter_map(|tenant| tenant.project.as_ref()).collect();
        let snapshot = fold(tenants.iter().enumerate().map(|(n, tenant)| {
            let facts = PortRecord { tenant: tenant.clone(), ..nobodys(PORT) };
            says(SourceKind::ALL[n % SourceKind::ALL.len()], &n.to_string(), [facts])
        }));
        let mut wanted = Counts::default();
        match (instances.len(), projects.len()) {
            (1, 1) => wanted.ports = 1,
            (0 | 1, 0) => wanted.incomplete = 1,
            _ => wanted.disputed = 1,
        }
        prop_assert_eq!(snapshot.counts(), wanted);
        let resolved = snapshot.resolve(TAP, None);
        prop_assert_eq!(matches!(resolved, Resolution::Known(_)), wanted.ports == 1);
        prop_assert_eq!(matches!(resolved, Resolution::Conflict), wanted.disputed == 1);
    }

    /// The order between keys, and where batches end, is of no consequence.
    #[test]
    fn any_order_converges(
        events in proptest::collection::vec(event(), 1..24),
        picks in proptest::collection::vec(any::<proptest::sample::Index>(), 24),
        ends in proptest::collection::vec(any::<bool>(), 24),
    ) {
        let mut last = BTreeMap::new();
        let mut queues: Vec<VecDeque<Event>> = Vec::new();
        for event in events {
            last.insert((event.source, event.key.clone()), event.clone());
            let same = |queue: &&mut VecDeque<Event>| {
                queue.iter().any(|other| (other.source, &other.key) == (event.source, &event.key))
            };
            match queues.iter_mut().find(same) {
                Some(queue) => queue.push_back(event),
                None => queues.push([event].into()),
            }
        }

        let (inventory, mut publisher) = Inventory::new();
        let mut batch = Vec::new();
        for (pick, end) in picks.iter().zip(ends) {
            if queues.is_empty() {
                break;
            }
            let queue = pick.index(queues.len());
            batch.extend(queues[queue].pop_front());
            queues.retain(|queue| !queue.is_empty());
            if end {
                publisher.publish(batch.drain(..));
            }
        }
        publisher.publish(batch);

        let wanted = fold(last.into_values());
        let found = inventory.load();
        prop_assert_eq!(found.counts(), wanted.counts());
        prop_assert!(found.entries().eq(wanted.entries()));
        let parent = PORT.parse().unwrap();
        prop_assert_eq!(found.subports(&parent), wanted.subports(&parent));
        for device in DEVICES.iter().copied().chain([TAP, "tap3f2a9d10-78"]) {
            for link_mac in [None, mac("fe:16:3e:00:00:00"), mac("fe:16:3e:00:00:01")] {
                prop_assert_eq!(found.resolve(device, link_mac), wanted.resolve(device, link_mac));
            }
        }
    }
}

proptest! {
    /// Of a device that is not named among the changes a snapshot says what each of the last ones said.
    #[test]
    fn what_is_not_named_has_not_changed(
        batches in proptest::collection::vec(proptest::collection::vec(event(), 1..4), 1..12),
    ) {
        let (inventory, mut publisher) = Inventory::new();
        let mut before = vec![Snapshot::clone(&inventory.load())];
        for batch in batches {
            publisher.publish(batch);
            let now = inventory.load();
            for earlier in &before {
                let named: BTreeSet<_> = now.changed_since(earlier.version()).unwrap().map(DeviceName::as_str).collect();
                for device in DEVICES.iter().copied().chain([TAP, "tap3f2a9d10-78"]).filter(|name| !named.contains(name)) {
                    for link_mac in [None, mac("fe:16:3e:00:00:00"), mac("fe:16:3e:00:00:01")] {
                        prop_assert_eq!(asked(&now, device, link_mac), asked(earlier, device, link_mac));
                    }
                }
            }
            before.push(Snapshot::clone(&now));
        }
    }
}

/// What is asked about a device: who is there, and which subports that has.
fn asked(
    snapshot: &Snapshot,
    device: &str,
    link_mac: Option<MacAddress>,
) -> impl PartialEq + std::fmt::Debug {
    let entry = snapshot.find(device, link_mac).map(Option::<&Entry>::cloned);
    let id = match &entry {
        Ok(Some(Entry::Agreed(port))) => port.id,
        Ok(Some(Entry::Incomplete(facts) | Entry::NoInstance(facts))) => facts.id,
        Ok(Some(Entry::Disputed(dispute))) => dispute.id,
        Ok(None) | Err(Ambiguous) => None,
    };
    (entry, id.and_then(|id| snapshot.subports(&id).cloned()))
}

#[test]
fn changes_of_long_ago_are_not_told() {
    let (inventory, mut publisher) = Inventory::new();
    for n in 0..100 {
        publisher.publish([says(SourceKind::Libvirt, &n.to_string(), [numbered(n)])]);
    }
    let now = inventory.load();
    let count = |version| now.changed_since(version).map(Iterator::count);
    assert_eq!((count(100), count(99), count(90)), (Some(0), Some(1), Some(10)));
    assert_eq!((count(0), count(101)), (None, None), "too long ago, and not yet");
}

const DEVICES: [&str; 3] = [TAP, "vnet0", "vnet1"];

/// Events from a world so small that everything collides.
fn event() -> impl Strategy<Value = Event> {
    let kind = proptest::sample::select(SourceKind::ALL);
    let ids = [PORT, TWIN, "3f2a9d10-7800-4e55-9d0c-2b6f4f1f0a03"];
    let id = proptest::option::of(proptest::sample::select(ids.to_vec()));
    let name = proptest::option::of(proptest::sample::select(DEVICES.to_vec()));
    let mac = proptest::option::of(0..2u8);
    let owner =
        proptest::option::weighted(0.3, proptest::sample::select(vec!["compute:nova", "network:dhcp"]));
    let judged = proptest::collection::btree_set(0..2u32, 0..3);
    let seat = proptest::option::weighted(0.2, 1..3u64);
    let facts = (id, name, tenant(), mac, owner, judged, seat);
    let facts = facts.prop_map(|(id, name, tenant, mac, owner, judged, seat)| PortRecord {
        seat: seat.map(|vlan| TrunkBinding {
            parent: PORT.parse().unwrap(),
            vlan: VlanId::try_from(vlan).unwrap(),
        }),
        device_owner: owner.and_then(DeviceOwner::new),
        port_project: owner.map(|_| "admin".parse().unwrap()),
        judged: judged.into_iter().map(instance).collect(),
        id: id.map(|id| id.parse().unwrap()),
        device: name.and_then(device),
        tenant,
        mac: mac.map(|last| MacAddress([0xfa, 0x16, 0x3e, 0, 0, last])),
        ..PortRecord::default()
    });
    (kind, 0..3u8, proptest::collection::vec(facts, 0..3)).prop_map(|(source, key, ports)| Event {
        source,
        key: key.to_string(),
        ports,
    })
}

/// Mostly one instance of one project, or nothing but disputes would be seen.
fn tenant() -> impl Strategy<Value = Option<Tenant>> {
    let project = (0..4u8, 0..8u8).prop_map(|(known, other)| match (known, other) {
        (0, _) => None,
        (_, 0) => Some("other".parse().unwrap()),
        _ => Some("acme".parse().unwrap()),
    });
    let tenant = (0..8u32, project);
    proptest::option::of(tenant.prop_map(|(n, project)| Tenant { instance: instance(n / 7), project }))
}

fn fold(events: impl IntoIterator<Item = Event>) -> Snapshot {
    let (inventory, mut publisher) = Inventory::new();
    publisher.publish(events);
    inventory.load().as_ref().clone()
}

fn says<T: Into<PortRecord>>(source: SourceKind, key: &str, ports: impl IntoIterator<Item = T>) -> Event {
    Event { source, key: key.to_owned(), ports: ports.into_iter().map(Into::into).collect() }
}

fn silent(source: SourceKind, key: &str) -> Event {
    Event { source, key: key.to_owned(), ports: Vec::new() }
}

fn port(id: Option<&str>, owner: u32) -> Port {
    Port {
        id: id.map(|id| id.parse().unwrap()),
        device: None,
        instance: instance(owner),
        project: "acme".parse().unwrap(),
        network: None,
        mac: None,
        fixed_ips: Vec::new(),
        allowed_addresses: Vec::new(),
    }
}

fn nobodys(id: &str) -> PortRecord {
    PortRecord { id: Some(id.parse().unwrap()), ..PortRecord::default() }
}

/// As a source says it that does not know projects.
fn without_project(port: &Port) -> PortRecord {
    let tenant = Some(Tenant { instance: port.instance, project: None });
    PortRecord { tenant, ..port.clone().into() }
}

fn numbered(n: u32) -> Port {
    let id: PortId = format!("{n:08x}-0000-4000-8000-000000000000").parse().unwrap();
    Port { mac: mac("fa:16:3e:00:00:01"), ..port(Some(&id.to_string()), n) }
}

fn instance(n: u32) -> InstanceId {
    format!("{n:08x}-0000-4000-9000-000000000000").parse().unwrap()
}

#[expect(clippy::unnecessary_wraps, reason = "it stands for a field that is optional")]
fn device(name: &str) -> Option<DeviceName> {
    Some(name.parse().unwrap())
}

#[expect(clippy::unnecessary_wraps, reason = "it stands for a field that is optional")]
fn mac(text: &str) -> Option<MacAddress> {
    Some(text.parse().unwrap())
}

fn known(port: &Port) -> Resolution {
    Resolution::Known(Arc::new(port.clone()))
}
