//! Guests whose packets carry more than the usual headers.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use etherparse::{PacketBuilder, VlanId, VlanPcp};
use metadata_ebpf::from_guest::METADATA_MAC;
use metadata_ebpf::identity::{METADATA_IPV4, METADATA_IPV6};
use metadata_ebpf::reason::Reason;
use metadata_tests::raw_tcp::{Claim, RawStream};
use metadata_tests::two_tenants::HOSTNAME;
use metadata_tests::wait::PATIENCE;
use metadata_tests::{Connection, PacketSocket, ServedTenants, Tenant};

const PORT: u16 = 40_000;
/// The tag of some Windows drivers: priority 5, VLAN id 0.
const PRIORITY_TAG: [u8; 4] = [0x81, 0x00, 0xa0, 0x00];

/// Silences the guest's own stack, which would reset the connections of a [`RawStream`].
fn silence(guest: &Tenant) {
    guest.netns().ip("address flush dev eth0");
}

/// Requests the hostname on a connection with these addresses and tags.
#[track_caller]
fn assert_hostname_served(guest: &Tenant, claim: Claim) {
    let gateway = guest.network.gateway_mac;
    let stream = RawStream::connect(guest.netns(), "eth0", claim, gateway, PATIENCE).expect("a connection");
    let answer = Connection::new(stream).request("GET", HOSTNAME, &[], b"").expect("an answer");
    assert_eq!((answer.status, answer.text()), (200, guest.hostname().as_str()), "{claim:?}");
}

fn both_addresses(guest: &Tenant) -> [IpAddr; 2] {
    [guest.port.ipv4().expect("an address").into(), guest.port.mac.link_local().into()]
}

fn claim(guest: &Tenant, address: IpAddr) -> Claim {
    Claim { mac: guest.port.mac, address, port: PORT, tag: None, options: &[] }
}

/// Every packet is one of the guests'.
fn unprobed() -> ServedTenants {
    ServedTenants::with(|agent, red, blue| agent.port(&red.port).port(&blue.port).without_probes())
}

/// The kernel's own answers to such segments have no options either.
#[test]
fn a_guest_that_sends_ipv4_options_is_served() {
    const ROUTER_ALERT: [u8; 4] = [148, 4, 0, 0];
    let tenants = unprobed();
    for guest in [&tenants.red, &tenants.blue] {
        silence(guest);
        let [address, _] = both_addresses(guest);
        for (port, options) in [(PORT, &[1, 1, 1, 1][..]), (PORT + 1, &ROUTER_ALERT), (PORT + 2, &[1; 40])] {
            assert_hostname_served(guest, Claim { port, options, ..claim(guest, address) });
        }
    }
    assert_eq!(tenants.process.packets(Reason::ConnectionOpened), 6);
}

/// As in the kernel by default (`accept_source_route`), which gets the packet unchanged.
#[test]
fn a_source_route_is_refused_and_counted() {
    const SHORT: Duration = Duration::from_millis(300);
    let tenants = unprobed();
    let red = &tenants.red;
    silence(red);
    let [address, _] = both_addresses(red);
    let options = &[131, 7, 4, 10, 0, 0, 1, 0];
    let claim = Claim { options, ..claim(red, address) };
    let refused = RawStream::connect(red.netns(), "eth0", claim, red.network.gateway_mac, SHORT);
    assert_eq!(refused.expect_err("no answer").kind(), ErrorKind::TimedOut);
    assert!(tenants.process.packets(Reason::Ipv4SourceRoute) > 0);
    assert_eq!(tenants.process.packets(Reason::ConnectionOpened), 0);
}

#[test]
fn a_priority_tagged_guest_is_served() {
    let tenants = unprobed();
    for guest in [&tenants.red, &tenants.blue] {
        silence(guest);
        for address in both_addresses(guest) {
            let tag = Some(u16::from_be_bytes([PRIORITY_TAG[2], PRIORITY_TAG[3]]));
            assert_hostname_served(guest, Claim { tag, ..claim(guest, address) });
        }
    }
    assert_eq!(tenants.process.packets(Reason::ConnectionOpened), 4);
    assert_eq!(tenants.process.packets(Reason::Vlan), 0);
}

#[test]
fn priority_tagged_address_resolution_is_answered() {
    let tenants = unprobed();
    let red = &tenants.red;
    silence(red);
    let wire = PacketSocket::open(red.netns(), "eth0");
    let mac = red.port.mac.0;
    let [own, link_local] = both_addresses(red);
    let (IpAddr::V4(own), IpAddr::V6(link_local)) = (own, link_local) else { unreachable!("one of each") };

    let question = [&[0, 1, 8, 0, 6, 4, 0, 1][..], &mac, &own.octets(), &[0; 6], &METADATA_IPV4].concat();
    wire.send(&[&[0xff; 6][..], &mac, &PRIORITY_TAG, &[8, 6], &question].concat());
    wire.wait_for("ARP reply", |frame| {
        (frame.get(12..14)? == [8, 6] && frame.get(22..28)? == METADATA_MAC).then_some(())
    });

    let node: Ipv6Addr = "ff02::1:fffe:a9fe".parse().expect("an address");
    let solicitation = PacketBuilder::ethernet2(mac, [0x33, 0x33, 0xff, 0xfe, 0xa9, 0xfe])
        .vlan(etherparse::VlanHeader::Single(etherparse::SingleVlanHeader {
            pcp: VlanPcp::try_new(5).expect("three bits"),
            drop_eligible_indicator: false,
            vlan_id: VlanId::ZERO,
            ether_type: etherparse::EtherType::IPV6,
        }))
        .ipv6(link_local.octets(), node.octets(), 255)
        .icmpv6_raw(135, 0, [0; 4]);
    let mut frame = Vec::new();
    solicitation.write(&mut frame, &[&METADATA_IPV6[..], &[1, 1], &mac].concat()).expect("a frame");
    wire.send(&frame);
    wire.wait_for("neighbour advertisement", |frame| {
        let is_advertisement = *frame.get(20)? == 58 && *frame.get(54)? == 136;
        (is_advertisement && frame.get(62..78)? == METADATA_IPV6).then_some(())
    });
    assert_eq!(tenants.process.packets(Reason::ArpReply), 1);
    assert_eq!(tenants.process.packets(Reason::NdReply), 1);
}
