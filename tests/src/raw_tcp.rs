//! A TCP client that chooses every field of its frames: a hostile guest that does not use the
//! kernel's own stack. Its interface must have no addresses, or the kernel resets its connections.
//!
//! It answers ARP requests and neighbour solicitations for the address that it claims, and resends
//! nothing: on a virtual cable only a policy drops frames.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv6Addr};
use std::ops::Range;
use std::time::{Duration, Instant};

use etherparse::{
    IpHeaders, IpNumber, Ipv4Extensions, Ipv4Header, PacketBuilder, PacketBuilderStep, TcpHeader,
};
use metadata_agent::ids::MacAddress;
use metadata_ebpf::identity::{METADATA_IPV4, METADATA_IPV6, METADATA_PORT};

use crate::netns::Netns;
use crate::packet_socket::{LARGEST, PacketSocket};

const WINDOW: u16 = u16::MAX;
/// Bytes per segment.
const SEGMENT: usize = 1400;
const ETHERNET: usize = 14;
const IPV6: usize = 40;
const IPV4_TYPE: [u8; 2] = [0x08, 0x00];
const IPV6_TYPE: [u8; 2] = [0x86, 0xdd];
const ARP_TYPE: [u8; 2] = [0x08, 0x06];
const TCP: u8 = 6;
const ICMPV6: u8 = 58;
const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;

/// The addresses from which the client claims to send.
#[derive(Clone, Copy, Debug)]
pub struct Claim {
    pub mac: MacAddress,
    pub address: IpAddr,
    pub port: u16,
    /// The tag control information of an 802.1Q tag on every segment.
    pub tag: Option<u16>,
    /// IPv4 options of every segment, as whole words.
    pub options: &'static [u8],
}

/// A connection to the metadata service.
#[derive(Debug)]
pub struct RawStream {
    wire: PacketSocket,
    frame: Vec<u8>,
    claim: Claim,
    gateway: MacAddress,
    sequence: u32,
    acknowledged: u32,
    inbox: VecDeque<u8>,
    received: Vec<u8>,
    is_finished: bool,
    patience: Duration,
}

/// The control bits of a segment to send.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Open,
    Data,
    Reset,
}

/// A received segment of the connection.
struct Segment {
    flags: u8,
    sequence: u32,
    payload: Range<usize>,
}

impl RawStream {
    /// Connects through an interface of a namespace. Frames go to the MAC address `gateway`.
    /// `patience` bounds the handshake and each read.
    ///
    /// # Errors
    /// `TimedOut` if nothing answers, `ConnectionRefused` after a reset.
    pub fn connect(
        netns: &Netns,
        interface: &str,
        claim: Claim,
        gateway: MacAddress,
        patience: Duration,
    ) -> io::Result<Self> {
        let mut stream = Self {
            wire: PacketSocket::open(netns, interface),
            frame: vec![0; LARGEST],
            claim,
            gateway,
            sequence: 0x1000_0000,
            acknowledged: 0,
            inbox: VecDeque::new(),
            received: Vec::new(),
            is_finished: false,
            patience,
        };
        stream.send(Kind::Open, &[]);
        stream.sequence += 1;
        let end = Instant::now() + patience;
        while Instant::now() < end {
            match stream.next_segment() {
                Some(Segment { flags, .. }) if flags & RST != 0 => {
                    return Err(ErrorKind::ConnectionRefused.into());
                }
                Some(Segment { flags, sequence, .. }) if flags & SYN != 0 => {
                    stream.acknowledged = sequence.wrapping_add(1);
                    stream.send(Kind::Data, &[]);
                    return Ok(stream);
                }
                Some(_) | None => {}
            }
        }
        Err(ErrorKind::TimedOut.into())
    }

    /// Sets the time limit of each read.
    pub fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
    }

    /// Returns all bytes that arrived, read or not.
    #[must_use]
    pub fn received(&self) -> &[u8] {
        &self.received
    }

    /// Waits for the next frame and accepts the data that it brings.
    fn advance(&mut self) {
        let Some(Segment { flags, sequence, payload }) = self.next_segment() else { return };
        let known = self.acknowledged.wrapping_sub(sequence) as usize;
        if flags & RST != 0 {
            self.is_finished = true;
        } else if flags & SYN == 0 && known <= payload.len() {
            let fresh = &self.frame[payload.start + known..payload.end];
            self.inbox.extend(fresh);
            self.received.extend_from_slice(fresh);
            let mut length = fresh.len();
            if flags & FIN != 0 {
                self.is_finished = true;
                length += 1;
            }
            self.acknowledged = self.acknowledged.wrapping_add(u32::try_from(length).unwrap_or_default());
            if length > 0 {
                self.send(Kind::Data, &[]);
            }
        } else {
            // It fills no gap, so the peer learns what is missing.
            self.send(Kind::Data, &[]);
        }
    }

    /// Waits briefly for a segment of this connection. Answers address resolution meanwhile.
    fn next_segment(&mut self) -> Option<Segment> {
        let length = self.wire.receive(&mut self.frame)?;
        let frame = &self.frame[..length];
        if let Some(answer) = self.resolution(frame) {
            self.wire.send(&answer);
            return None;
        }
        let (sender, receiver, transport) = addresses(frame)?;
        let metadata = match self.claim.address {
            IpAddr::V4(_) => IpAddr::from(METADATA_IPV4),
            IpAddr::V6(_) => IpAddr::from(METADATA_IPV6),
        };
        let tcp = frame.get(transport.clone())?;
        let ports = [METADATA_PORT.to_be_bytes(), self.claim.port.to_be_bytes()].concat();
        if sender != metadata || receiver != self.claim.address || tcp.get(..4)? != ports {
            return None;
        }
        let sequence = u32::from_be_bytes(tcp.get(4..8)?.try_into().ok()?);
        let header = usize::from(tcp.get(12)? >> 4) * 4;
        let payload = transport.start + header..transport.end;
        Some(Segment { flags: *tcp.get(13)?, sequence, payload })
    }

    /// Returns the answer to a frame that resolves the claimed address.
    fn resolution(&self, frame: &[u8]) -> Option<Vec<u8>> {
        let kind: [u8; 2] = frame.get(12..14)?.try_into().ok()?;
        let asker: [u8; 6] = frame.get(6..12)?.try_into().ok()?;
        let own = self.claim.mac.0;
        match (kind, self.claim.address) {
            (ARP_TYPE, IpAddr::V4(address)) if frame.get(20..22)? == [0, 1] => {
                let (sender, target) = (frame.get(28..32)?, frame.get(38..42)?);
                let reply =
                    [&asker[..], &own, &ARP_TYPE, &[0, 1, 8, 0, 6, 4, 0, 2], &own, target, &asker, sender];
                (target == address.octets()).then(|| reply.concat())
            }
            (IPV6_TYPE, IpAddr::V6(address)) if *frame.get(20)? == ICMPV6 && *frame.get(54)? == 135 => {
                let sender: [u8; 16] = frame.get(22..38)?.try_into().ok()?;
                if frame.get(62..78)? != address.octets() || sender == Ipv6Addr::UNSPECIFIED.octets() {
                    return None;
                }
                let option = [&address.octets()[..], &[2, 1], &own].concat();
                let advertisement = PacketBuilder::ethernet2(own, asker)
                    .ipv6(address.octets(), sender, 255)
                    .icmpv6_raw(136, 0, [0x60, 0, 0, 0]);
                let mut reply = Vec::new();
                advertisement.write(&mut reply, &option).ok()?;
                Some(reply)
            }
            _ => None,
        }
    }

    fn send(&self, kind: Kind, payload: &[u8]) {
        let Claim { mac, address, port, tag, options } = self.claim;
        let tcp = |step: PacketBuilderStep<IpHeaders>| {
            self.marked(step.tcp(port, METADATA_PORT, self.sequence, WINDOW), kind)
        };
        let (ethertype, packet) = match address {
            IpAddr::V4(from) => {
                let ip = Ipv4Header::new(0, 64, IpNumber::TCP, from.octets(), METADATA_IPV4);
                let mut ip = ip.unwrap_or_else(|e| panic!("build an IPv4 header: {e}"));
                ip.options = options.try_into().unwrap_or_else(|e| panic!("build IPv4 options: {e}"));
                (IPV4_TYPE, tcp(PacketBuilder::ip(IpHeaders::Ipv4(ip, Ipv4Extensions::default()))))
            }
            IpAddr::V6(from) => (IPV6_TYPE, tcp(PacketBuilder::ipv6(from.octets(), METADATA_IPV6, 64))),
        };
        let mut frame = [self.gateway.0, mac.0].concat();
        if let Some(tag) = tag {
            frame.extend([0x81, 0x00]);
            frame.extend(tag.to_be_bytes());
        }
        frame.extend(ethertype);
        packet.write(&mut frame, payload).unwrap_or_else(|e| panic!("build a segment: {e}"));
        self.wire.send(&frame);
    }

    fn marked(&self, step: PacketBuilderStep<TcpHeader>, kind: Kind) -> PacketBuilderStep<TcpHeader> {
        match kind {
            Kind::Open => step.syn(),
            Kind::Data => step.ack(self.acknowledged).psh(),
            Kind::Reset => step.ack(self.acknowledged).rst(),
        }
    }
}

/// Returns source, destination and the range of the TCP segment of a frame.
fn addresses(frame: &[u8]) -> Option<(IpAddr, IpAddr, Range<usize>)> {
    let at = |range: Range<usize>| frame.get(range);
    let length = |at: usize| Some(usize::from(u16::from_be_bytes(frame.get(at..at + 2)?.try_into().ok()?)));
    let ethertype: [u8; 2] = at(12..14)?.try_into().ok()?;
    match ethertype {
        IPV4_TYPE if *frame.get(23)? == TCP => {
            let (from, to): ([u8; 4], [u8; 4]) = (at(26..30)?.try_into().ok()?, at(30..34)?.try_into().ok()?);
            let header = usize::from(frame.get(ETHERNET)? & 15) * 4;
            Some((from.into(), to.into(), ETHERNET + header..ETHERNET + length(16)?))
        }
        IPV6_TYPE if *frame.get(20)? == TCP => {
            let (from, to): ([u8; 16], [u8; 16]) =
                (at(22..38)?.try_into().ok()?, at(38..54)?.try_into().ok()?);
            Some((from.into(), to.into(), ETHERNET + IPV6..ETHERNET + IPV6 + length(18)?))
        }
        _ => None,
    }
}

impl Read for RawStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let end = Instant::now() + self.patience;
        while self.inbox.is_empty() && !self.is_finished {
            if Instant::now() >= end {
                return Err(ErrorKind::TimedOut.into());
            }
            self.advance();
        }
        self.inbox.read(buffer)
    }
}

impl Write for RawStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for segment in bytes.chunks(SEGMENT) {
            self.send(Kind::Data, segment);
            let length = u32::try_from(segment.len()).unwrap_or_default();
            self.sequence = self.sequence.wrapping_add(length);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for RawStream {
    fn drop(&mut self) {
        self.send(Kind::Reset, &[]);
    }
}
