//! Attachments that many guests share.

use super::*;
use crate::proxy::Directory as _;

const NETWORK: &str = "11111111-1111-4111-8111-111111111111";

fn attachment(id: u32) -> AttachmentId {
    AttachmentId::new(id).unwrap()
}

fn scope() -> NetworkOrRouter {
    NetworkOrRouter::Network(NETWORK.parse().unwrap())
}

fn change(gone: &[u32], now: &[u32]) -> BindingChanges<SharedBinding> {
    let binding = |id: &u32| SharedBinding {
        namespace: format!("qdhcp-{NETWORK}").into(),
        interface: format!("tap{id}"),
        index: IfIndex(*id),
        since: Instant::now(),
        scope: scope(),
    };
    BindingChanges {
        removed: gone.iter().copied().map(attachment).collect(),
        updated: now.iter().map(|id| (attachment(*id), Arc::new(binding(id)))).collect(),
    }
}

fn standing(directory: &Directory, id: u32, address: [u8; 4]) -> LookupState {
    directory.lookup(&ClientAddress::ipv4(attachment(id), address))
}

#[test]
fn all_guests_of_a_shared_attachment_stand_at_its_place() {
    let directory = Directory::default();
    directory.publish_shared(&change(&[], &[1]));
    for address in [[10, 0, 0, 5], [10, 0, 0, 6]] {
        assert!(matches!(standing(&directory, 1, address), LookupState::Shared(found) if found == scope()));
    }
}

#[test]
fn one_that_was_shared_is_gone_with_its_namespace_and_one_that_is_not_told_yet_is_waited_for() {
    let directory = Directory::default();
    directory.publish_shared(&change(&[], &[1, 2]));
    directory.publish_shared(&change(&[2], &[]));
    assert!(matches!(standing(&directory, 2, [10, 0, 0, 5]), LookupState::Gone));
    assert!(matches!(standing(&directory, 3, [10, 0, 0, 5]), LookupState::Pending { .. }));
}

#[test]
fn neither_part_of_the_table_loses_by_news_of_the_other() {
    let directory = Directory::default();
    directory.publish_shared(&change(&[], &[1]));
    directory.publish(&BindingChanges::default());
    assert!(matches!(standing(&directory, 1, [10, 0, 0, 5]), LookupState::Shared(_)));
    let changes = directory.changes();
    directory.publish_shared(&change(&[1], &[]));
    assert!(changes.has_changed().unwrap(), "who waits is woken");
    assert!(matches!(standing(&directory, 1, [10, 0, 0, 5]), LookupState::Gone));
}

/// Knows one guest, by its address and the MAC address that it sends from.
struct Guest(ClientQuery);

impl ClientLookup for Guest {
    fn find(&self, caller: &ClientQuery) -> impl Future<Output = LookupOutcome> + Send {
        std::future::ready(if *caller == self.0 {
            LookupOutcome::NotAnInstance
        } else {
            LookupOutcome::NotFound
        })
    }
}

#[tokio::test]
async fn who_a_guest_is_is_asked_with_the_mac_address_that_the_kernel_saw() {
    let mac = MacAddress([0xfa, 0x16, 0x3e, 0, 0, 1]);
    let client = ClientAddress::ipv4(attachment(1), [10, 0, 0, 5]);
    let guest = Guest(ClientQuery { scope: scope(), address: [10, 0, 0, 5].into(), mac: Some(mac) });
    let seen = move |address: &ClientAddress| (*address == client).then_some(mac);
    let directory = ClientDirectory::new(Arc::new(Directory::default()), guest, seen);
    assert!(matches!(directory.find(scope(), &client).await, LookupOutcome::NotAnInstance));
    let other = ClientAddress::ipv4(attachment(2), [10, 0, 0, 5]);
    assert!(
        matches!(directory.find(scope(), &other).await, LookupOutcome::NotFound),
        "of it no MAC address is known"
    );
}
