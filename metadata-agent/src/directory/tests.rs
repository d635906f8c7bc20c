use std::time::Duration;

use metadata_ebpf::identity::ClientAddress;
use uuid::Uuid;

use super::*;
use crate::ids::{InstanceId, MacAddress};
use crate::inventory::{Entry, Port, PortAddressing, PortRecord, SourceKind, Tenant};
use crate::proxy::{ClientDirectory as _, LookupState, NetworkHeader};

const NETWORK: &str = "11111111-1111-4111-8111-111111111111";

fn by_network() -> Credentials {
    Credentials::ByNetwork(NetworkHeader::Neutron)
}

fn directory() -> Directory {
    Directory::new(by_network())
}

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
    directory.clients().lookup(&ClientAddress::ipv4(attachment(id), address))
}

#[test]
fn a_new_attachment_is_pending_and_a_removed_one_is_gone() {
    let directory = directory();
    let state = |id| lookup(&directory, id, [10, 0, 0, 5]);
    assert!(matches!(state(1), LookupState::Pending { .. }), "before anything is published");
    directory.publish(&changes(&[], &[1, 2]));
    assert!(matches!(state(3), LookupState::Pending { .. }));
    directory.publish(&changes(&[2], &[]));
    assert!(matches!(state(2), LookupState::Gone));
    assert!(matches!(state(3), LookupState::Pending { .. }));
}

/// After a restart, kept attachments are published in the order of their interfaces.
#[test]
fn an_older_attachment_may_be_published_after_a_newer_one() {
    let directory = directory();
    let state = |id| lookup(&directory, id, [10, 0, 0, 5]);
    directory.publish(&changes(&[], &[9]));
    directory.publish_shared(&shared_changes(&[], &[8]));
    assert!(matches!(state(3), LookupState::Pending { .. }), "kept, but not published yet");
    directory.publish(&changes(&[], &[3]));
    directory.publish(&changes(&[3], &[]));
    assert!(matches!(state(3), LookupState::Gone));
}

/// A guest that was up for days must not get 404 because its source fails for a moment.
#[test]
fn the_wait_for_an_identity_starts_with_its_loss() {
    let directory = directory();
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
    let known = Owner::from_entry(&Entry::Incomplete(Arc::new(record)), by_network().auth());
    for unknown in [Owner::Unknown, Owner::Disputed] {
        assert!(known.is_lost_in(&unknown));
        assert!(!unknown.is_lost_in(&known) && !unknown.is_lost_in(&unknown));
    }
    assert!(!known.is_lost_in(&known));
}

#[test]
fn all_guests_of_a_shared_attachment_have_its_scope() {
    let directory = directory();
    directory.publish_shared(&shared_changes(&[], &[1]));
    for address in [[10, 0, 0, 5], [10, 0, 0, 6]] {
        assert!(matches!(lookup(&directory, 1, address), LookupState::Shared(found) if found == scope()));
    }
}

#[test]
fn a_removed_shared_attachment_is_gone() {
    let directory = directory();
    directory.publish_shared(&shared_changes(&[], &[1, 2]));
    directory.publish_shared(&shared_changes(&[2], &[]));
    assert!(matches!(lookup(&directory, 2, [10, 0, 0, 5]), LookupState::Gone));
    assert!(matches!(lookup(&directory, 3, [10, 0, 0, 5]), LookupState::Pending { .. }), "not published yet");
}

#[test]
fn publishing_one_part_keeps_the_other() {
    let directory = directory();
    directory.publish_shared(&shared_changes(&[], &[1]));
    directory.publish(&BindingChanges::default());
    assert!(matches!(lookup(&directory, 1, [10, 0, 0, 5]), LookupState::Shared(_)));
    let changes = directory.clients().changes();
    directory.publish_shared(&shared_changes(&[1], &[]));
    assert!(changes.has_changed().unwrap(), "waiting requests are woken");
    assert!(matches!(lookup(&directory, 1, [10, 0, 0, 5]), LookupState::Gone));
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
    let found = |entry| {
        let owner = Owner::from_entry(&entry, by_network().auth());
        by_network().identity(&owner).map(|identity| identity.instance())
    };
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
        Owner::from_entry(&Entry::Incomplete(Arc::new(record)), by_network().auth())
    };
    let mac = Some(MacAddress([0xfa, 0x16, 0x3e, 0, 0, 1]));
    for source in SourceKind::ALL {
        let confirmed = matches!(source, SourceKind::StaticFile | SourceKind::OvnSouthbound);
        let is_served = |owner: &Owner| by_network().identity(owner).is_some();
        assert_eq!(is_served(&owner(None, *source)), confirmed, "{source}");
        assert_eq!(owner(None, *source) == Owner::Unknown, !confirmed, "{source}");
        assert!(is_served(&owner(mac, *source)), "{source}");
    }
}

fn known(id: u32) -> BindingChanges<Binding> {
    let addressing = PortAddressing::default();
    let (instance, project) = (InstanceId::new(Uuid::from_u128(id.into())), "acme".parse().unwrap());
    let owner = Owner::Known(Arc::new(Port { id: None, device: None, instance, project, addressing }));
    let mut changes = changes(&[], &[id]);
    for (_, binding) in &mut changes.updated {
        *binding = Arc::new(Binding { owner: owner.clone(), ..Binding::clone(binding) });
    }
    changes
}

/// Returns whether the identity is signed with the secrets in force.
fn is_current(directory: &Directory, id: u32) -> bool {
    let state = lookup(directory, id, [10, 0, 0, 5]);
    let LookupState::Known(identity) = state else { panic!("{state:?}") };
    !identity.is_outdated(&directory.clients().secrets())
}

#[tokio::test]
async fn replaced_secrets_sign_every_identity_again() {
    let signer = Signer::new("a".into());
    let directory = Arc::new(Directory::new(Credentials::Signed(signer.clone())));
    // More than are signed at once.
    let ids = 1..=2 * u32::try_from(SIGNED_AT_ONCE).unwrap();
    for id in ids.clone() {
        directory.publish(&known(id));
    }
    directory.publish(&changes(&[], &[1000]));
    // Replaced once before the task begins, and once while it waits.
    signer.replace(vec!["b".into()]);
    assert!(ids.clone().all(|id| !is_current(&directory, id)));
    let (stop, followed) = (CancellationToken::new(), Arc::clone(&directory));
    let token = stop.clone();
    let follow = tokio::spawn(async move { followed.follow_secrets(token).await });
    let mut changed = directory.clients().changes();
    for secret in ["c", "d"] {
        while !ids.clone().all(|id| is_current(&directory, id)) {
            let change = tokio::time::timeout(Duration::from_mins(1), changed.changed()).await;
            change.expect("identities are signed again").unwrap();
        }
        assert!(matches!(lookup(&directory, 1000, [10, 0, 0, 5]), LookupState::Pending { .. }));
        signer.replace(vec![secret.into()]);
        // An owner that attach learned of before the rotation.
        directory.publish(&known(7));
        assert!(is_current(&directory, 7), "published after the rotation");
    }
    stop.cancel();
    follow.await.unwrap();
}

#[test]
fn only_the_attachment_of_the_agent_is_its_own() {
    let directory = directory();
    let state = |number| lookup(&directory, number, [169, 254, 169, 253]);
    directory.publish_agent(Some((attachment(7), IfIndex(4))));
    assert!(matches!(state(7), LookupState::Agent));
    assert!(matches!(state(8), LookupState::Pending { .. }), "another attachment with its address");
    assert!(directory.bindings().is_empty() && directory.len() == 0, "it is no guest's");
    directory.publish_agent(Some((attachment(9), IfIndex(5))));
    assert!(matches!(state(7), LookupState::Gone) && matches!(state(9), LookupState::Agent));
    directory.publish_agent(None);
    assert!(matches!(state(9), LookupState::Gone) && directory.agent().is_none());
}
