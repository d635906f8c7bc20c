//! Frames of the table, built header by header with the lengths and checksums of etherparse.

use etherparse::{
    Ethernet2Header, IpNumber, Ipv4Header, Ipv6FlowLabel, Ipv6Header, PacketBuilder, TcpHeader,
};
use metadata_ebpf::from_guest::METADATA_MAC;
use metadata_ebpf::identity::{METADATA_IPV4, METADATA_IPV6, PORTAL_ADDRESS};

use super::{
    CONNECTED_PORT, GUEST_IP, GUEST_IPV6, GUEST_MAC, NEW_PORT, PORTAL_MAC, ROUTER_MAC, identity, identity_at,
    identity_from, identity_v6,
};

/// A TCP segment of the guest, to be modified.
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

    pub(super) fn with(mut self, mutate: impl FnOnce(&mut Self)) -> Self {
        mutate(&mut self);
        self
    }

    /// Returns the frame with correct lengths and checksums.
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

    /// Returns the same segment as the portal receives it.
    pub(super) fn in_portal(mut self) -> Vec<u8> {
        let len = self.tcp.header_len() + self.payload.len();
        let ip = Ipv6Header {
            traffic_class: self.ip.dscp.value() << 2 | self.ip.ecn.value(),
            flow_label: Ipv6FlowLabel::ZERO,
            payload_length: u16::try_from(len).expect("it fits"),
            next_header: IpNumber::TCP,
            hop_limit: self.ip.time_to_live,
            source: identity_from(self.ip.source, self.ethernet.source),
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

/// Returns a reply as `(frame of the portal, frame for the guest)`.
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

pub(super) fn arp_answer(to_mac: [u8; 6], to: [u8; 4]) -> Vec<u8> {
    let mut frame = to_mac.to_vec();
    frame.extend(METADATA_MAC);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
    frame.extend(METADATA_MAC);
    frame.extend(METADATA_IPV4);
    frame.extend(to_mac);
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

/// A TCP segment of the guest over IPv6, to be modified.
#[derive(Clone)]
pub(super) struct Segment6 {
    pub(super) ethernet: Ethernet2Header,
    pub(super) ip: Ipv6Header,
    pub(super) tcp: TcpHeader,
    pub(super) payload: Vec<u8>,
}

impl Segment6 {
    pub(super) fn syn() -> Self {
        let Segment { mut ethernet, tcp, payload, .. } = Segment::syn();
        ethernet.ether_type = etherparse::EtherType::IPV6;
        let ip = Ipv6Header {
            traffic_class: 0xb8,
            flow_label: Ipv6FlowLabel::try_new(0x4_2042).expect("twenty bits"),
            payload_length: 0,
            next_header: IpNumber::TCP,
            hop_limit: 64,
            source: GUEST_IPV6,
            destination: METADATA_IPV6,
        };
        Self { ethernet, ip, tcp, payload }
    }

    pub(super) fn data(payload: &[u8]) -> Self {
        let Segment { tcp, payload, .. } = Segment::data(payload);
        Self { tcp, payload, ..Self::syn() }
    }

    pub(super) fn with(mut self, mutate: impl FnOnce(&mut Self)) -> Self {
        mutate(&mut self);
        self
    }

    /// Returns the frame with correct lengths and checksums.
    pub(super) fn frame(mut self) -> Vec<u8> {
        let len = self.tcp.header_len() + self.payload.len();
        self.ip.payload_length = u16::try_from(len).expect("it fits");
        self.tcp.checksum = self.tcp.calc_checksum_ipv6(&self.ip, &self.payload).expect("it fits");
        let mut frame = Vec::new();
        self.ethernet.write(&mut frame).expect("a vector takes all");
        self.ip.write(&mut frame).expect("a vector takes all");
        self.tcp.write(&mut frame).expect("a vector takes all");
        frame.extend(self.payload);
        frame
    }

    /// Returns the same segment as the portal receives it.
    pub(super) fn in_portal(mut self) -> Vec<u8> {
        (self.ip.source, self.ip.destination) = (identity_at(self.ip.source), PORTAL_ADDRESS);
        (self.ethernet.source, self.ethernet.destination) = (METADATA_MAC, PORTAL_MAC);
        self.frame()
    }
}

/// Returns a reply to the guest's IPv6 address as `(frame of the portal, frame for the guest)`.
pub(super) fn answer_v6(payload: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let build = |(from, to): ([u8; 6], [u8; 6]), (source, destination)| {
        let step = PacketBuilder::ethernet2(from, to).ipv6(source, destination, 64);
        let step = step.tcp(80, CONNECTED_PORT, 0x9000, 502).ack(0x2001).psh();
        let mut frame = Vec::new();
        step.write(&mut frame, payload).expect("a vector takes all");
        frame
    };
    (
        build((PORTAL_MAC, METADATA_MAC), (PORTAL_ADDRESS, identity_v6())),
        build((ROUTER_MAC, GUEST_MAC), (METADATA_IPV6, GUEST_IPV6)),
    )
}

/// Returns an ICMPv6 message with its checksum.
pub(super) fn icmpv6(
    (from, to): ([u8; 6], [u8; 6]),
    (source, destination): ([u8; 16], [u8; 16]),
    kind: u8,
    rest: [u8; 4],
    payload: &[u8],
) -> Vec<u8> {
    let step = PacketBuilder::ethernet2(from, to).ipv6(source, destination, 255);
    let mut frame = Vec::new();
    step.icmpv6_raw(kind, 0, rest).write(&mut frame, payload).expect("a vector takes all");
    frame
}

/// Returns a neighbour solicitation for `target` (RFC 4861 section 4.3).
pub(super) fn solicitation(source: [u8; 16], destination: [u8; 16], target: [u8; 16]) -> Vec<u8> {
    let source_link_layer_address = [&[1, 1][..], &GUEST_MAC].concat();
    let options = if source == [0; 16] { &[][..] } else { &source_link_layer_address };
    let group_mac = [0x33, 0x33, destination[12], destination[13], destination[14], destination[15]];
    let mac = if destination[0] == 0xff { group_mac } else { METADATA_MAC };
    icmpv6((GUEST_MAC, mac), (source, destination), 135, [0; 4], &[&target[..], options].concat())
}

/// Returns our response to it.
pub(super) fn advertisement(to_mac: [u8; 6], to: [u8; 16], flags: u8) -> Vec<u8> {
    let options = [&METADATA_IPV6[..], &[2, 1], &METADATA_MAC].concat();
    icmpv6((METADATA_MAC, to_mac), (METADATA_IPV6, to), 136, [flags, 0, 0, 0], &options)
}

/// Returns a frame with some bytes replaced and unchanged checksums.
pub(super) fn patched(mut frame: Vec<u8>, at: usize, bytes: &[u8]) -> Vec<u8> {
    frame[at..at + bytes.len()].copy_from_slice(bytes);
    frame
}
