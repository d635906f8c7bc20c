//! Floods of SYNs that no kernel of a guest has sent, at a fixed rate.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use etherparse::PacketBuilder;
use tokio_util::sync::CancellationToken;

use super::running::{LIMIT, Progress};
use crate::packet_socket::PacketSocket;

/// The pause after which frames that are due are sent. In a longer pause, a bucket that the flood
/// has emptied would fill again.
const TICK: Duration = Duration::from_micros(50);
const FIRST_PORT: u16 = 1024;

/// Frames and the pace at which they are sent, again and again.
#[derive(Debug)]
pub(super) struct Flood {
    /// The sockets of the attackers.
    pub links: Vec<PacketSocket>,
    /// Frames, each with the number of its socket.
    pub frames: Vec<(usize, Vec<u8>)>,
    /// The number of frames to send as fast as possible.
    pub at_once: usize,
    /// The number of frames per second after that.
    pub rate: u32,
}

impl Flood {
    /// Sends until `stop`.
    pub fn run(&self, stop: &CancellationToken, progress: &Progress) {
        let began = Instant::now();
        let mut frames = self.frames.iter().cycle();
        let mut send = |count: usize| {
            for (link, frame) in frames.by_ref().take(count) {
                self.links[*link].send_if_room(frame);
            }
            progress.add(count);
        };
        let is_over = || stop.is_cancelled() || began.elapsed() > LIMIT;
        let mut left = self.at_once;
        while left > 0 && !is_over() {
            let chunk = left.min(256);
            send(chunk);
            left -= chunk;
        }
        let (paced, mut total) = (Instant::now(), 0);
        while !is_over() {
            let due = paced.elapsed().as_micros() * u128::from(self.rate) / 1_000_000;
            let due = usize::try_from(due).unwrap_or(usize::MAX);
            send(due.saturating_sub(total));
            total = total.max(due);
            thread::park_timeout(TICK);
        }
    }
}

/// The MAC addresses of a frame.
#[derive(Clone, Copy, Debug)]
pub(super) struct Link {
    pub source: [u8; 6],
    pub destination: [u8; 6],
}

/// Builds a SYN. The source port is `number` modulo the number of unprivileged ports.
pub(super) fn syn(link: Link, from: impl Into<IpAddr>, to: SocketAddr, number: u32) -> Vec<u8> {
    const WINDOW: u16 = 64_240;
    let ports = u32::from(u16::MAX - FIRST_PORT) + 1;
    let port = FIRST_PORT + u16::try_from(number % ports).unwrap_or_else(|_| unreachable!("a remainder"));
    let sequence = number.wrapping_mul(2_654_435_761);
    let ethernet = PacketBuilder::ethernet2(link.source, link.destination);
    let ip = match (from.into(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => ethernet.ipv4(from.octets(), to.octets(), 64),
        (IpAddr::V6(from), IpAddr::V6(to)) => ethernet.ipv6(from.octets(), to.octets(), 64),
        (from, to) => panic!("a SYN from {from} to {to}"),
    };
    let mut frame = Vec::new();
    let written = ip.tcp(port, to.port(), sequence, WINDOW).syn().write(&mut frame, &[]);
    written.unwrap_or_else(|e| panic!("build a SYN: {e}"));
    frame
}

/// Returns address number `number` of a /18 network, beyond its first 256 addresses.
pub(super) fn made_up_ipv4(gateway: Ipv4Addr, number: u32) -> Ipv4Addr {
    Ipv4Addr::from((u32::from(gateway) & !0x3fff) + 256 + number % (0x3fff - 256))
}

/// Returns a link-local address that no guest has.
pub(super) fn made_up_link_local(number: u32) -> Ipv6Addr {
    let [a, b, c, d] = number.to_be_bytes();
    Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 2, 0xbd, 0, 0, a, b, c, d])
}

/// Returns a MAC address that no guest has.
pub(super) fn made_up_mac(number: u32) -> [u8; 6] {
    let [_, a, b, c] = number.to_be_bytes();
    [0x0a, 0xbd, 0x11, a, b, c]
}

/// Returns the link-local address that is derived from a MAC address (RFC 4291, appendix A).
pub(super) fn derived_link_local([a, b, c, d, e, f]: [u8; 6]) -> Ipv6Addr {
    Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

#[cfg(test)]
mod tests {
    use etherparse::{NetSlice, SlicedPacket, TransportSlice};

    use super::*;

    #[test]
    fn a_syn_is_a_complete_frame() {
        let link = Link { source: [2; 6], destination: [4; 6] };
        let v4 = syn(link, Ipv4Addr::new(10, 0, 1, 2), ([192, 0, 2, 2], 8080).into(), 5);
        let v6 = syn(link, made_up_link_local(7), (Ipv6Addr::LOCALHOST, 80).into(), 64_517);
        for (frame, source, target, is_ipv4) in [(v4, 1029, 8080, true), (v6, 1029, 80, false)] {
            let packet = SlicedPacket::from_ethernet(&frame).expect("a valid frame");
            let Some(TransportSlice::Tcp(tcp)) = packet.transport else { panic!("{packet:?}") };
            assert_eq!((tcp.source_port(), tcp.destination_port()), (source, target));
            assert!(tcp.syn() && !tcp.ack());
            assert_eq!(matches!(packet.net, Some(NetSlice::Ipv4(_))), is_ipv4);
        }
    }

    #[test]
    fn made_up_addresses_stay_in_their_network() {
        let gateway = Ipv4Addr::new(10, 7, 0, 1);
        assert_eq!(made_up_ipv4(gateway, 0), Ipv4Addr::new(10, 7, 1, 0));
        assert_eq!(made_up_ipv4(gateway, 16_126), Ipv4Addr::new(10, 7, 63, 254));
        assert_eq!(made_up_ipv4(gateway, 16_127), made_up_ipv4(gateway, 0));
        assert_eq!(derived_link_local([0xfa, 0x16, 0x3e, 1, 2, 3]).to_string(), "fe80::f816:3eff:fe01:203");
    }
}
