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

fn told(id: &str) -> Told {
    let id = id.parse().unwrap();
    let facts = PortRecord { id: Some(id), ..PortRecord::default() };
    (id, Ok(Said { facts, subports: None }))
}

fn told_trunk(subports: u64) -> Told {
    let (id, said) = told(PORT);
    let subport = |tag| {
        let vlan = crate::ids::VlanId::try_from(tag).unwrap();
        PortRecord { seat: Some(TrunkBinding { parent: id, vlan }), ..PortRecord::default() }
    };
    (id, said.map(|said| Said { subports: Some(Ok((1..=subports).map(subport).collect())), ..said }))
}

fn says(events: &[Event]) -> Vec<(&str, usize)> {
    events.iter().map(|event| (event.key.as_str(), event.ports.len())).collect()
}

/// A survey that has looked at the host already.
fn opened(now: Instant) -> Survey {
    let mut survey = Survey::new(now);
    let first = survey.question(now + OPENING).unwrap();
    assert_eq!(first.ports, Wanted::OfHost);
    assert_eq!(survey.answer(&first, &[], now), []);
    assert_eq!(survey.next(), None);
    survey
}

#[test]
fn the_host_is_looked_at_once_even_if_nothing_is_missing() {
    let now = Instant::now();
    let mut survey = Survey::new(now);
    assert_eq!(survey.next(), Some(now + OPENING));
    assert_eq!(survey.follow(&[present(1, Need::Nothing)], now), []);
    assert_eq!(survey.next(), Some(now + GATHER));
    let question = survey.question(now + GATHER).unwrap();
    survey.answer(&question, &[told(PORT)], now);
    assert_eq!((survey.next(), survey.ports()), (None, 0));
}

#[test]
fn a_port_is_accepted_by_its_id_alone() {
    let now = Instant::now();
    let mut survey = opened(now);
    survey.follow(&[present(1, Need::Identity)], now);
    let question = survey.question(now + GATHER).unwrap();
    assert_eq!(question.ports, Wanted::Macs(["fa:16:3e:00:00:01".parse().unwrap()].into()));
    assert!(question.is_about(PORT.parse().unwrap()) && !question.is_about(OTHER.parse().unwrap()));
    assert_eq!(survey.answer(&question, &[told(OTHER)], now), []);
    // Two that the name fits are both told: the inventory decides by the MAC address, or not at all.
    let events = survey.answer(&question, &[told(PORT), told(TWIN), told(OTHER)], now);
    assert_eq!(says(&events), [(PORT, 1), (TWIN, 1)]);
}

#[test]
fn of_an_interface_with_another_name_nothing_is_asked_unless_its_port_is_known() {
    let now = Instant::now();
    let mut survey = opened(now);
    let odd = Present { device: "tap-odd".parse().unwrap(), ..present(1, Need::Identity) };
    survey.follow(std::slice::from_ref(&odd), now);
    assert_eq!(survey.next(), None);
    let id: PortId = OTHER.parse().unwrap();
    survey.follow(&[Present { port: Some(id), ..odd }], now);
    let question = survey.question(now + GATHER).unwrap();
    assert_eq!(question.ports, Wanted::Ids([id].into()));
    assert_eq!(says(&survey.answer(&question, &[told(OTHER)], now)), [(OTHER, 1)]);
}

#[test]
fn what_is_not_found_is_asked_for_ever_more_seldom_and_by_turns_among_all() {
    let mut now = Instant::now();
    let mut survey = opened(now);
    survey.follow(&[present(1, Need::Identity)], now);
    let mut pauses = Vec::new();
    let mut of_host = 0;
    for _ in 0..9 {
        let due = survey.next().unwrap();
        assert!(survey.question(due - Duration::from_millis(1)).is_none());
        pauses.push((due - now).as_secs());
        now = due;
        let question = survey.question(now).unwrap();
        of_host += usize::from(question.ports == Wanted::OfHost);
        assert_eq!(survey.answer(&question, &[], now), []);
    }
    assert_eq!(pauses, [0, 2, 4, 8, 16, 32, 60, 60, 60]);
    assert_eq!(of_host, 4);
}

#[test]
fn many_new_interfaces_are_one_question_about_the_host_and_then_few_about_the_rest() {
    let now = Instant::now();
    let mut survey = opened(now);
    let id = |number: u8| PortId::new(uuid::Uuid::from_bytes([number; 16]));
    let many: Vec<_> = (1..=150)
        .map(|number| Present { port: Some(id(number)), ..present(number.into(), Need::Identity) })
        .collect();
    survey.follow(&many, now);
    let now = now + GATHER;
    let question = survey.question(now).unwrap();
    assert_eq!((&question.ports, question.about.len()), (&Wanted::OfHost, 150));
    // A third is bound here; the others migrate.
    let bound: Vec<_> = (1..=50).map(|number| told(&id(number).to_string())).collect();
    assert_eq!(survey.answer(&question, &bound, now).len(), 50);
    let mut questions = 0;
    while let Some(question) = survey.question(now) {
        let Wanted::Ids(ids) = &question.ports else { panic!("{question:?}") };
        assert!(ids.len() <= SOME);
        survey.answer(&question, &[], now);
        questions += 1;
    }
    assert_eq!(questions, 2);
}

#[test]
fn what_was_said_ends_with_the_interface_and_the_next_of_the_name_is_asked_about_anew() {
    let now = Instant::now();
    let mut survey = opened(now);
    survey.follow(&[present(1, Need::Identity)], now);
    let question = survey.question(now + GATHER).unwrap();
    assert_eq!(says(&survey.answer(&question, &[told(PORT)], now)), [(PORT, 1)]);
    survey.follow(&[present(1, Need::Nothing)], now);
    assert_eq!(survey.next(), None);
    // Gone and back between two looks.
    let events = survey.follow(&[present(2, Need::Identity)], now);
    assert_eq!(says(&events), [(PORT, 0)]);
    // An answer to the question about the old one says nothing of the new one.
    assert_eq!(survey.answer(&question, &[told(PORT)], now), []);
    assert_eq!(survey.next(), Some(now + GATHER));
    assert_eq!(says(&survey.follow(&[], now)), []);
    assert_eq!(survey.next(), None);
}

#[test]
fn a_judgement_names_the_instances_that_were_asked_about_and_outlives_a_fault() {
    let now = Instant::now();
    let mut survey = opened(now);
    let id: PortId = PORT.parse().unwrap();
    let known = |need| Present { port: Some(id), ..present(1, need) };
    survey.follow(&[known(Need::Nothing)], now);
    let [one, other] = [1, 2].map(|number| InstanceId::new(uuid::Uuid::from_u128(number)));
    let named = BTreeSet::from([one, other]);
    survey.follow(&[known(Need::Arbitration(named.clone()))], now);
    let question = survey.question(now + GATHER).unwrap();
    assert_eq!(question.ports, Wanted::Ids([id].into()));
    let events = survey.answer(&question, &[told(PORT)], now);
    assert_eq!(events[0].ports[0].judged, named);

    survey.follow(&[known(Need::Nothing)], now);
    survey.failed(now);
    let question = survey.question(now).unwrap();
    assert_eq!(survey.answer(&question, &[told(PORT)], now), []);
}

#[test]
fn what_is_not_among_the_hosts_ports_any_more_is_withdrawn_once_its_own_id_finds_nothing() {
    let now = Instant::now();
    let mut survey = opened(now);
    survey.follow(&[present(1, Need::Identity)], now);
    let question = survey.question(now + GATHER).unwrap();
    survey.answer(&question, &[told(PORT)], now);
    let served = Present { port: Some(PORT.parse().unwrap()), ..present(1, Need::Nothing) };
    survey.follow(std::slice::from_ref(&served), now);
    survey.failed(now);
    let of_host = survey.question(now).unwrap();
    assert_eq!(survey.answer(&of_host, &[], now), []);
    // The presence is told again meanwhile, and is as it was.
    survey.follow(&[served], now);
    let question = survey.question(now).unwrap();
    assert_eq!(question.ports, Wanted::Ids([PORT.parse().unwrap()].into()));
    assert_eq!(says(&survey.answer(&question, &[], now)), [(PORT, 0)]);
}

#[test]
fn the_parent_of_a_trunk_is_asked_about_as_long_as_it_is_one() {
    let mut now = Instant::now();
    let mut survey = opened(now);
    survey.follow(&[present(1, Need::Identity)], now);
    let known = Present { port: Some(PORT.parse().unwrap()), ..present(1, Need::Nothing) };
    for subports in [1, 0, 2] {
        now = survey.next().unwrap();
        let question = survey.question(now).unwrap();
        let events = survey.answer(&question, &[told_trunk(subports)], now);
        assert_eq!(says(&events), [(PORT, 1 + usize::try_from(subports).unwrap())]);
        survey.follow(std::slice::from_ref(&known), now);
    }
    let question = survey.question(survey.next().unwrap()).unwrap();
    assert_eq!(says(&survey.answer(&question, &[told(PORT)], now)), [(PORT, 1)]);
    assert_eq!(survey.next(), None);
}
