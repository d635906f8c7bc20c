//! Mutated frames: the table's frames, changed at random with knowledge of the headers.
//!
//! Equal seeds give equal frames. Half of the changes repair lengths and the IPv4 checksum, because
//! otherwise few frames would pass the first check.

use fastrand::Rng;
use metadata_ebpf::identity::{METADATA_IPV4, METADATA_IPV6, PORTAL_ADDRESS};

use super::frames::{self, icmpv6};
use super::{
    ATTACHMENT, CONNECTED_PORT, DERIVED_IPV6, GUEST_IP, GUEST_IPV6, GUEST_MAC, IPV6_ONLY_MAC, NEW_PORT,
    PAIR_IP, PAIR_MAC, Program, ROUTER_MAC, SELF_ASSIGNED_IP, cases, identity, identity_at, identity_of,
    identity_v6,
};

/// `BPF_PROG_TEST_RUN` accepts frames with at least an Ethernet header.
const SHORTEST: usize = 14;
/// The maximum that fits into the page that the kernel copies a frame to.
const LONGEST: usize = 2048;
/// The end of the headers that a program may read.
const HEADERS: usize = 110;

const ETH: usize = 14;
/// EtherType of IPv4.
const IPV4: &[u8] = &[8, 0];

/// An endless sequence of frames.
pub struct FrameMutator {
    rng: Rng,
    from_guest: Vec<Vec<u8>>,
    to_guest: Vec<Vec<u8>>,
}

impl FrameMutator {
    /// Starts the sequence of `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let of =
            |program| cases().into_iter().filter(move |case| case.program == program).map(|case| case.frame);
        Self {
            rng: Rng::with_seed(seed),
            from_guest: of(Program::FromGuest).collect(),
            to_guest: of(Program::ToGuest).collect(),
        }
    }

    /// Returns the next frame and the program that receives it.
    pub fn next_frame(&mut self) -> (Program, Vec<u8>) {
        let program = if self.rng.u8(..4) == 0 { Program::ToGuest } else { Program::FromGuest };
        // One in sixteen frames goes to the other program.
        let ours = (program == Program::FromGuest) != (self.rng.u8(..16) == 0);
        let seeds = if ours { &self.from_guest } else { &self.to_guest };
        let mut frame = seeds[self.rng.usize(..seeds.len())].clone();
        match self.rng.u8(..32) {
            0 => frame = self.bystander(),
            1 => frame = self.icmp_error(&frame),
            2 => frame = self.icmpv6_error(&frame),
            3 | 4 => frame = self.neighbour_discovery(),
            // Keep the frame unchanged.
            5..8 => {}
            _ => {
                for _ in 0..self.rng.usize(1..=3) {
                    self.mutate(&mut frame);
                }
            }
        }
        frame.resize(frame.len().clamp(shortest(&frame), LONGEST), 0);
        if self.rng.bool() {
            mend_length(&mut frame);
        }
        if self.rng.bool() {
            mend_checksum(&mut frame);
        }
        (program, frame)
    }

    fn mutate(&mut self, frame: &mut Vec<u8>) {
        match self.rng.u8(..16) {
            0..3 => self.change_bytes(frame),
            3 => frame.truncate(self.rng.usize(SHORTEST..=frame.len().max(SHORTEST))),
            4 => self.extend(frame),
            5 => self.splice(frame),
            6 | 7 => self.address(frame),
            8 | 9 => self.ip_field(frame),
            10 | 11 => self.tcp_field(frame),
            12 => self.vlan(frame),
            13 => self.ipv4_options(frame),
            14 => self.ipv6_extensions(frame),
            _ => self.mac(frame),
        }
    }

    /// Changes some bytes, mostly in the headers and mostly to edge values.
    fn change_bytes(&mut self, frame: &mut [u8]) {
        const EDGES: &[u8] =
            &[0, 1, 2, 4, 5, 6, 8, 13, 14, 20, 40, 44, 58, 60, 64, 80, 0x7f, 0x80, 0xfe, 0xff];
        for _ in 0..self.rng.usize(1..=6) {
            let reach = if self.rng.u8(..8) == 0 { frame.len() } else { frame.len().min(HEADERS) };
            let at = self.rng.usize(..reach);
            frame[at] = match self.rng.u8(..4) {
                0 => self.rng.u8(..),
                1 => frame[at] ^ (1 << self.rng.u8(..8)),
                2 => frame[at].wrapping_add(self.pick(&[1, 0xff])),
                _ => self.pick(EDGES),
            };
        }
    }

    fn extend(&mut self, frame: &mut Vec<u8>) {
        let most = self.pick(&[1, 2, 20, 40, 400]);
        for _ in 0..self.rng.usize(1..=most) {
            frame.push(self.rng.u8(..));
        }
    }

    /// Joins the start of one frame and the end of another.
    fn splice(&mut self, frame: &mut Vec<u8>) {
        let seeds = if self.rng.bool() { &self.from_guest } else { &self.to_guest };
        let other = &seeds[self.rng.usize(..seeds.len())];
        let at = self.rng.usize(..=frame.len().min(other.len()).min(HEADERS));
        frame.truncate(at);
        frame.extend_from_slice(&other[at..]);
    }

    fn mac(&mut self, frame: &mut [u8]) {
        let mac = self.pick(&[
            GUEST_MAC,
            PAIR_MAC,
            IPV6_ONLY_MAC,
            ROUTER_MAC,
            [0xff; 6],
            [0; 6],
            [1, 0, 0x5e, 0, 0, 1],
            [2, 0, 0, 0, 0, 9],
        ]);
        let at = self.pick(&[0, 6]);
        put(frame, at, &mac);
    }

    fn address(&mut self, frame: &mut [u8]) {
        if is(frame, IPV4) {
            let random = [10, 0, self.rng.u8(..), self.rng.u8(..)];
            let known = [
                GUEST_IP,
                PAIR_IP,
                SELF_ASSIGNED_IP,
                METADATA_IPV4,
                [10, 0, 0, 4],
                [0; 4],
                [127, 0, 0, 1],
                [255; 4],
                [224, 0, 0, 1],
            ];
            let address = if self.rng.bool() { random } else { self.pick(&known) };
            let at = if self.rng.u8(..4) == 0 { ETH + 16 } else { ETH + 12 };
            put(frame, at, &address);
        } else {
            let mut link_local = [0; 16];
            link_local[..2].copy_from_slice(&[0xfe, 0x80]);
            link_local[8..].copy_from_slice(&self.rng.u64(..).to_be_bytes());
            let mut client = identity();
            client[self.rng.usize(..16)] ^= 1 << self.rng.u8(..8);
            let global = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5];
            let address = match self.rng.u8(..4) {
                0 => link_local,
                1 => client,
                _ => self.pick(&[
                    GUEST_IPV6,
                    METADATA_IPV6,
                    PORTAL_ADDRESS,
                    identity(),
                    identity_v6(),
                    identity_of(ATTACHMENT + 1, GUEST_MAC),
                    identity_of(ATTACHMENT, ROUTER_MAC),
                    identity_at(DERIVED_IPV6),
                    DERIVED_IPV6,
                    global,
                    [0; 16],
                    [0xff; 16],
                ]),
            };
            let at = if self.rng.bool() { ETH + 8 } else { ETH + 24 };
            put(frame, at, &address);
        }
    }

    fn ip_field(&mut self, frame: &mut [u8]) {
        let protocol = self.pick(&[0, 1, 2, 6, 17, 41, 43, 44, 50, 51, 58, 59, 60, 132, 135, 255]);
        let len = self.pick(&[
            0, 1, 7, 8, 19, 20, 21, 27, 28, 39, 40, 41, 59, 60, 0x5dc, 0x7fff, 0xffeb, 0xffec, 0xffff,
        ]);
        let len = if self.rng.bool() { len } else { self.rng.u16(..) };
        if is(frame, IPV4) {
            match self.rng.u8(..5) {
                0 => put(frame, ETH, &[0x40 | self.rng.u8(..16)]),
                1 => put(frame, ETH + 2, &len.to_be_bytes()),
                2 => put(frame, ETH + 9, &[protocol]),
                3 => put(frame, ETH + 6, &(1u16 << self.rng.u8(..16)).to_be_bytes()),
                _ => put(frame, ETH + 6, &self.rng.u16(..).to_be_bytes()),
            }
        } else {
            match self.rng.u8(..4) {
                0 => put(frame, ETH + 4, &len.to_be_bytes()),
                1 => put(frame, ETH + 6, &[protocol]),
                2 => put(frame, ETH + 7, &[self.rng.u8(..)]),
                _ => put(frame, ETH, &self.rng.u32(..).to_be_bytes()),
            }
        }
    }

    /// Changes flags, data offset, ports or checksum, whatever the protocol behind the IP header
    /// is.
    fn tcp_field(&mut self, frame: &mut [u8]) {
        let tcp = payload_of(frame);
        let port = self.pick(&[80, 8080, 443, 0, 5, NEW_PORT, CONNECTED_PORT, 0xffff]).to_be_bytes();
        match self.rng.u8(..6) {
            0 => put(frame, tcp, &port),
            1 => put(frame, tcp + 2, &port),
            2 => put(frame, tcp + 12, &[self.rng.u8(..)]),
            3 => put(frame, tcp + 13, &[self.pick(&[0, 1, 2, 3, 4, 0x10, 0x12, 0x14, 0x18, 0xc2, 0xff])]),
            4 => put(frame, tcp + 13, &[self.rng.u8(..)]),
            _ => put(frame, tcp + 16, &self.pick(&[0u16, 0xffff, 1, 0xfffe, 0x1234]).to_be_bytes()),
        }
    }

    /// Inserts a tag into the frame. A program sees only the second tag of a frame there.
    fn vlan(&mut self, frame: &mut Vec<u8>) {
        let [high, low] = self.rng.u16(..).to_be_bytes();
        let tag = [self.pick(&[0x81, 0x88]), self.pick(&[0, 0xa8]), high, low];
        insert(frame, 12, &tag);
    }

    fn ipv4_options(&mut self, frame: &mut Vec<u8>) {
        let words = self.rng.usize(1..=10);
        let mut options = vec![1; words * 4];
        let start = self.pick(&[[1; 4], [148, 4, 0, 0], [131, 3, 4, 0], [7, 3, 4, 137], [0, 9, 9, 9]]);
        if self.rng.bool() {
            self.rng.fill(&mut options);
        }
        if self.rng.bool() {
            let at = self.rng.usize(..words) * 4;
            put(&mut options, at, &start);
        }
        insert(frame, ETH + 20, &options);
        put(frame, ETH, &[0x45 + u8::try_from(words).expect("ten at most")]);
        lengthen(frame, ETH + 2, options.len());
    }

    fn ipv6_extensions(&mut self, frame: &mut Vec<u8>) {
        let before = frame.len();
        for _ in 0..self.rng.usize(1..=3) {
            let mut header = [0; 8];
            self.rng.fill(&mut header[2..]);
            header[0] = frame.get(ETH + 6).copied().unwrap_or(59);
            header[1] = self.pick(&[0, 0, 0, 1, 255]);
            insert(frame, ETH + 40, &header);
            put(frame, ETH + 6, &[self.pick(&[0, 43, 44, 51, 60])]);
        }
        let added = frame.len() - before;
        lengthen(frame, ETH + 4, added);
    }

    /// Builds an ICMP error about a metadata packet, from various sources.
    fn icmp_error(&mut self, about: &[u8]) -> Vec<u8> {
        let (source, destination) =
            (self.pick(&[GUEST_IP, [10, 0, 0, 1]]), self.pick(&[METADATA_IPV4, [10, 0, 0, 1]]));
        let mut frame = frames::echo(source, destination, (GUEST_MAC, ROUTER_MAC), false);
        frame.truncate(ETH + 28);
        let quoted = about.get(ETH..).unwrap_or_default();
        frame.extend_from_slice(&quoted[..quoted.len().min(self.pick(&[0, 8, 28, 548]))]);
        put(&mut frame, ETH + 20, &[self.pick(&[3, 4, 5, 11, 12, 8, 0]), self.rng.u8(..16)]);
        let len = u16::try_from(frame.len() - ETH).expect("it was cut");
        put(&mut frame, ETH + 2, &len.to_be_bytes());
        frame
    }

    /// Builds an ICMPv6 error: packet too big, time exceeded and others.
    fn icmpv6_error(&mut self, about: &[u8]) -> Vec<u8> {
        let source = self.pick(&[GUEST_IPV6, METADATA_IPV6, [0; 16]]);
        let destination = self.pick(&[METADATA_IPV6, GUEST_IPV6]);
        let quoted = about.get(ETH..).unwrap_or_default();
        let quoted = &quoted[..quoted.len().min(1232)];
        let kind = self.pick(&[1, 2, 3, 4, 100, 127, 128, 129]);
        icmpv6((GUEST_MAC, ROUTER_MAC), (source, destination), kind, [0, 0, 5, 0], quoted)
    }

    /// Builds solicitations, advertisements and redirects with options: with length zero, too long,
    /// several, truncated.
    fn neighbour_discovery(&mut self) -> Vec<u8> {
        let all_nodes = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
        let source = self.pick(&[GUEST_IPV6, GUEST_IPV6, METADATA_IPV6, [0; 16], all_nodes]);
        let destination = self.pick(&[METADATA_IPV6, GUEST_IPV6, all_nodes]);
        let mut body = self.pick(&[METADATA_IPV6, METADATA_IPV6, GUEST_IPV6]).to_vec();
        for _ in 0..self.rng.usize(..4) {
            let mut option = [0; 32];
            self.rng.fill(&mut option);
            option[0] = self.pick(&[1, 2, 3, 4, 5, 14, 25, 255]);
            option[1] = self.pick(&[0, 1, 1, 1, 2, 4, 255]);
            let len = self.pick(&[8, 8, 16, 32, 1, 3]);
            body.extend_from_slice(&option[..len]);
        }
        let kind = self.pick(&[135, 135, 135, 136, 133, 134, 137]);
        let mut frame =
            icmpv6((GUEST_MAC, ROUTER_MAC), (source, destination), kind, [self.rng.u8(..), 0, 0, 0], &body);
        if self.rng.u8(..4) == 0 {
            self.change_bytes(&mut frame);
        }
        frame
    }

    /// Builds a frame that is unrelated to metadata and may contain anything.
    fn bystander(&mut self) -> Vec<u8> {
        let mut frame = vec![0; self.rng.usize(SHORTEST..400)];
        self.rng.fill(&mut frame);
        if self.rng.bool() {
            let ethertype = self.pick(&[[8, 0], [8, 6], [0x86, 0xdd], [0x88, 0xcc], [0x81, 0]]);
            put(&mut frame, 12, &ethertype);
        }
        frame
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.rng.usize(..from.len())]
    }
}

/// `BPF_PROG_TEST_RUN` of recent kernels does not accept an incomplete IP header.
fn shortest(frame: &[u8]) -> usize {
    match frame.get(12..14) {
        Some([8, 0]) => ETH + 20,
        Some([0x86, 0xdd]) => ETH + 40,
        _ => SHORTEST,
    }
}

fn is(frame: &[u8], ethertype: &[u8]) -> bool {
    frame.get(12..14) == Some(ethertype)
}

/// Returns the offset of the IP payload.
fn payload_of(frame: &[u8]) -> usize {
    if is(frame, IPV4) { ETH + 20 } else { ETH + 40 }
}

/// Overwrites bytes as far as the frame reaches.
fn put(frame: &mut [u8], at: usize, bytes: &[u8]) {
    frame.iter_mut().skip(at).zip(bytes).for_each(|(to, from)| *to = *from);
}

fn insert(frame: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    let at = at.min(frame.len());
    frame.splice(at..at, bytes.iter().copied());
}

/// Adds to a length field in the frame.
fn lengthen(frame: &mut [u8], at: usize, by: usize) {
    if let Some([high, low]) = frame.get(at..at + 2) {
        let len = u16::from_be_bytes([*high, *low]).wrapping_add(u16::try_from(by).expect("a few headers"));
        put(frame, at, &len.to_be_bytes());
    }
}

/// Sets the length in an IP header to that of the frame.
fn mend_length(frame: &mut [u8]) {
    let (at, before) = match frame.get(12..14) {
        Some([8, 0]) => (ETH + 2, ETH),
        Some([0x86, 0xdd]) => (ETH + 4, ETH + 40),
        _ => return,
    };
    let len = u16::try_from(frame.len() - before).expect("a page at most");
    put(frame, at, &len.to_be_bytes());
}

/// Corrects an IPv4 header's checksum over the header's own length.
fn mend_checksum(frame: &mut [u8]) {
    if !is(frame, IPV4) {
        return;
    }
    let words = usize::from(frame.get(ETH).copied().unwrap_or_default() & 15);
    let Some(header) = frame.get_mut(ETH..ETH + words * 4).filter(|header| header.len() >= 20) else {
        return;
    };
    put(header, 10, &[0, 0]);
    let sum: u32 = header.chunks_exact(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !u16::try_from((folded & 0xffff) + (folded >> 16)).expect("folded");
    put(header, 10, &checksum.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_seeds_give_equal_frames_the_kernel_accepts() {
        let frames = |seed| {
            let mut mutator = FrameMutator::new(seed);
            (0..5_000).map(|_| mutator.next_frame()).collect::<Vec<_>>()
        };
        assert_eq!(frames(7), frames(7));
        assert_ne!(frames(7), frames(8));
        assert!(frames(7).iter().all(|(_, frame)| (SHORTEST..=LONGEST).contains(&frame.len())));
    }

    #[test]
    fn a_repaired_header_has_the_checksum_of_etherparse() {
        let mut frame = frames::udp();
        let before = frame.clone();
        put(&mut frame, ETH + 10, &[0xde, 0xad]);
        mend_checksum(&mut frame);
        assert_eq!(frame, before);
    }
}
