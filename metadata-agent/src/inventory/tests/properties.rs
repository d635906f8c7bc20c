//! Properties of arbitrary events.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use proptest::prelude::*;

use super::*;
use crate::ids::VlanId;

proptest! {
    /// One instance and one project: known. More: disputed. Fewer: incomplete.
    #[test]
    fn records_merge_into_a_port_a_dispute_or_neither(tenants in proptest::collection::vec(any_tenant(), 1..6)) {
        let instances: BTreeSet<_> = tenants.iter().flatten().map(|tenant| tenant.instance).collect();
        let projects: BTreeSet<_> = tenants.iter().flatten().filter_map(|tenant| tenant.project.as_ref()).collect();
        let snapshot = snapshot_of(tenants.iter().enumerate().map(|(n, tenant)| {
            let record = PortRecord { tenant: tenant.clone(), ..without_tenant(PORT) };
            event(SourceKind::ALL[n % SourceKind::ALL.len()], &n.to_string(), [record])
        }));
        let mut wanted = Counts::default();
        match (instances.len(), projects.len()) {
            (1, 1) => wanted.ports = 1,
            (0 | 1, 0) => wanted.incomplete = 1,
            _ => wanted.disputed = 1,
        }
        prop_assert_eq!(snapshot.counts(), wanted);
        let resolved = resolve(&snapshot, TAP, None);
        prop_assert_eq!(matches!(resolved, Resolution::Known(_)), wanted.ports == 1);
        prop_assert_eq!(matches!(resolved, Resolution::Conflict), wanted.disputed == 1);
    }

    /// Only the last event of each key matters.
    #[test]
    fn the_order_of_keys_and_batches_does_not_matter(
        events in proptest::collection::vec(any_event(), 1..24),
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

        let wanted = snapshot_of(last.into_values());
        let found = inventory.load();
        prop_assert_eq!(found.counts(), wanted.counts());
        prop_assert!(found.entries().eq(wanted.entries()));
        let parent = PORT.parse().unwrap();
        prop_assert_eq!(found.subports(&parent), wanted.subports(&parent));
        for device in DEVICES.iter().copied().chain([TAP, "tap3f2a9d10-78"]) {
            for link_mac in [None, mac("fe:16:3e:00:00:00"), mac("fe:16:3e:00:00:01")] {
                prop_assert_eq!(resolve(&found, device, link_mac), resolve(&wanted, device, link_mac));
            }
        }
    }
}

proptest! {
    /// Compares each snapshot with all earlier ones.
    #[test]
    fn a_device_without_a_reported_change_has_not_changed(
        batches in proptest::collection::vec(proptest::collection::vec(any_event(), 1..4), 1..12),
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
                        prop_assert_eq!(looked_up(&now, device, link_mac), looked_up(earlier, device, link_mac));
                    }
                }
            }
            before.push(Snapshot::clone(&now));
        }
    }
}

/// Everything that readers look up for a device: its port and the subports of that port.
fn looked_up(
    snapshot: &Snapshot,
    device: &str,
    link_mac: Option<MacAddress>,
) -> impl PartialEq + std::fmt::Debug {
    let entry = snapshot.find(device, link_mac).map(Option::<&Entry>::cloned);
    let id = match &entry {
        Ok(Some(Entry::Agreed(port))) => port.id,
        Ok(Some(Entry::Incomplete(record) | Entry::NoInstance(record))) => record.id,
        Ok(Some(Entry::Disputed(dispute))) => dispute.id,
        Ok(None) | Err(AmbiguousPortError) => None,
    };
    (entry, id.and_then(|id| snapshot.subports(&id).cloned()))
}

const DEVICES: [&str; 3] = [TAP, "vnet0", "vnet1"];

/// Events with so few values that they collide.
fn any_event() -> impl Strategy<Value = Event> {
    let kind = proptest::sample::select(SourceKind::ALL);
    let ids = [PORT, TWIN, "3f2a9d10-7800-4e55-9d0c-2b6f4f1f0a03"];
    let id = proptest::option::of(proptest::sample::select(ids.to_vec()));
    let name = proptest::option::of(proptest::sample::select(DEVICES.to_vec()));
    let mac = proptest::option::of(0..2u8);
    let owner =
        proptest::option::weighted(0.3, proptest::sample::select(vec!["compute:nova", "network:dhcp"]));
    let arbitrated = proptest::collection::btree_set(0..2u32, 0..3);
    let trunk = proptest::option::weighted(0.2, 1..3u64);
    let record = (id, name, any_tenant(), mac, owner, arbitrated, trunk);
    let record = record.prop_map(|(id, name, tenant, mac, owner, arbitrated, trunk)| PortRecord {
        trunk: trunk.map(|vlan| TrunkBinding {
            parent: PORT.parse().unwrap(),
            vlan: VlanId::try_from(vlan).unwrap(),
        }),
        device_owner: owner.and_then(DeviceOwner::new),
        port_project: owner.map(|_| "admin".parse().unwrap()),
        arbitrated: arbitrated.into_iter().map(instance).collect(),
        id: id.map(|id| id.parse().unwrap()),
        device: name.and_then(device),
        tenant,
        addressing: PortAddressing {
            mac: mac.map(|last| MacAddress([0xfa, 0x16, 0x3e, 0, 0, last])),
            ..PortAddressing::default()
        },
        ..PortRecord::default()
    });
    (kind, 0..3u8, proptest::collection::vec(record, 0..3)).prop_map(|(source, key, ports)| Event {
        source,
        key: key.to_string(),
        ports,
    })
}

/// Mostly one instance of one project. Otherwise nearly every port would be disputed.
fn any_tenant() -> impl Strategy<Value = Option<Tenant>> {
    let project = (0..4u8, 0..8u8).prop_map(|(known, other)| match (known, other) {
        (0, _) => None,
        (_, 0) => Some("other".parse().unwrap()),
        _ => Some("acme".parse().unwrap()),
    });
    let tenant = (0..8u32, project);
    proptest::option::of(tenant.prop_map(|(n, project)| Tenant { instance: instance(n / 7), project }))
}
