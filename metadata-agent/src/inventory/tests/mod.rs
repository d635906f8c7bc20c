//! The inventory as its readers see it.

mod devices;
mod ownership;
mod properties;

use std::time::Instant;

use super::*;
use crate::ids::{IfIndex, InstanceId, MacAddress, PortId};

const PORT: &str = "3f2a9d10-77c1-4e55-9d0c-2b6f4f1f0a01";
/// Shares its first eleven characters with `PORT`.
const TWIN: &str = "3f2a9d10-77ff-4e55-9d0c-2b6f4f1f0a02";
const TAP: &str = "tap3f2a9d10-77";

#[test]
fn the_version_increases_only_with_a_change() {
    let (inventory, mut publisher) = Inventory::new();
    let mut version = inventory.subscribe();
    let first = event(SourceKind::Libvirt, "d", [port(Some(PORT), 1)]);
    publisher.publish([first.clone()]);
    assert!(version.has_changed().unwrap());
    assert_eq!(*version.borrow_and_update(), inventory.load().version());
    let before = resolve(&inventory.load(), TAP, None);
    publisher.publish([first, withdrawal(SourceKind::Libvirt, "e")]);
    assert!(!version.has_changed().unwrap());
    publisher.publish([event(SourceKind::Libvirt, "e", [port(Some(TWIN), 2)])]);
    assert!(version.has_changed().unwrap());
    assert_ne!(before, resolve(&inventory.load(), TAP, None));
}

#[tokio::test]
async fn a_batch_of_events_is_published_once() {
    let (inventory, publisher) = Inventory::new();
    let mut version = inventory.subscribe();
    let (sender, events) = mpsc::channel(8);
    for n in 0..8 {
        sender.send(event(SourceKind::Libvirt, &n.to_string(), [numbered(n)])).await.unwrap();
    }
    drop(sender);
    publisher.run(events, CancellationToken::new()).await;
    assert_eq!(*version.borrow_and_update(), 1);
    assert_eq!(inventory.load().counts().ports, 8);
}

/// Prints the cost, and asserts correct results meanwhile.
#[test]
fn ten_thousand_ports_accept_a_thousand_changes() {
    let (inventory, mut publisher) = Inventory::new();
    let begin = Instant::now();
    publisher.publish([event(SourceKind::StaticFile, "f", (0..10_000).map(numbered))]);
    let load = begin.elapsed();

    let begin = Instant::now();
    for n in 0..1000 {
        let change = Port { device: device(&format!("vnet{n}")), ..numbered(n) };
        publisher.publish([event(SourceKind::Libvirt, &n.to_string(), [change])]);
    }
    let changes = begin.elapsed();

    let snapshot = inventory.load();
    let begin = Instant::now();
    for n in 0..10_000 {
        let tap = DeviceName::from_port_id(&numbered(n).id.unwrap());
        assert!(matches!(resolve(&snapshot, tap.as_str(), None), Resolution::Known(_)), "{tap}");
    }
    let lookups = begin.elapsed();
    assert!(matches!(resolve(&snapshot, "vnet999", None), Resolution::Known(_)));
    assert_eq!(snapshot.counts(), Counts { ports: 10_000, disputed: 0, ..Counts::default() });
    println!(
        "10,000 ports loaded in {load:?}; 1,000 changes, each published: {changes:?}; 10,000 lookups: {lookups:?}"
    );
}

#[test]
fn changes_of_old_snapshots_are_not_remembered() {
    let (inventory, mut publisher) = Inventory::new();
    for n in 0..100 {
        publisher.publish([event(SourceKind::Libvirt, &n.to_string(), [numbered(n)])]);
    }
    let now = inventory.load();
    let count = |version| now.changed_since(version).map(Iterator::count);
    assert_eq!((count(100), count(99), count(90)), (Some(0), Some(1), Some(10)));
    assert_eq!((count(0), count(101)), (None, None), "too long ago, and not yet");
}

fn snapshot_of(events: impl IntoIterator<Item = Event>) -> Snapshot {
    let (inventory, mut publisher) = Inventory::new();
    publisher.publish(events);
    inventory.load().as_ref().clone()
}

fn event<T: Into<PortRecord>>(source: SourceKind, key: &str, ports: impl IntoIterator<Item = T>) -> Event {
    Event { source, key: key.to_owned(), ports: ports.into_iter().map(Into::into).collect() }
}

fn withdrawal(source: SourceKind, key: &str) -> Event {
    Event { source, key: key.to_owned(), ports: Vec::new() }
}

fn port(id: Option<&str>, owner: u32) -> Port {
    Port {
        id: id.map(|id| id.parse().unwrap()),
        device: None,
        instance: instance(owner),
        project: "acme".parse().unwrap(),
        addressing: PortAddressing::default(),
    }
}

fn with_mac(text: &str, mut port: Port) -> Port {
    port.addressing.mac = mac(text);
    port
}

fn without_tenant(id: &str) -> PortRecord {
    PortRecord { id: Some(id.parse().unwrap()), ..PortRecord::default() }
}

/// Record of a source that does not know projects.
fn without_project(port: &Port) -> PortRecord {
    let tenant = Some(Tenant { instance: port.instance, project: None });
    PortRecord { tenant, ..port.clone().into() }
}

fn numbered(n: u32) -> Port {
    let id: PortId = format!("{n:08x}-0000-4000-8000-000000000000").parse().unwrap();
    with_mac("fa:16:3e:00:00:01", port(Some(&id.to_string()), n))
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

/// Result of looking up a device.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Resolution {
    Known(Arc<Port>),
    Unknown,
    NoInstance,
    Conflict,
}

impl From<Result<Option<&Entry>, AmbiguousPortError>> for Resolution {
    fn from(found: Result<Option<&Entry>, AmbiguousPortError>) -> Self {
        match found {
            Ok(Some(Entry::Agreed(port))) => Self::Known(Arc::clone(port)),
            Ok(Some(Entry::Incomplete(_)) | None) => Self::Unknown,
            Ok(Some(Entry::NoInstance(_))) => Self::NoInstance,
            Ok(Some(Entry::Disputed(_))) | Err(AmbiguousPortError) => Self::Conflict,
        }
    }
}

fn resolve(snapshot: &Snapshot, device: &str, link_mac: Option<MacAddress>) -> Resolution {
    snapshot.find(device, link_mac).into()
}

fn resolve_at(snapshot: &Snapshot, device: &str, index: IfIndex, link_mac: Option<MacAddress>) -> Resolution {
    snapshot.find_at(device, index, link_mac).into()
}
