//! Queries and events of the poller.

use super::*;
use crate::ids::InstanceId;
use crate::inventory::{PortRecord, TrunkBinding};

const PORT: &str = "3f2a9d10-77c1-4e55-9d0c-2b6f4f1f0a01";
const TWIN: &str = "3f2a9d10-77ff-4e55-9d0c-2b6f4f1f0a02";
const OTHER: &str = "aaaaaaaa-77c1-4e55-9d0c-2b6f4f1f0a03";
const TAP: &str = "tap3f2a9d10-77";
const TAPS_MAC: &str = "fe:16:3e:00:00:01";

fn present(index: u32, need: Need) -> Present {
    Present {
        device: TAP.parse().unwrap(),
        index: IfIndex(index),
        mac: Some(TAPS_MAC.parse().unwrap()),
        port: None,
        need,
    }
}

fn found(id: &str) -> ParsedPort {
    let id = id.parse().unwrap();
    let record = PortRecord { id: Some(id), ..PortRecord::default() };
    (id, Ok(PortDetails { record, subports: None }))
}

fn found_trunk(subports: u64) -> ParsedPort {
    let (id, details) = found(PORT);
    let subport = |tag| {
        let vlan = crate::ids::VlanId::try_from(tag).unwrap();
        PortRecord { trunk: Some(TrunkBinding { parent: id, vlan }), ..PortRecord::default() }
    };
    (
        id,
        details.map(|details| PortDetails {
            subports: Some(Ok((1..=subports).map(subport).collect())),
            ..details
        }),
    )
}

fn counts(events: &[Event]) -> Vec<(&str, usize)> {
    events.iter().map(|event| (event.key.as_str(), event.ports.len())).collect()
}

/// Returns a poller after its first query.
fn started(now: Instant) -> PortPoller {
    let mut poller = PortPoller::new();
    poller.update_presence(&[], now);
    let first = poller.query(now + GATHER).unwrap();
    assert_eq!(first.ports, PortSelection::Host);
    assert_eq!(poller.handle_response(&first, &[], now), []);
    assert_eq!(poller.next_due(), None);
    poller
}

#[test]
fn the_host_is_queried_once_even_if_nothing_is_missing() {
    let now = Instant::now();
    let mut poller = PortPoller::new();
    assert_eq!(poller.next_due(), None, "the interfaces are not known yet");
    assert_eq!(poller.update_presence(&[present(1, Need::Nothing)], now), []);
    assert_eq!(poller.next_due(), Some(now + GATHER));
    let query = poller.query(now + GATHER).unwrap();
    poller.handle_response(&query, &[found(PORT)], now);
    assert_eq!((poller.next_due(), poller.ports()), (None, 0));
}

/// The response may be older than the interface, so only the ids in it are used.
#[test]
fn a_later_interface_of_a_listed_port_is_queried_by_its_id() {
    let now = Instant::now();
    let mut poller = PortPoller::new();
    poller.update_presence(&[], now);
    let first = poller.query(now + GATHER).unwrap();
    poller.keep_listed(&first, [PORT, TWIN, OTHER].map(|id| id.parse().unwrap()).into());
    assert_eq!(poller.handle_response(&first, &[], now), []);
    assert_eq!(poller.update_presence(&[present(1, Need::Identity)], now), []);
    let query = poller.query(now + GATHER).unwrap();
    assert_eq!(query.ports, PortSelection::Ids([PORT, TWIN].map(|id| id.parse().unwrap()).into()));
    poller.keep_listed(&query, BTreeSet::new());

    // Both ports were deleted, and the interface has a new one: no identity, and no delay.
    assert_eq!(poller.handle_response(&query, &[], now), []);
    let query = poller.query(now).unwrap();
    assert_eq!(query.ports, PortSelection::Macs(["fa:16:3e:00:00:01".parse().unwrap()].into()));

    // The next interface of the port is queried as well, however often the first one was.
    let events = poller.handle_response(&query, &[found(PORT)], now);
    assert_eq!(counts(&events), [(PORT, 1)]);
    let events = poller.update_presence(&[present(2, Need::Identity)], now);
    assert_eq!(counts(&events), [(PORT, 0)]);
    let query = poller.query(now + GATHER).unwrap();
    assert_eq!(query.ports, PortSelection::Ids([PORT, TWIN].map(|id| id.parse().unwrap()).into()));
}

#[test]
fn a_response_does_not_apply_to_interfaces_that_appeared_later() {
    let now = Instant::now();
    let mut poller = PortPoller::new();
    poller.update_presence(&[], now);
    let query = poller.query(now + GATHER).unwrap();
    poller.update_presence(&[present(1, Need::Identity)], now);
    assert_eq!(poller.handle_response(&query, &[found(PORT)], now), []);
    assert_eq!(poller.ports(), 0);
}

#[test]
fn a_port_is_matched_only_by_its_id() {
    let now = Instant::now();
    let mut poller = started(now);
    poller.update_presence(&[present(1, Need::Identity)], now);
    let query = poller.query(now + GATHER).unwrap();
    assert_eq!(query.ports, PortSelection::Macs(["fa:16:3e:00:00:01".parse().unwrap()].into()));
    assert!(query.matches(PORT.parse().unwrap()) && !query.matches(OTHER.parse().unwrap()));
    assert_eq!(poller.handle_response(&query, &[found(OTHER)], now), []);
    // Two ports with this name are both reported: the inventory decides by the MAC address.
    let events = poller.handle_response(&query, &[found(PORT), found(TWIN), found(OTHER)], now);
    assert_eq!(counts(&events), [(PORT, 1), (TWIN, 1)]);
}

#[test]
fn an_interface_with_another_name_needs_a_known_port() {
    let now = Instant::now();
    let mut poller = started(now);
    let odd = Present { device: "tap-odd".parse().unwrap(), ..present(1, Need::Identity) };
    poller.update_presence(std::slice::from_ref(&odd), now);
    assert_eq!(poller.next_due(), None);
    let id: PortId = OTHER.parse().unwrap();
    poller.update_presence(&[Present { port: Some(id), ..odd }], now);
    let query = poller.query(now + GATHER).unwrap();
    assert_eq!(query.ports, PortSelection::Ids([id].into()));
    assert_eq!(counts(&poller.handle_response(&query, &[found(OTHER)], now)), [(OTHER, 1)]);
}

#[test]
fn a_missing_port_is_queried_with_growing_pauses() {
    let mut now = Instant::now();
    let mut poller = started(now);
    poller.update_presence(&[present(1, Need::Identity)], now);
    let mut pauses = Vec::new();
    let mut of_host = 0;
    for _ in 0..9 {
        let due = poller.next_due().unwrap();
        assert!(poller.query(due - Duration::from_millis(1)).is_none());
        pauses.push((due - now).as_secs());
        now = due;
        let query = poller.query(now).unwrap();
        of_host += usize::from(query.ports == PortSelection::Host);
        assert_eq!(poller.handle_response(&query, &[], now), []);
    }
    assert_eq!(pauses, [0, 0, 2, 4, 8, 16, 32, 60, 60]);
    assert_eq!(of_host, 4);
}

#[test]
fn many_new_interfaces_cause_one_query_about_the_host() {
    let now = Instant::now();
    let mut poller = started(now);
    let id = |number: u8| PortId::new(uuid::Uuid::from_bytes([number; 16]));
    let many: Vec<_> = (1..=150)
        .map(|number| Present { port: Some(id(number)), ..present(number.into(), Need::Identity) })
        .collect();
    poller.update_presence(&many, now);
    let now = now + GATHER;
    let query = poller.query(now).unwrap();
    assert_eq!((&query.ports, query.about.len()), (&PortSelection::Host, 150));
    // A third is bound to this host; the others are migrating.
    let bound: Vec<_> = (1..=50).map(|number| found(&id(number).to_string())).collect();
    assert_eq!(poller.handle_response(&query, &bound, now).len(), 50);
    let mut queries = 0;
    while let Some(query) = poller.query(now) {
        let PortSelection::Ids(ids) = &query.ports else { panic!("{query:?}") };
        assert!(ids.len() <= MAX_IDS);
        poller.handle_response(&query, &[], now);
        queries += 1;
    }
    assert_eq!(queries, 2);
}

#[test]
fn a_new_interface_of_the_same_name_is_queried_again() {
    let now = Instant::now();
    let mut poller = started(now);
    poller.update_presence(&[present(1, Need::Identity)], now);
    let query = poller.query(now + GATHER).unwrap();
    assert_eq!(counts(&poller.handle_response(&query, &[found(PORT)], now)), [(PORT, 1)]);
    poller.update_presence(&[present(1, Need::Nothing)], now);
    assert_eq!(poller.next_due(), None);
    // The interface was replaced between two updates.
    let events = poller.update_presence(&[present(2, Need::Identity)], now);
    assert_eq!(counts(&events), [(PORT, 0)]);
    // A response about the old interface does not apply to the new one.
    assert_eq!(poller.handle_response(&query, &[found(PORT)], now), []);
    assert_eq!(poller.next_due(), Some(now + GATHER));
    assert_eq!(counts(&poller.update_presence(&[], now)), []);
    assert_eq!(poller.next_due(), None);
}

#[test]
fn an_arbitration_names_its_instances_and_survives_a_failure() {
    let now = Instant::now();
    let mut poller = started(now);
    let id: PortId = PORT.parse().unwrap();
    let known = |need| Present { port: Some(id), ..present(1, need) };
    poller.update_presence(&[known(Need::Nothing)], now);
    let [one, other] = [1, 2].map(|number| InstanceId::new(uuid::Uuid::from_u128(number)));
    let named = BTreeSet::from([one, other]);
    poller.update_presence(&[known(Need::Arbitration(named.clone()))], now);
    let query = poller.query(now + GATHER).unwrap();
    assert_eq!(query.ports, PortSelection::Ids([id].into()));
    let events = poller.handle_response(&query, &[found(PORT)], now);
    assert_eq!(events[0].ports[0].arbitrated, named);

    poller.update_presence(&[known(Need::Nothing)], now);
    poller.failed(now);
    let query = poller.query(now).unwrap();
    assert_eq!(poller.handle_response(&query, &[found(PORT)], now), []);
}

#[test]
fn a_port_that_left_the_host_is_withdrawn_after_a_second_query() {
    let now = Instant::now();
    let mut poller = started(now);
    poller.update_presence(&[present(1, Need::Identity)], now);
    let query = poller.query(now + GATHER).unwrap();
    poller.handle_response(&query, &[found(PORT)], now);
    let served = Present { port: Some(PORT.parse().unwrap()), ..present(1, Need::Nothing) };
    poller.update_presence(std::slice::from_ref(&served), now);
    poller.failed(now);
    let of_host = poller.query(now).unwrap();
    assert_eq!(poller.handle_response(&of_host, &[], now), []);
    // The presence is published again without a change.
    poller.update_presence(&[served], now);
    let query = poller.query(now).unwrap();
    assert_eq!(query.ports, PortSelection::Ids([PORT.parse().unwrap()].into()));
    assert_eq!(counts(&poller.handle_response(&query, &[], now)), [(PORT, 0)]);
}

#[test]
fn the_parent_of_a_trunk_is_queried_repeatedly() {
    let mut now = Instant::now();
    let mut poller = started(now);
    poller.update_presence(&[present(1, Need::Identity)], now);
    let known = Present { port: Some(PORT.parse().unwrap()), ..present(1, Need::Nothing) };
    for subports in [1, 0, 2] {
        now = poller.next_due().unwrap();
        let query = poller.query(now).unwrap();
        let events = poller.handle_response(&query, &[found_trunk(subports)], now);
        assert_eq!(counts(&events), [(PORT, 1 + usize::try_from(subports).unwrap())]);
        poller.update_presence(std::slice::from_ref(&known), now);
    }
    let query = poller.query(poller.next_due().unwrap()).unwrap();
    assert_eq!(counts(&poller.handle_response(&query, &[found(PORT)], now)), [(PORT, 1)]);
    assert_eq!(poller.next_due(), None);
}

/// Returns a poller that has reported the port of interface 1.
fn with_reported_port(now: Instant) -> PortPoller {
    let mut poller = started(now);
    poller.update_presence(&[present(1, Need::Identity)], now);
    let query = poller.query(now + GATHER).unwrap();
    assert_eq!(counts(&poller.handle_response(&query, &[found(PORT)], now)), [(PORT, 1)]);
    let known = Present { port: Some(PORT.parse().unwrap()), ..present(1, Need::Nothing) };
    poller.update_presence(&[known], now);
    assert_eq!(poller.next_due(), None);
    poller
}

/// Returns the same port with other addresses.
fn readdressed(last: u8) -> ParsedPort {
    let (id, details) = found(PORT);
    let details = details.map(|mut details| {
        details.record.addressing.fixed_ips = vec![[10, 0, 0, last].into()];
        details
    });
    (id, details)
}

#[test]
fn a_refused_port_is_queried_at_once_and_then_rarely() {
    let mut now = Instant::now();
    let mut poller = with_reported_port(now);
    let mut pauses = Vec::new();
    for _ in 0..8 {
        // However many refusals there are.
        for _ in 0..100 {
            poller.recheck(IfIndex(1), now);
        }
        let due = poller.next_due().unwrap();
        assert!(poller.query(due - Duration::from_millis(1)).is_none());
        pauses.push((due - now).as_secs());
        now = due;
        let query = poller.query(now).unwrap();
        assert_eq!(query.ports, PortSelection::Ids([PORT.parse().unwrap()].into()));
        assert_eq!(poller.handle_response(&query, &[found(PORT)], now), [], "nothing changed");
        assert_eq!(poller.next_due(), None, "without a refusal there is no query");
    }
    assert_eq!(pauses, [0, 2, 4, 8, 16, 32, 60, 60]);

    // A change, and a long time without refusals, each end the long pauses.
    poller.recheck(IfIndex(1), now);
    now = poller.next_due().unwrap();
    let query = poller.query(now).unwrap();
    assert_eq!(counts(&poller.handle_response(&query, &[readdressed(6)], now)), [(PORT, 1)]);
    poller.recheck(IfIndex(1), now);
    assert_eq!(poller.next_due(), Some(now + FIRST_PAUSE));
    now += Duration::from_hours(1);
    poller.recheck(IfIndex(1), now);
    assert!(poller.next_due().unwrap() <= now + GATHER);
}

#[test]
fn only_reported_ports_are_queried_after_a_refusal() {
    let now = Instant::now();
    let mut poller = started(now);
    let known = Present { port: Some(PORT.parse().unwrap()), ..present(1, Need::Nothing) };
    poller.update_presence(&[known], now);
    poller.recheck(IfIndex(1), now);
    poller.recheck(IfIndex(2), now);
    assert_eq!(poller.next_due(), None, "another source states what the port may send");
}

#[test]
fn refusals_of_many_ports_share_one_query_per_second() {
    let now = Instant::now();
    let mut poller = started(now);
    let id = |number: u8| PortId::new(uuid::Uuid::from_bytes([number; 16]));
    let known = |number: u8, need| Present { port: Some(id(number)), ..present(number.into(), need) };
    let all = || (1..=150).map(|number| found(&id(number).to_string())).collect::<Vec<_>>();
    poller.update_presence(&(1..=150).map(|number| known(number, Need::Identity)).collect::<Vec<_>>(), now);
    let first = poller.query(now + GATHER).unwrap();
    assert_eq!(poller.handle_response(&first, &all(), now).len(), 150);
    poller.update_presence(&(1..=150).map(|number| known(number, Need::Nothing)).collect::<Vec<_>>(), now);

    for index in 1..=150 {
        poller.recheck(IfIndex(index), now);
    }
    let mut times = Vec::new();
    while let Some(due) = poller.next_due() {
        let query = poller.query(due).unwrap();
        let PortSelection::Ids(ids) = &query.ports else { panic!("{query:?}") };
        assert!(ids.len() <= MAX_IDS);
        times.push((due - now).as_millis());
        assert_eq!(poller.handle_response(&query, &all(), due), []);
    }
    assert_eq!(times, [50, 1050, 2050]);
}
