//! The decisions of the BPF programs in their host build: rows of the packet table, by their names.

use std::hint::black_box;

use anyhow::Context as _;
use metadata_ebpf::from_guest::from_guest;
use metadata_ebpf::host::HostSkb;
use metadata_ebpf::to_guest::to_guest;
use metadata_tests::packets::world::{IFINDEX, host_world};
use metadata_tests::packets::{Case, Program, cases};

use super::meter::{Performance, Subject};

const ROUNDS: u64 = 100;
/// First the cost of traffic that does not concern us, then the packets of a connection.
const ROWS: [&str; 9] = [
    "TCP to another address",
    "UDP to port 80",
    "ARP for another address",
    "TCP over IPv6 to another address",
    "ARP for the address",
    "a SYN",
    "a SYN of a known client",
    "a request",
    "an answer",
];

pub fn perform() -> anyhow::Result<Vec<Subject>> {
    let table = cases();
    let row = |name: &str| table.iter().find(|case| case.name == name);
    ROWS.iter().map(|name| Ok(decide(row(name).with_context(|| format!("no row `{name}`"))?))).collect()
}

fn decide(case: &Case) -> Subject {
    let mut performance = Performance::begin(&format!("packet: {}", case.name));
    for _ in 0..ROUNDS {
        // New ones, because the first packet changes both.
        let (mut skb, world) = (HostSkb::new(case.frame.clone(), IFINDEX), host_world(&case.state));
        performance.round();
        performance.count(|| match case.program {
            Program::FromGuest => black_box(from_guest(black_box(&mut skb), &world)),
            Program::ToGuest => black_box(Some(to_guest(black_box(&mut skb), &world))),
        });
    }
    performance.end()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_decision_is_a_row_of_the_packet_table() {
        let subjects = perform().expect("all rows");
        assert_eq!(subjects.len(), ROWS.len());
        assert!(subjects.iter().all(|subject| subject.rounds == ROUNDS && subject.calls == ROUNDS));
        let ordinary = &subjects[0];
        assert_eq!(ordinary.allocations, 0, "{ordinary:?}");
    }
}
