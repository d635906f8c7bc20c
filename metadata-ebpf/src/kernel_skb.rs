//! The real `sk_buff`. All pointer arithmetic on packets is in [`Skb::linear`]; everything else
//! uses helpers.
#![expect(unsafe_code, reason = "packet memory and kernel helpers")]
#![expect(clippy::cast_possible_truncation, reason = "all lengths are of headers")]

use core::mem::MaybeUninit;

use aya_ebpf::bindings::{
    __sk_buff, BPF_F_ADJ_ROOM_FIXED_GSO, BPF_F_ADJ_ROOM_NO_CSUM_RESET, BPF_F_PSEUDO_HDR, bpf_adj_room_mode,
};
use aya_ebpf::helpers::generated as helpers;
use aya_ebpf::programs::TcContext;
use metadata_ebpf::skb::{HEAD, Skb, SkbError, Vlan};
use metadata_ebpf::wire::ethertype;

/// `PACKET_HOST` of linux/if_packet.h.
const PACKET_HOST: u32 = 0;
/// `VLAN_VID_MASK` of linux/if_vlan.h.
const VLAN_ID: u32 = 0x0fff;

/// Bytes with an alignment that allows word access; otherwise the compiler reads them one by one.
#[repr(C, align(8))]
struct Words<const N: usize>([u8; N]);

pub struct KernelSkb {
    skb: *mut __sk_buff,
}

impl KernelSkb {
    #[inline(always)]
    pub fn new(ctx: &TcContext) -> Self {
        Self { skb: ctx.skb.skb }
    }
}

impl KernelSkb {
    /// Inserts zeroes behind the IP header, or removes bytes there. The payload does not move, so
    /// checksum offload and GSO state remain valid.
    #[inline(always)]
    fn resize_behind_ip(&mut self, difference: i32) -> Result<(), SkbError> {
        let flags = u64::from(BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_NO_CSUM_RESET);
        let mode = bpf_adj_room_mode::BPF_ADJ_ROOM_NET;
        // SAFETY: takes the context and plain numbers.
        check(unsafe { helpers::bpf_skb_adjust_room(self.skb, difference, mode, flags) })
    }
}

#[inline(always)]
fn check(result: i64) -> Result<(), SkbError> {
    if result == 0 { Ok(()) } else { Err(SkbError) }
}

impl Skb for KernelSkb {
    #[inline(always)]
    fn len(&self) -> u32 {
        // SAFETY: the context is valid while the program runs.
        unsafe { (*self.skb).len }
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        // SAFETY: as in `len`.
        unsafe { (*self.skb).ifindex }
    }

    #[inline(always)]
    fn vlan(&self) -> Vlan {
        // SAFETY: as in `len`.
        let (present, tci, protocol) =
            unsafe { ((*self.skb).vlan_present, (*self.skb).vlan_tci, (*self.skb).vlan_proto) };
        if present == 0 {
            return Vlan::Untagged;
        }
        match (tci & VLAN_ID) as u16 {
            0 => Vlan::Priority,
            id if protocol == u32::from(u16::from_ne_bytes(ethertype::VLAN)) => Vlan::Tagged(id),
            _ => Vlan::Unsupported,
        }
    }

    #[inline(always)]
    fn head(&mut self) -> Option<&[u8; HEAD]> {
        if self.linear::<HEAD>(0).is_none() {
            if self.len() < HEAD as u32 {
                return None;
            }
            // The driver left the headers in a fragment. This is rare and worth one copy. SAFETY:
            // the context is valid; packet pointers are read again below.
            unsafe { helpers::bpf_skb_pull_data(self.skb, HEAD as u32) };
        }
        self.linear(0)
    }

    #[inline(always)]
    fn linear<const N: usize>(&self, offset: u32) -> Option<&[u8; N]> {
        // SAFETY: the kernel hands a valid context to the program.
        let (data, end) = unsafe { ((*self.skb).data as usize, (*self.skb).data_end as usize) };
        let at = data + offset as usize;
        // SAFETY: the end was compared with `data_end`. Helpers that move packet memory take `&mut
        // self`, so the borrow of `self` excludes them while the reference lives.
        if at + N > end { None } else { Some(unsafe { &*(at as *const [u8; N]) }) }
    }

    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Result<[u8; N], SkbError> {
        let mut words = MaybeUninit::<Words<N>>::uninit();
        // SAFETY: the helper writes N bytes, or fails.
        unsafe {
            check(helpers::bpf_skb_load_bytes(self.skb.cast(), offset, words.as_mut_ptr().cast(), N as u32))?;
            Ok(words.assume_init().0)
        }
    }

    #[inline(always)]
    fn store<const N: usize>(&mut self, offset: u32, bytes: &[u8; N]) -> Result<(), SkbError> {
        // SAFETY: the helper reads N bytes of `bytes` and checks the frame's end itself.
        check(unsafe { helpers::bpf_skb_store_bytes(self.skb, offset, bytes.as_ptr().cast(), N as u32, 0) })
    }

    #[inline(always)]
    fn change_to_ipv6(&mut self) -> Result<(), SkbError> {
        // SAFETY: takes the context and plain numbers.
        check(unsafe { helpers::bpf_skb_change_proto(self.skb, u16::from_ne_bytes(ethertype::IPV6), 0) })
    }

    #[inline(always)]
    fn change_to_ipv4(&mut self) -> Result<(), SkbError> {
        // SAFETY: takes the context and plain numbers.
        check(unsafe { helpers::bpf_skb_change_proto(self.skb, u16::from_ne_bytes(ethertype::IPV4), 0) })
    }

    #[inline(always)]
    fn remove_ipv4_options(&mut self, len: u32) -> Result<(), SkbError> {
        self.resize_behind_ip(-len.cast_signed())
    }

    #[inline(always)]
    fn insert_behind_ipv6(&mut self, len: u32) -> Result<(), SkbError> {
        self.resize_behind_ip(len.cast_signed())
    }

    #[inline(always)]
    fn adjust_checksum(&mut self, offset: u32, difference: u32) -> Result<(), SkbError> {
        let flags = u64::from(BPF_F_PSEUDO_HDR);
        // SAFETY: takes the context and plain numbers.
        check(unsafe { helpers::bpf_l4_csum_replace(self.skb, offset, 0, u64::from(difference), flags) })
    }

    #[inline(always)]
    fn adjust_icmp_checksum(&mut self, offset: u32, from: [u8; 2], to: [u8; 2]) -> Result<(), SkbError> {
        let (from, to) = (u16::from_ne_bytes(from), u16::from_ne_bytes(to));
        let size = size_of::<u16>() as u64;
        // SAFETY: takes the context and plain numbers.
        check(unsafe { helpers::bpf_l4_csum_replace(self.skb, offset, u64::from(from), u64::from(to), size) })
    }

    #[inline(always)]
    fn mark_for_host(&mut self) -> Result<(), SkbError> {
        // SAFETY: takes the context and plain numbers.
        check(unsafe { helpers::bpf_skb_change_type(self.skb, PACKET_HOST) })
    }

    #[inline(always)]
    fn pop_vlan(&mut self) -> Result<(), SkbError> {
        // SAFETY: takes the context.
        check(unsafe { helpers::bpf_skb_vlan_pop(self.skb) })
    }

    #[inline(always)]
    fn push_vlan(&mut self, id: u16) -> Result<(), SkbError> {
        // SAFETY: takes the context and plain numbers.
        check(unsafe { helpers::bpf_skb_vlan_push(self.skb, u16::from_ne_bytes(ethertype::VLAN), id) })
    }

    #[inline(always)]
    fn resize(&mut self, len: u32) -> Result<(), SkbError> {
        // SAFETY: takes the context and plain numbers.
        check(unsafe { helpers::bpf_skb_change_tail(self.skb, len, 0) })
    }
}
