//! Packet headers and their checksum arithmetic. Pure functions.

/// Length of an Ethernet header.
pub const ETH_LEN: u32 = 14;
/// Length of an IPv4 header without options.
pub const IPV4_LEN: u32 = 20;
/// Length of an IPv6 header.
pub const IPV6_LEN: u32 = 40;
/// Length of a TCP header without options.
pub const TCP_LEN: u32 = 20;
/// Offset of the checksum in a TCP header.
pub const TCP_CHECKSUM: u32 = 16;

/// EtherTypes, in network order.
pub mod ethertype {
    pub const IPV4: [u8; 2] = [0x08, 0x00];
    pub const ARP: [u8; 2] = [0x08, 0x06];
    pub const IPV6: [u8; 2] = [0x86, 0xdd];
    /// IEEE 802.1Q
    pub const VLAN: [u8; 2] = [0x81, 0x00];
}

/// IP protocol numbers.
pub mod protocol {
    pub const HOP_BY_HOP: u8 = 0;
    pub const ICMP: u8 = 1;
    pub const TCP: u8 = 6;
    pub const UDP: u8 = 17;
    pub const IPV6_ROUTING: u8 = 43;
    pub const IPV6_FRAGMENT: u8 = 44;
    /// IPsec authentication header
    pub const AUTHENTICATION: u8 = 51;
    pub const ICMPV6: u8 = 58;
    pub const IPV6_DESTINATION: u8 = 60;
}

/// ICMPv6 messages (RFC 4443) and neighbour discovery (RFC 4861).
pub(crate) mod icmpv6 {
    use super::{Mac, fold, protocol, sum};

    pub const UNREACHABLE: u8 = 1;
    pub const PACKET_TOO_BIG: u8 = 2;
    const PARAMETER_PROBLEM: u8 = 4;
    pub const ECHO_REQUEST: u8 = 128;
    pub const ECHO_REPLY: u8 = 129;
    const ROUTER_SOLICITATION: u8 = 133;
    pub const NEIGHBOUR_SOLICITATION: u8 = 135;
    pub const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
    const REDIRECT: u8 = 137;
    /// Offset of the target address in solicitations and advertisements.
    pub const TARGET: u32 = 8;
    /// Advertisement flag: this is the reply to a solicitation.
    pub const SOLICITED: u8 = 0x40;
    /// Advertisement flag: overrides an existing cache entry.
    pub const OVERRIDE: u8 = 0x20;

    /// Returns true if a message may carry the link-layer address of its source or of a target.
    #[inline(always)]
    pub const fn is_neighbour_discovery(kind: u8) -> bool {
        kind >= ROUTER_SOLICITATION && kind <= REDIRECT
    }

    /// Translates the start of an ICMPv4 "destination unreachable" (RFC 7915 section 4.2), but not
    /// its checksum.
    ///
    /// A router without RFC 1191 reports an MTU of zero, which becomes the smallest MTU of IPv6 at
    /// once, as for any MTU below that.
    #[inline(always)]
    pub const fn from_unreachable([_, code, c0, c1, _, _, mtu_high, mtu_low]: [u8; 8]) -> [u8; 8] {
        const PROTOCOL: u8 = 2;
        const PORT: u8 = 3;
        const FRAGMENTATION_NEEDED: u8 = 4;
        /// Difference of the header lengths.
        const GROWTH: u32 = 20;
        const MIN_MTU: u32 = 1280;

        let (kind, code, [r0, r1, r2, r3]) = match code {
            FRAGMENTATION_NEEDED => {
                let mtu = u16::from_be_bytes([mtu_high, mtu_low]) as u32 + GROWTH;
                let mtu = if mtu < MIN_MTU { MIN_MTU } else { mtu };
                (PACKET_TOO_BIG, 0, mtu.to_be_bytes())
            }
            // Unknown next header, with the offset of that field.
            PROTOCOL => (PARAMETER_PROBLEM, 1, [0, 0, 0, 6]),
            PORT => (UNREACHABLE, 4, [0; 4]),
            // Prohibited by an administrator.
            9 | 10 | 13 | 15 => (UNREACHABLE, 1, [0; 4]),
            // No route.
            _ => (UNREACHABLE, 0, [0; 4]),
        };
        [kind, code, c0, c1, r0, r1, r2, r3]
    }

    /// Length of a neighbour solicitation or advertisement with one option of eight bytes.
    pub const DISCOVERY_LEN: u32 = 32;

    /// The start of the IPv6 header of such a message, up to the addresses. Its hop limit of 255
    /// proves that no router forwarded it.
    pub const DISCOVERY_IPV6_HEADER: [u8; 8] = [0x60, 0, 0, 0, 0, 32, protocol::ICMPV6, 255];

    /// Returns the start of an advertisement of `target`, up to the target, with the checksum of
    /// the whole message.
    #[inline(always)]
    pub fn advertisement(flags: u8, target: [u8; 16], mac: Mac, to: [u8; 16]) -> [u8; 8] {
        // The rest of the pseudo header, RFC 8200 section 8.1: length and next header.
        let pseudo_header = sum(&to, sum(&target, sum(&[0, 32, 0, protocol::ICMPV6], 0)));
        let fixed = [NEIGHBOUR_ADVERTISEMENT, 0, flags, 0];
        let body = sum(&fixed, sum(&target, sum(&target_link_layer_address(mac), 0)));
        let [high, low] = (!fold(pseudo_header + body)).to_ne_bytes();
        [NEIGHBOUR_ADVERTISEMENT, 0, high, low, flags, 0, 0, 0]
    }

    /// The solicited-node multicast address of fe80::a9fe:a9fe (RFC 4291 section 2.7.1).
    pub const SOLICITED_NODE: [u8; 16] = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, 0xfe, 169, 254];
    /// Its MAC address (RFC 2464 section 7).
    pub const SOLICITED_NODE_MAC: Mac = [0x33, 0x33, 0xff, 0xfe, 169, 254];

    /// Returns the start of a solicitation for `target` to [`SOLICITED_NODE`], up to the target,
    /// with the checksum of the whole message.
    #[inline(always)]
    pub fn solicitation(source: &[u8; 16], target: [u8; 16], mac: Mac) -> [u8; 8] {
        let pseudo_header = sum(source, sum(&SOLICITED_NODE, sum(&[0, 32, 0, protocol::ICMPV6], 0)));
        let fixed = [NEIGHBOUR_SOLICITATION, 0];
        let body = sum(&fixed, sum(&target, sum(&source_link_layer_address(mac), 0)));
        let [high, low] = (!fold(pseudo_header + body)).to_ne_bytes();
        [NEIGHBOUR_SOLICITATION, 0, high, low, 0, 0, 0, 0]
    }

    /// The option that carries the sender's MAC address.
    #[inline(always)]
    pub const fn source_link_layer_address(mac: Mac) -> [u8; 8] {
        let [a, b, c, d, e, f] = mac;
        [1, 1, a, b, c, d, e, f]
    }

    /// The option that carries the MAC address.
    #[inline(always)]
    pub const fn target_link_layer_address(mac: Mac) -> [u8; 8] {
        let [a, b, c, d, e, f] = mac;
        [2, 1, a, b, c, d, e, f]
    }
}

pub type Mac = [u8; 6];

/// Returns true if an Ethernet address is a group address (IEEE 802: the low bit of the first
/// octet).
#[inline(always)]
pub(crate) const fn is_group(mac: Mac) -> bool {
    mac[0] & 1 != 0
}

/// Builds an Ethernet header.
#[inline(always)]
pub(crate) const fn ethernet(to: Mac, from: Mac, ethertype: [u8; 2]) -> [u8; 14] {
    let [a, b, c, d, e, f] = to;
    let [g, h, i, j, k, l] = from;
    [a, b, c, d, e, f, g, h, i, j, k, l, ethertype[0], ethertype[1]]
}

/// An IPv4 header up to its options.
#[derive(Clone, Copy)]
pub(crate) struct Ipv4Header(pub [u8; 20]);

impl Ipv4Header {
    const LEN: u16 = 20;

    /// Length of the header with its options.
    #[inline(always)]
    pub const fn header_len(&self) -> u32 {
        (self.0[0] & 0x0f) as u32 * 4
    }

    #[inline(always)]
    pub const fn total_len(&self) -> u32 {
        u16::from_be_bytes([self.0[2], self.0[3]]) as u32
    }

    /// Number of bytes behind a header without options; 0 if the total length is even shorter than
    /// that.
    #[inline(always)]
    pub const fn payload_len(&self) -> u16 {
        u16::from_be_bytes([self.0[2], self.0[3]]).saturating_sub(Self::LEN)
    }

    #[inline(always)]
    pub const fn source(&self) -> [u8; 4] {
        [self.0[12], self.0[13], self.0[14], self.0[15]]
    }

    #[inline(always)]
    pub const fn destination(&self) -> [u8; 4] {
        [self.0[16], self.0[17], self.0[18], self.0[19]]
    }

    /// Returns true if "more fragments" or an offset is set.
    #[inline(always)]
    pub const fn is_fragment(&self) -> bool {
        u16::from_be_bytes([self.0[6], self.0[7]]) & 0x3fff != 0
    }

    /// RFC 1071: a header with a valid checksum sums up to all ones. `options` is the [`sum`] of
    /// the options.
    #[inline(always)]
    pub fn checksum_is_right(&self, options: u32) -> bool {
        fold(sum(&self.0, options)) == 0xffff
    }

    /// Returns the header of the same packet without its options.
    #[inline(always)]
    pub fn without_options(mut self) -> Self {
        let options = (self.0[0] & 0x0f).saturating_sub(5) * 4;
        let total_len = u16::from_be_bytes([self.0[2], self.0[3]]).saturating_sub(options.into());
        let [len_high, len_low] = total_len.to_be_bytes();
        self.0[0] = 0x45;
        self.0[2] = len_high;
        self.0[3] = len_low;
        self.0[10] = 0;
        self.0[11] = 0;
        let [high, low] = (!fold(sum(&self.0, 0))).to_ne_bytes();
        self.0[10] = high;
        self.0[11] = low;
        self
    }

    /// Builds the header of a reply that carries `segment_len` bytes of TCP, with its checksum.
    /// Don't Fragment is set, so the identification may be zero (RFC 6864 section 4.1).
    #[inline(always)]
    pub fn reply(from: [u8; 4], to: [u8; 4], segment_len: u16, tos: u8, ttl: u8) -> Self {
        let [len_high, len_low] = (segment_len + Self::LEN).to_be_bytes();
        let mut header =
            [0x45, tos, len_high, len_low, 0, 0, 0x40, 0, ttl, protocol::TCP, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        header[12] = from[0];
        header[13] = from[1];
        header[14] = from[2];
        header[15] = from[3];
        header[16] = to[0];
        header[17] = to[1];
        header[18] = to[2];
        header[19] = to[3];
        let [high, low] = (!fold(sum(&header, 0))).to_ne_bytes();
        header[10] = high;
        header[11] = low;
        Self(header)
    }
}

/// Builds an IPv6 header up to its addresses; the flow label is zero.
#[inline(always)]
pub(crate) const fn ipv6_start(protocol: u8, payload_len: u16, class: u8, hop_limit: u8) -> [u8; 8] {
    let [len_high, len_low] = payload_len.to_be_bytes();
    [0x60 | (class >> 4), class << 4, 0, 0, len_high, len_low, protocol, hop_limit]
}

#[derive(Clone, Copy)]
pub(crate) struct Ipv6Header(pub [u8; 40]);

impl Ipv6Header {
    /// Builds a header for `payload_len` bytes of `protocol`; the flow label is zero.
    #[inline(always)]
    pub fn new(
        protocol: u8,
        from: [u8; 16],
        to: [u8; 16],
        payload_len: u16,
        class: u8,
        hop_limit: u8,
    ) -> Self {
        let mut header = [0; 40];
        let [len_high, len_low] = payload_len.to_be_bytes();
        header[0] = 0x60 | (class >> 4);
        header[1] = class << 4;
        header[4] = len_high;
        header[5] = len_low;
        header[6] = protocol;
        header[7] = hop_limit;
        let mut at = 0;
        while at < 16 {
            header[8 + at] = from[at];
            header[24 + at] = to[at];
            at += 1;
        }
        Self(header)
    }

    #[inline(always)]
    pub const fn payload_len(&self) -> u16 {
        u16::from_be_bytes([self.0[4], self.0[5]])
    }

    #[inline(always)]
    pub const fn traffic_class(&self) -> u8 {
        (self.0[0] << 4) | (self.0[1] >> 4)
    }

    #[inline(always)]
    pub fn source(&self) -> [u8; 16] {
        address(&self.0, 8)
    }

    #[inline(always)]
    pub fn destination(&self) -> [u8; 16] {
        address(&self.0, 24)
    }
}

#[inline(always)]
fn address(header: &[u8; 40], at: usize) -> [u8; 16] {
    let mut out = [0; 16];
    let mut i = 0;
    while i < 16 {
        out[i] = header[at + i];
        i += 1;
    }
    out
}

/// A TCP header without its options.
#[derive(Clone, Copy)]
pub(crate) struct TcpHeader(pub [u8; 20]);

impl TcpHeader {
    const FIN: u8 = 0x01;
    const SYN: u8 = 0x02;
    const RST: u8 = 0x04;
    const ACK: u8 = 0x10;

    #[inline(always)]
    pub const fn source_port(&self) -> u16 {
        u16::from_be_bytes([self.0[0], self.0[1]])
    }

    #[inline(always)]
    pub const fn header_len(&self) -> u32 {
        (self.0[12] >> 4) as u32 * 4
    }

    /// Returns true if a segment with these flags opens a connection: SYN without ACK, RST or FIN
    /// (RFC 9293 does not allow these in an opening segment).
    #[inline(always)]
    pub const fn opens_by(flags: u8) -> bool {
        flags & (Self::SYN | Self::ACK | Self::RST | Self::FIN) == Self::SYN
    }
}

/// Returns the one's complement difference of replacing `from` by `to`, like `bpf_csum_diff`.
#[inline(always)]
pub(crate) fn checksum_difference<const F: usize, const T: usize>(from: &[u8; F], to: &[u8; T]) -> u32 {
    let mut removed = *from;
    let mut at = 0;
    while at < F {
        removed[at] = !removed[at];
        at += 1;
    }
    let wide = sum(to, sum(&removed, 0));
    u32::from(fold(wide))
}

/// Returns the one's complement sum of what is removed, to be added to a [`sum`] of what replaces
/// it. Without the copies of [`checksum_difference`], which take stack.
#[inline(always)]
pub(crate) fn removed<const N: usize>(bytes: &[u8; N]) -> u32 {
    u32::from(!fold(sum(bytes, 0)))
}

/// Sums 16-bit words in memory order: the checksum does not depend on byte order (RFC 1071 section
/// 2, B).
#[inline(always)]
pub(crate) fn sum<const N: usize>(bytes: &[u8; N], start: u32) -> u32 {
    let mut total = start;
    let mut at = 0;
    while at + 1 < N {
        total += u32::from(u16::from_ne_bytes([bytes[at], bytes[at + 1]]));
        at += 2;
    }
    total
}

#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "two folds leave sixteen bits")]
pub(crate) const fn fold(sum: u32) -> u16 {
    let once = (sum & 0xffff) + (sum >> 16);
    ((once & 0xffff) + (once >> 16)) as u16
}

/// Applies [`checksum_difference`] to a checksum in a header (RFC 1624, equation 3).
#[inline(always)]
pub(crate) fn apply_difference(checksum: [u8; 2], difference: u32) -> [u8; 2] {
    let complement = !u16::from_ne_bytes(checksum);
    (!fold(u32::from(complement) + difference)).to_ne_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::Ipv4HeaderSlice;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_reply_header_matches_etherparse(
            from in any::<[u8; 4]>(), to in any::<[u8; 4]>(), len in 20u16..65_000, tos in any::<u8>(), ttl in any::<u8>(),
        ) {
            let header = Ipv4Header::reply(from, to, len, tos, ttl);
            prop_assert!(header.checksum_is_right(0));
            let slice = Ipv4HeaderSlice::from_slice(&header.0).unwrap();
            prop_assert_eq!(slice.to_header().calc_header_checksum(), slice.header_checksum());
            prop_assert_eq!(slice.source(), from);
            prop_assert_eq!(slice.destination(), to);
            prop_assert_eq!(slice.total_len(), len + 20);
            prop_assert!(slice.dont_fragment());
        }

        #[test]
        fn a_header_without_its_options_matches_etherparse(
            words in 0usize..=10, len in 0u16..1000, source in any::<[u8; 4]>(),
        ) {
            let options = vec![1; words * 4];
            let mut header = etherparse::Ipv4Header::new(len, 9, 6.into(), source, [1, 2, 3, 4]).unwrap();
            let plain = { header.header_checksum = header.calc_header_checksum(); header.to_bytes() };
            header.options = options[..].try_into().unwrap();
            header.set_payload_len(len.into()).unwrap();
            let bytes = header.to_bytes();
            let found = Ipv4Header(bytes[..20].try_into().unwrap());
            prop_assert_eq!(usize::try_from(found.header_len()).unwrap(), bytes.len());
            prop_assert_eq!(&found.without_options().0[..], &plain[..]);
        }

        #[test]
        fn a_bit_flip_invalidates_the_header_checksum(bit in 0usize..160, from in any::<[u8; 4]>()) {
            let mut header = Ipv4Header::reply(from, [10, 0, 0, 5], 20, 0, 64);
            header.0[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(!header.checksum_is_right(0));
        }

        #[test]
        fn an_applied_difference_equals_a_full_sum(
            old in any::<[u8; 8]>(), new in any::<[u8; 32]>(), rest in any::<[u8; 6]>(),
        ) {
            let before = (!fold(sum(&rest, sum(&old, 0)))).to_ne_bytes();
            let after = (!fold(sum(&rest, sum(&new, 0)))).to_ne_bytes();
            let adjusted = apply_difference(before, checksum_difference(&old, &new));
            // One's complement has two zeros; they mean the same sum.
            let same = adjusted == after || (adjusted, after) == ([0; 2], [0xff; 2]) || (after, adjusted) == ([0; 2], [0xff; 2]);
            prop_assert!(same, "{adjusted:?} {after:?}");
        }

        #[test]
        fn an_ipv6_header_reads_back(from in any::<[u8; 16]>(), to in any::<[u8; 16]>(), len in any::<u16>(), class in any::<u8>()) {
            let header = Ipv6Header::new(protocol::TCP, from, to, len, class, 64);
            prop_assert_eq!(header.source(), from);
            prop_assert_eq!(header.destination(), to);
            prop_assert_eq!(header.payload_len(), len);
            prop_assert_eq!(header.traffic_class(), class);
            prop_assert_eq!(header.0[0] >> 4, 6);
        }
    }
}
