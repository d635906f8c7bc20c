use std::time::Duration;

use uuid::Uuid;

use super::*;
use crate::ids::InstanceId;
use crate::inventory::{SourceKind, Tenant};
use crate::proxy::NetworkHeader;

const NETWORK: &str = "11111111-1111-4111-8111-111111111111";

fn attachment(id: u32) -> AttachmentId {
    AttachmentId::new(id).unwrap()
}

fn changes(removed: &[u32], updated: &[u32]) -> BindingChanges<Binding> {
    let binding = |id: &u32| Binding {
        interface: format!("tap{id}"),
        index: IfIndex(*id),
        vlan: None,
        since: Instant::now(),
        unknown_since: Instant::now(),
        owner: Owner::Unknown,
    };
    BindingChanges {
        removed: removed.iter().copied().map(attachment).collect(),
        updated: updated.iter().map(|id| (attachment(*id), Arc::new(binding(id)))).collect(),
    }
}

fn scope() -> NetworkOrRouter {
    NetworkOrRouter::Network(NETWORK.parse().unwrap())
}

fn shared_changes(removed: &[u32], updated: &[u32]) -> BindingChanges<SharedBinding> {
    let binding = |id: &u32| SharedBinding {
        namespace: format!("qdhcp-{NETWORK}").into(),
        interface: format!("tap{id}"),
        index: IfIndex(*id),
        since: Instant::now(),
        scope: scope(),
    };
    BindingChanges {
        removed: removed.iter().copied().map(attachment).collect(),
        updated: updated.iter().map(|id| (attachment(*id), Arc::new(binding(id)))).collect(),
    }
}

fn lookup(directory: &Directory, id: u32, address: [u8; 4]) -> LookupState {
    directory.lookup(&ClientAddress::ipv4(attachment(id), address))
}

#[test]
fn a_new_attachment_is_pending_and_a_removed_one_is_gone() {
    let directory = Directory::default();
    let state = |id| lookup(&directory, id, [10, 0, 0, 5]);
    assert!(matches!(state(1), LookupState::Pending { .. }), "before anything is published");
    directory.publish(&changes(&[], &[1, 2]));
    assert!(matches!(state(3), LookupState::Pending { .. }));
    directory.publish(&changes(&[2], &[]));
    assert!(matches!(state(2), LookupState::Gone));
    assert!(matches!(state(3), LookupState::Pending { .. }));
}

/// A guest that was up for days must not get 404 because its source fails for a moment.
#[test]
fn the_wait_for_an_identity_starts_with_its_loss() {
    let directory = Directory::default();
    let since = Instant::now();
    let unknown_since = since + Duration::from_hours(48);
    let mut changes = changes(&[], &[1]);
    for (_, binding) in &mut changes.updated {
        *binding = Arc::new(Binding { since, unknown_since, ..Binding::clone(binding) });
    }
    directory.publish(&changes);
    let state = lookup(&directory, 1, [10, 0, 0, 5]);
    assert!(matches!(state, LookupState::Pending { since } if since == unknown_since), "{state:?}");

    let record = PortRecord {
        addressing: PortAddressing {
            network: Some(NETWORK.parse().unwrap()),
            mac: Some(MacAddress([0xfa, 0x16, 0x3e, 0, 0, 1])),
            ..PortAddressing::default()
        },
        ..PortRecord::default()
    };
    let auth = UpstreamAuth::ByNetwork(NetworkHeader::Neutron);
    let known = Owner::from_entry(&Entry::Incomplete(Arc::new(record)), &auth);
    for unknown in [Owner::Unknown, Owner::Disputed] {
        assert!(known.is_lost_in(&unknown));
        assert!(!unknown.is_lost_in(&known) && !unknown.is_lost_in(&unknown));
    }
    assert!(!known.is_lost_in(&known));
}

#[test]
fn all_guests_of_a_shared_attachment_have_its_scope() {
    let directory = Directory::default();
    directory.publish_shared(&shared_changes(&[], &[1]));
    for address in [[10, 0, 0, 5], [10, 0, 0, 6]] {
        assert!(matches!(lookup(&directory, 1, address), LookupState::Shared(found) if found == scope()));
    }
}

#[test]
fn a_removed_shared_attachment_is_gone() {
    let directory = Directory::default();
    directory.publish_shared(&shared_changes(&[], &[1, 2]));
    directory.publish_shared(&shared_changes(&[2], &[]));
    assert!(matches!(lookup(&directory, 2, [10, 0, 0, 5]), LookupState::Gone));
    assert!(matches!(lookup(&directory, 3, [10, 0, 0, 5]), LookupState::Pending { .. }), "not published yet");
}

#[test]
fn publishing_one_part_keeps_the_other() {
    let directory = Directory::default();
    directory.publish_shared(&shared_changes(&[], &[1]));
    directory.publish(&BindingChanges::default());
    assert!(matches!(lookup(&directory, 1, [10, 0, 0, 5]), LookupState::Shared(_)));
    let changes = directory.changes();
    directory.publish_shared(&shared_changes(&[1], &[]));
    assert!(changes.has_changed().unwrap(), "waiting requests are woken");
    assert!(matches!(lookup(&directory, 1, [10, 0, 0, 5]), LookupState::Gone));
}

#[test]
fn the_mac_address_is_the_one_that_the_kernel_saw() {
    let mac = MacAddress([0xfa, 0x16, 0x3e, 0, 0, 1]);
    let client = ClientAddress::ipv4(attachment(1), [10, 0, 0, 5]);
    let directory = Directory::new(move |address| (*address == client).then_some(mac));
    assert_eq!(directory.guest_mac(&client), Some(mac));
    assert_eq!(directory.guest_mac(&ClientAddress::ipv4(attachment(2), [10, 0, 0, 5])), None);
}

/// Neutron's agent finds the instance itself, but all ports of an instance have one share.
#[test]
fn an_instance_counts_as_one_with_neutrons_agent() {
    let instance = InstanceId::new(Uuid::from_u128(7));
    let addressing = PortAddressing {
        network: Some(NETWORK.parse().unwrap()),
        mac: Some(MacAddress([0xfa, 0x16, 0x3e, 0, 0, 1])),
        ..PortAddressing::default()
    };
    let auth = UpstreamAuth::ByNetwork(NetworkHeader::Neutron);
    let found = |entry| Owner::from_entry(&entry, &auth).identity().map(|identity| identity.instance());
    for (tenant, want) in [(None, None), (Some(Tenant { instance, project: None }), Some(instance))] {
        let record = PortRecord { tenant, addressing: addressing.clone(), ..PortRecord::default() };
        assert_eq!(found(Entry::Incomplete(Arc::new(record))), Some(want));
    }
    let project = "acme".parse().unwrap();
    let port = Port { id: None, device: None, instance, project, addressing };
    assert_eq!(found(Entry::Agreed(Arc::new(port))), Some(Some(instance)));
}

/// Neutron's agent would identify the port by an address that may be another port's by now.
#[test]
fn a_port_without_a_confirmed_address_is_unknown() {
    let owner = |mac: Option<MacAddress>, source| {
        let addressing = PortAddressing {
            network: Some(NETWORK.parse().unwrap()),
            mac,
            fixed_ips: vec!["10.0.0.5".parse().unwrap()],
            fixed_ips_source: Some(source),
            ..PortAddressing::default()
        };
        let record = PortRecord { addressing, ..PortRecord::default() };
        let auth = UpstreamAuth::ByNetwork(NetworkHeader::Neutron);
        Owner::from_entry(&Entry::Incomplete(Arc::new(record)), &auth)
    };
    let mac = Some(MacAddress([0xfa, 0x16, 0x3e, 0, 0, 1]));
    for source in SourceKind::ALL {
        let confirmed = matches!(source, SourceKind::StaticFile | SourceKind::OvnSouthbound);
        assert_eq!(owner(None, *source).identity().is_some(), confirmed, "{source}");
        assert!(owner(mac, *source).identity().is_some(), "{source}");
    }
}
