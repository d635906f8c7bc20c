//! Checks of the table's rows, and the run of all rows in the kernel.

use etherparse::{LaxPacketHeaders, NetHeaders, TransportHeader};
use metadata_ebpf::abi::{AttachmentState, Client, Refusal, Refusals};
use metadata_ebpf::identity::{ClientAddress, ClientMac};
use metadata_ebpf::reason::Reason;

use super::kernel::{Fixture, Kernel, verdict_of};
use super::world::client;
use super::{ATTACHMENT, Case, NETWORK, Program, cases};

/// Runs every row through the programs in the kernel.
pub fn assert_in_kernel() {
    each_in_the_kernel("packets", run);
}

/// Runs `run` for each row, in a kernel whose portal listens if the row says so.
pub(super) fn each_in_the_kernel(label: &str, mut run: impl FnMut(&mut Kernel, &Case) + Send) {
    Fixture::set_up(label, |fixture| {
        let mut kernel = fixture.load();
        let (listening, not_listening): (Vec<_>, Vec<_>) =
            cases().into_iter().partition(|case| case.state.listening);
        let ends = fixture.listen();
        for case in &listening {
            run(&mut kernel, case);
        }
        drop(ends);
        for case in &not_listening {
            run(&mut kernel, case);
        }
    });
}

fn run(kernel: &mut Kernel, case: &Case) {
    kernel.set(&case.state);
    let before = kernel.counters();
    let mut frame = vec![0; 4096];
    let (verdict, len) = kernel.test_run(case.program, &case.frame, &mut frame);
    frame.truncate(len);
    let counted = kernel.counted_since(&before);
    assert!(counted.len() <= 1, "{}: counted once, not as {counted:?}", case.name);
    assert_eq!(verdict, verdict_of(case.reason), "{}: the verdict", case.name);
    assert_outcome(case, counted.first().copied(), &frame);
    assert_recorded(case, kernel.client(case.identity()));
    assert_noted(case, &kernel.attachment());
    assert_refused(case, &kernel.refusals(), &kernel.reports());
}

/// Checks the outcome for a frame and its checksums.
pub fn assert_outcome(case: &Case, reason: Option<Reason>, frame: &[u8]) {
    assert_eq!(reason, case.reason, "{}", case.name);
    let expected = case.rewritten.as_ref().unwrap_or(&case.frame);
    assert_eq!(frame, expected, "{}: the frame", case.name);
    if case.rewritten.is_some() {
        assert_checksums(case, frame);
    }
}

/// Checks every checksum of a rewritten frame with etherparse.
fn assert_checksums(case: &Case, frame: &[u8]) {
    let headers = LaxPacketHeaders::from_ethernet(frame).expect(case.name);
    let payload = headers.payload.slice();
    match (headers.net.expect(case.name), headers.transport) {
        (NetHeaders::Ipv4(ip, _), Some(TransportHeader::Tcp(tcp))) => {
            assert_eq!(ip.header_checksum, ip.calc_header_checksum(), "{}: IPv4 header checksum", case.name);
            assert_eq!(
                tcp.checksum,
                tcp.calc_checksum_ipv4(&ip, payload).expect(case.name),
                "{}: TCP checksum",
                case.name
            );
        }
        (NetHeaders::Ipv4(ip, _), Some(TransportHeader::Icmpv4(icmp))) => {
            assert_eq!(ip.header_checksum, ip.calc_header_checksum(), "{}: IPv4 header checksum", case.name);
            assert_eq!(icmp.checksum, icmp.icmp_type.calc_checksum(payload), "{}: ICMP checksum", case.name);
        }
        (NetHeaders::Ipv6(ip, _), Some(TransportHeader::Tcp(tcp))) => {
            assert_eq!(
                tcp.checksum,
                tcp.calc_checksum_ipv6(&ip, payload).expect(case.name),
                "{}: TCP checksum",
                case.name
            );
        }
        (NetHeaders::Ipv6(ip, _), Some(TransportHeader::Icmpv6(icmp))) => {
            let checksum = icmp.icmp_type.calc_checksum(ip.source, ip.destination, payload);
            assert_eq!(icmp.checksum, checksum.expect(case.name), "{}: ICMPv6 checksum", case.name);
        }
        (NetHeaders::Arp(_), None) => {}
        other => panic!("{}: an unexpected frame: {other:?}", case.name),
    }
}

/// Checks the client's record: a SYN alone does not create one.
pub fn assert_recorded(case: &Case, record: Option<Client>) {
    let (reason, is_known) = (case.reason, case.state.client_known);
    if reason == Some(Reason::ConnectionOpened) {
        let connections = record.map(|record| record.connections);
        assert_eq!(connections, is_known.then(|| client().connections + 1), "{}", case.name);
    }
    if reason == Some(Reason::Segment) {
        let record = record.expect(case.name);
        assert!(record.last_seen_ns > client().last_seen_ns, "{}", case.name);
        if !is_known {
            assert_eq!((record.connections, record.network), (1, NETWORK), "{}", case.name);
            assert_eq!(record.guest_mac[..], case.frame[6..12], "{}", case.name);
            assert_eq!(record.metadata_mac[..], case.frame[..6], "{}", case.name);
        }
    }
}

/// Checks that a frame that is dropped, and no other, is recorded at its attachment and reported.
pub fn assert_refused(case: &Case, refusals: &Refusals, reports: &[Refusal]) {
    let slot = Reason::REFUSALS.iter().position(|reason| Some(*reason) == case.reason);
    let Some(slot) = slot.filter(|_| case.program == Program::FromGuest && case.state.attached) else {
        assert_eq!((*refusals, reports), (Refusals::NONE, &[][..]), "{}", case.name);
        return;
    };
    let Refusals { packets, last, .. } = *refusals;
    assert_eq!((packets[slot], packets.iter().sum()), (1, 1_u64), "{}", case.name);
    assert_eq!(reports, [last], "{}", case.name);
    assert_eq!(
        (last.attachment, Some(last.reason)),
        (ATTACHMENT, case.reason.map(Reason::index)),
        "{}",
        case.name
    );
    assert!(last.at_ns > 0, "{}", case.name);
    let mapped = |at: usize| [&[0; 10][..], &[0xff; 2], &case.frame[at..at + 4]].concat();
    let address = match case.frame[12..14] {
        [8, 0] => mapped(26),
        [8, 6] => mapped(28),
        _ => case.frame[22..38].to_vec(),
    };
    assert_eq!((&last.mac[..], &last.address[..]), (&case.frame[6..12], &address[..]), "{}", case.name);
}

/// Checks the MAC addresses that a SYN leaves on an interface of one guest: replies have the one
/// that was addressed.
pub fn assert_noted(case: &Case, state: &AttachmentState) {
    if case.reason != Some(Reason::ConnectionOpened) || case.state.routed {
        return;
    }
    assert_eq!(state.metadata_mac.get().expect(case.name)[..], case.frame[..6], "{}", case.name);
    let client = ClientAddress::from_identity(case.identity()).expect(case.name);
    let noted = match client.mac {
        ClientMac::Address(mac) => mac,
        ClientMac::Slot(slot) => state.mac(slot).get().expect(case.name),
    };
    assert_eq!(noted[..], case.frame[6..12], "{}", case.name);
}
