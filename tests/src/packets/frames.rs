//! Frames of the table, built header by header with etherparse's own lengths and checksums.

use etherparse::{
    Ethernet2Header, IpNumber, Ipv4Header, Ipv6FlowLabel, Ipv6Header, PacketBuilder, TcpHeader,
};
use metadata_ebpf::from_guest::METADATA_MAC;
use metadata_ebpf::identity::{METADATA_IPV4, PORTAL_ADDRESS};

use super::{CONNECTED_PORT, GUEST_IP, GUEST_MAC, NEW_PORT, PORTAL_MAC, ROUTER_MAC, identity};

/// A TCP segment of the guest, to be bent.
#[derive(Clone)]
pub(super) struct Segment {
    pub(super) ethernet: Ethernet2Header,
    pub(super) ip: Ipv4Header,
    pub(super) tcp: TcpHeader,
    pub(super) payload: Vec<u8>,
}

impl Segment {
    pub(super) fn syn() -> Self {
        let mut tcp = TcpHeader::new(NEW_PORT, 80, 0x1000, 64_240);
        tcp.syn = true;
        tcp.set_options_raw(&[2, 4, 5, 0xb4, 4, 2, 1, 1]).expect("MSS and SACK-permitted fit");
        let mut ip =
            Ipv4Header::new(0, 64, IpNumber::TCP, GUEST_IP, METADATA_IPV4).expect("an empty payload fits");
        ip.identification = 0x4242;
        ip.dont_fragment = true;
        let ethernet = Ethernet2Header {
            source: GUEST_MAC,
            destination: ROUTER_MAC,
            ether_type: etherparse::EtherType::IPV4,
        };
        Self { ethernet, ip, tcp, payload: Vec::new() }
    }

    pub(super) fn data(payload: &[u8]) -> Self {
        let mut segment = Self::syn();
        segment.tcp = TcpHeader::new(CONNECTED_PORT, 80, 0x2000, 502);
        segment.tcp.ack = true;
        segment.tcp.psh = true;
        segment.payload = payload.to_vec();
        segment
    }

    pub(super) fn with(mut self, bend: impl FnOnce(&mut Self)) -> Self {
        bend(&mut self);
        self
    }

    /// The frame, with right lengths and checksums.
    pub(super) fn frame(mut self) -> Vec<u8> {
        let len = self.tcp.header_len() + self.payload.len();
        self.ip.set_payload_len(len).expect("it fits");
        self.ip.header_checksum = self.ip.calc_header_checksum();
        self.tcp.checksum = self.tcp.calc_checksum_ipv4(&self.ip, &self.payload).expect("it fits");
        let mut frame = Vec::new();
        self.ethernet.write(&mut frame).expect("a vector takes all");
        self.ip.write_raw(&mut frame).expect("a vector takes all");
        self.tcp.write(&mut frame).expect("a vector takes all");
        frame.extend(self.payload);
        frame
    }

    /// The same segment as the portal gets it.
    pub(super) fn in_portal(mut self) -> Vec<u8> {
        let len = self.tcp.header_len() + self.payload.len();
        let ip = Ipv6Header {
            traffic_class: self.ip.dscp.value() << 2 | self.ip.ecn.value(),
            flow_label: Ipv6FlowLabel::ZERO,
            payload_length: u16::try_from(len).expect("it fits"),
            next_header: IpNumber::TCP,
            hop_limit: self.ip.time_to_live,
            source: identity(),
            destination: PORTAL_ADDRESS,
        };
        self.tcp.checksum = self.tcp.calc_checksum_ipv6(&ip, &self.payload).expect("it fits");
        let ethernet = Ethernet2Header {
            source: METADATA_MAC,
            destination: PORTAL_MAC,
            ether_type: etherparse::EtherType::IPV6,
        };
        let mut frame = Vec::new();
        ethernet.write(&mut frame).expect("a vector takes all");
        ip.write(&mut frame).expect("a vector takes all");
        self.tcp.write(&mut frame).expect("a vector takes all");
        frame.extend(self.payload);
        frame
    }
}

/// An answer out of the portal: `(frame of the portal, frame for the guest)`.
pub(super) fn answer(payload: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let build = |start: etherparse::PacketBuilderStep<etherparse::IpHeaders>| {
        let step = start.tcp(80, CONNECTED_PORT, 0x9000, 502).ack(0x2001).psh();
        let mut frame = Vec::new();
        step.write(&mut frame, payload).expect("a vector takes all");
        frame
    };
    let out = PacketBuilder::ethernet2(PORTAL_MAC, METADATA_MAC).ipv6(PORTAL_ADDRESS, identity(), 64);
    let mut ip =
        Ipv4Header::new(0, 64, IpNumber::TCP, METADATA_IPV4, GUEST_IP).expect("an empty payload fits");
    ip.dont_fragment = true;
    let back = PacketBuilder::ethernet2(ROUTER_MAC, GUEST_MAC)
        .ip(etherparse::IpHeaders::Ipv4(ip, etherparse::Ipv4Extensions::default()));
    (build(out), build(back))
}

pub(super) fn arp(operation: u8, sender_mac: [u8; 6], sender: [u8; 4], target: [u8; 4]) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(sender_mac);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, operation]);
    frame.extend(sender_mac);
    frame.extend(sender);
    frame.extend([0; 6]);
    frame.extend(target);
    frame
}

pub(super) fn arp_answer(to: [u8; 4]) -> Vec<u8> {
    let mut frame = GUEST_MAC.to_vec();
    frame.extend(METADATA_MAC);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
    frame.extend(METADATA_MAC);
    frame.extend(METADATA_IPV4);
    frame.extend(GUEST_MAC);
    frame.extend(to);
    frame
}

pub(super) fn echo(source: [u8; 4], destination: [u8; 4], macs: ([u8; 6], [u8; 6]), reply: bool) -> Vec<u8> {
    let step = PacketBuilder::ethernet2(macs.0, macs.1).ipv4(source, destination, 64);
    let step = if reply { step.icmpv4_echo_reply(77, 1) } else { step.icmpv4_echo_request(77, 1) };
    let mut frame = Vec::new();
    step.write(&mut frame, b"0123456789").expect("a vector takes all");
    frame
}

pub(super) fn udp() -> Vec<u8> {
    let mut frame = Vec::new();
    let step = PacketBuilder::ethernet2(GUEST_MAC, ROUTER_MAC).ipv4(GUEST_IP, METADATA_IPV4, 64).udp(53, 80);
    step.write(&mut frame, b"query").expect("a vector takes all");
    frame
}

pub(super) fn ipv6(destination: &str, port: u16) -> Vec<u8> {
    let destination: std::net::Ipv6Addr = destination.parse().expect("an address");
    let source = std::net::Ipv6Addr::new(0xfe80, 0, 0, 0, 0xf816, 0x3eff, 0xfe00, 5);
    let mut frame = Vec::new();
    let step =
        PacketBuilder::ethernet2(GUEST_MAC, ROUTER_MAC).ipv6(source.octets(), destination.octets(), 64);
    step.tcp(NEW_PORT, port, 1, 100).syn().write(&mut frame, &[]).expect("a vector takes all");
    frame
}

/// A frame with some bytes set, checksums left as they were.
pub(super) fn patched(mut frame: Vec<u8>, at: usize, bytes: &[u8]) -> Vec<u8> {
    frame[at..at + bytes.len()].copy_from_slice(bytes);
    frame
}
