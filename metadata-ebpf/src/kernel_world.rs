//! The real maps, clock and sockets.
#![expect(unsafe_code, reason = "map values are shared memory, and helpers are unsafe to call")]
#![expect(clippy::cast_possible_truncation, reason = "sizes of headers and of the list of reasons")]

use aya_ebpf::bindings::{__sk_buff, BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, bpf_sock, bpf_sock_tuple, tcphdr};
use aya_ebpf::helpers::generated as helpers;
use aya_ebpf::macros::map;
use aya_ebpf::maps::xdp::DevMapHash;
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf};
use aya_ebpf::programs::TcContext;
use metadata_ebpf::abi::{
    AttachmentState, Client, ClientKey, GuestShares, MAX_CLIENTS, MAX_PORTS, NetnsContext, Port, PortKey,
    REFUSAL_EVENTS_LEN, Refusal, Refusals, Settings, heartbeat,
};
use metadata_ebpf::identity::{METADATA_IPV4, METADATA_IPV6, METADATA_PORT, PORTAL_ADDRESS};
use metadata_ebpf::reason::Reason;
use metadata_ebpf::world::{PortalPeer, PortalSocket, Version, World};

/// Written by the loader. If it is not 0, the programs are entered only by a dispatcher, which has
/// written the namespace's context.
#[unsafe(no_mangle)]
static MD_DISPATCHED: u32 = 0;

#[map]
static MD_CONFIG: Array<Settings> = Array::pinned(1, 0);
#[map]
static MD_HEARTBEAT: Array<u64> = Array::pinned(heartbeat::COUNT, BPF_F_MMAPABLE);
#[map]
static MD_PORTS: HashMap<PortKey, Port> = HashMap::pinned(MAX_PORTS, BPF_F_NO_PREALLOC);
#[map]
static MD_ATTACH: HashMap<u32, AttachmentState> = HashMap::pinned(MAX_PORTS, BPF_F_NO_PREALLOC);
#[map]
static MD_SHARES: HashMap<u32, GuestShares> = HashMap::pinned(MAX_PORTS, BPF_F_NO_PREALLOC);
#[map]
static MD_REFUSALS: HashMap<u32, Refusals> = HashMap::pinned(MAX_PORTS, BPF_F_NO_PREALLOC);
#[map]
static MD_REFUSAL_EV: RingBuf = RingBuf::pinned(REFUSAL_EVENTS_LEN, 0);
#[map]
static MD_DEVICES: DevMapHash = DevMapHash::pinned(MAX_PORTS, 0);
#[map]
static MD_CLIENTS: LruHashMap<ClientKey, Client> = LruHashMap::pinned(MAX_CLIENTS, 0);
#[map]
static MD_STATS: PerCpuArray<u64> = PerCpuArray::pinned(Reason::COUNT as u32, 0);

/// Counts one packet. The counter belongs to this CPU, and a program cannot preempt itself on one
/// CPU.
#[inline(always)]
pub fn count(reason: Reason) {
    if let Some(counter) = MD_STATS.get_ptr_mut(reason.index()) {
        // SAFETY: only this CPU writes a per-CPU element, and it lives as long as the map.
        unsafe { *counter += 1 };
    }
}

pub struct KernelWorld {
    skb: *mut __sk_buff,
}

impl KernelWorld {
    #[inline(always)]
    pub fn new(ctx: &TcContext) -> Self {
        Self { skb: ctx.skb.skb }
    }
}

impl World for KernelWorld {
    #[inline(always)]
    fn now_ns(&self) -> u64 {
        // SAFETY: no arguments.
        unsafe { helpers::bpf_ktime_get_ns() }
    }

    #[inline(always)]
    fn netns_context<T: Copy>(&self, field: impl Fn(&NetnsContext) -> &T) -> T {
        // SAFETY: the pointer is valid. The read is volatile because the loader changes the value
        // without the compiler's knowledge.
        if unsafe { core::ptr::read_volatile(&raw const MD_DISPATCHED) } == 0 {
            return *field(&NetnsContext { netns: 0, portal_ifindex: 0, portal_nsid: 0, legacy_port: 0 });
        }
        // SAFETY: the kernel hands a valid context to the program.
        let [netns, portal_ifindex, portal_nsid, legacy_port, _] = unsafe { (*self.skb).cb };
        *field(&NetnsContext::from_words([netns, portal_ifindex, portal_nsid, legacy_port]))
    }

    #[inline(always)]
    fn settings(&self) -> Option<&Settings> {
        MD_CONFIG.get(0)
    }

    #[inline(always)]
    fn heartbeat_ns(&self) -> u64 {
        MD_HEARTBEAT.get(heartbeat::DATA).copied().unwrap_or(0)
    }

    #[inline(always)]
    fn port(&self, key: &PortKey) -> Option<&Port> {
        // SAFETY: RCU keeps the element alive while the program runs. The agent replaces whole
        // elements.
        unsafe { MD_PORTS.get(key) }
    }

    #[inline(always)]
    fn attachment<T>(&self, attachment: u32, with: impl FnOnce(&mut AttachmentState) -> T) -> Option<T> {
        // SAFETY: as in `port`. Another CPU may write the same words, each of which is aligned and
        // complete by itself.
        MD_ATTACH.get_ptr_mut(attachment).map(|entry| with(unsafe { &mut *entry }))
    }

    #[inline(always)]
    fn shares<T>(&self, attachment: u32, with: impl FnOnce(&mut GuestShares) -> T) -> Option<T> {
        // SAFETY: as in `attachment`.
        MD_SHARES.get_ptr_mut(attachment).map(|entry| with(unsafe { &mut *entry }))
    }

    #[inline(always)]
    fn refusals<T>(&self, attachment: u32, with: impl FnOnce(&mut Refusals) -> T) -> Option<T> {
        // SAFETY: as in `attachment`.
        MD_REFUSALS.get_ptr_mut(attachment).map(|entry| with(unsafe { &mut *entry }))
    }

    #[inline(always)]
    fn report(&self, refusal: &Refusal) {
        // The entry in `MD_REFUSALS` keeps what does not fit.
        let _full = MD_REFUSAL_EV.output::<Refusal>(refusal, 0);
    }

    #[inline(always)]
    fn device(&self, attachment: u32) -> Option<u32> {
        MD_DEVICES.get_ifindex(attachment)
    }

    #[inline(always)]
    fn client<T>(&self, key: &ClientKey, with: impl FnOnce(&mut Client) -> T) -> Option<T> {
        // SAFETY: as in `attachment`. The kernel may give the memory of a record that it drops to
        // another client; a figure is then wrong.
        MD_CLIENTS.get_ptr_mut(key).map(|entry| with(unsafe { &mut *entry }))
    }

    #[inline(always)]
    fn put_client(&self, key: &ClientKey, client: &Client) {
        // Without memory there are no statistics about this client.
        let _unrecorded = MD_CLIENTS.insert(key, client, 0);
    }

    #[inline(always)]
    fn portal_socket(&self, peer: &PortalPeer, nsid: u32) -> PortalSocket {
        find_socket(self.skb, peer, nsid)
    }

    #[inline(always)]
    fn legacy_listens(&self, version: Version, port: u32) -> bool {
        match version {
            Version::V4 => listens_ipv4(self.skb, port as u16),
            Version::V6 => listens_ipv6(self.skb, port as u16),
        }
    }
}

/// `BPF_F_CURRENT_NETNS` of linux/bpf.h.
const CURRENT_NETNS: u64 = u64::MAX;

/// Looks up a listener in the program's own namespace. The client's address and port are zero, so
/// no connection matches.
#[inline(never)]
fn listens_ipv4(skb: *mut __sk_buff, port: u16) -> bool {
    let [a, b, c, d] = METADATA_IPV4;
    let [high, low] = port.to_be_bytes();
    // The IPv4 arm of `struct bpf_sock_tuple`: addresses, then ports.
    let mut tuple = Aligned([0, 0, 0, 0, a, b, c, d, 0, 0, high, low]);
    has_socket(skb, (&raw mut tuple).cast(), size_of::<Aligned<12>>() as u32)
}

#[inline(never)]
fn listens_ipv6(skb: *mut __sk_buff, port: u16) -> bool {
    let mut tuple = SocketTuple {
        source: [0; 16],
        destination: METADATA_IPV6,
        source_port: [0; 2],
        destination_port: port.to_be_bytes(),
    };
    has_socket(skb, (&raw mut tuple).cast(), size_of::<SocketTuple>() as u32)
}

#[inline(always)]
fn has_socket(skb: *mut __sk_buff, tuple: *mut bpf_sock_tuple, len: u32) -> bool {
    // SAFETY: the tuple has `len` bytes; a socket that was found is released.
    unsafe {
        let socket = helpers::bpf_skc_lookup_tcp(skb.cast(), tuple, len, CURRENT_NETNS, 0);
        if socket.is_null() {
            return false;
        }
        helpers::bpf_sk_release(socket.cast());
        true
    }
}

#[repr(C, align(4))]
struct Aligned<const N: usize>([u8; N]);

/// Looks up the portal's socket for a segment.
///
/// `bpf_skc_lookup_tcp` finds full, request and TIME-WAIT sockets, or else the listener. For the
/// listener `bpf_tcp_check_syncookie` decides if the segment completes a handshake that was
/// answered with a SYN cookie.
///
/// Not inlined: a program has 512 bytes of stack, and consecutive calls reuse the same bytes.
#[inline(never)]
fn find_socket(skb: *mut __sk_buff, peer: &PortalPeer, nsid: u32) -> PortalSocket {
    /// `TCP_LISTEN` and `TCP_NEW_SYN_RECV` of net/tcp_states.h.
    const TCP_LISTEN: u32 = 10;
    const TCP_NEW_SYN_RECV: u32 = 12;

    let mut tuple = SocketTuple {
        source: peer.identity,
        destination: PORTAL_ADDRESS,
        source_port: [peer.tcp[0], peer.tcp[1]],
        destination_port: METADATA_PORT.to_be_bytes(),
    };
    // SAFETY: `SocketTuple` has the layout and the size of the IPv6 arm of `struct bpf_sock_tuple`.
    let socket = unsafe {
        helpers::bpf_skc_lookup_tcp(
            skb.cast(),
            (&raw mut tuple).cast::<bpf_sock_tuple>(),
            size_of::<SocketTuple>() as u32,
            u64::from(nsid),
            0,
        )
    };
    if socket.is_null() {
        return PortalSocket::Absent;
    }
    // SAFETY: not null, and released once below.
    let state = unsafe { (*socket).state };
    let found = if state == TCP_NEW_SYN_RECV {
        PortalSocket::HalfOpen
    } else if state != TCP_LISTEN || completes_a_cookie(socket, peer) {
        PortalSocket::Connected
    } else {
        PortalSocket::Listening
    };
    // SAFETY: releases the reference that the look-up took.
    unsafe { helpers::bpf_sk_release(socket.cast()) };
    found
}

/// The IPv6 arm of `struct bpf_sock_tuple`, network order.
#[repr(C, align(4))]
struct SocketTuple {
    source: [u8; 16],
    destination: [u8; 16],
    source_port: [u8; 2],
    destination_port: [u8; 2],
}

#[inline(always)]
fn completes_a_cookie(listener: *mut bpf_sock, peer: &PortalPeer) -> bool {
    let mut ip = [0u8; 40];
    ip[0] = 0x60;
    let mut at = 0;
    while at < 16 {
        ip[8 + at] = peer.identity[at];
        ip[24 + at] = PORTAL_ADDRESS[at];
        at += 1;
    }
    let mut tcp = peer.tcp;
    // SAFETY: the listener is a referenced socket; header sizes are those of the buffers.
    let verdict = unsafe {
        helpers::bpf_tcp_check_syncookie(
            listener.cast(),
            ip.as_mut_ptr().cast(),
            ip.len() as u32,
            tcp.as_mut_ptr().cast::<tcphdr>(),
            tcp.len() as u32,
        )
    };
    verdict == 0
}
