//! Dispatchers: tail-call stubs in front of the programs of every namespace except the host's.
//!
//! A dispatcher writes the context of its namespace into the packet's control block and tail-calls
//! the one copy of the programs that all these namespaces share. With a copy per namespace, the
//! kernel would verify over ten thousand instructions, and keep their machine code, a thousand
//! times.
//!
//! Every word of the context is written before anything reads it, because a guest may have set the
//! previous content of the control block.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![expect(clippy::needless_pass_by_value, reason = "the signature that the macro asks for")]

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::macros::{classifier, map};
use aya_ebpf::maps::ProgramArray;
use aya_ebpf::programs::TcContext;
use metadata_ebpf::abi::{NetnsContext, slots};

/// Written by the loader, once per namespace.
#[unsafe(no_mangle)]
#[expect(unsafe_code, reason = "the loader finds it by its name")]
static MD_NETNS: NetnsContext = NetnsContext { netns: 0, portal_ifindex: 0, portal_nsid: 0, legacy_port: 0 };

#[map]
static MD_PROGRAMS: ProgramArray = ProgramArray::pinned(slots::COUNT, 0);

/// If the slot is empty, the packet continues as if no program were attached.
#[classifier]
pub fn md_from_guest(ctx: TcContext) -> i32 {
    dispatch(&ctx, slots::FROM_GUEST);
    TC_ACT_UNSPEC
}

/// If the slot is empty, the packet is dropped: only replies come out of the portal, and nothing
/// else could deliver them.
#[classifier]
pub fn md_to_guest(ctx: TcContext) -> i32 {
    dispatch(&ctx, slots::TO_GUEST);
    TC_ACT_SHOT
}

/// Tail-calls the program in a slot. Returns only if the slot is empty.
#[inline(always)]
#[expect(
    unsafe_code,
    reason = "the control block is the kernel's memory, and nothing returns from a tail call"
)]
fn dispatch(ctx: &TcContext, slot: u32) {
    // SAFETY: the pointer to the static is valid. The read is volatile because the loader changes
    // the value without the compiler's knowledge. The kernel passes a valid context, whose control
    // block has five words. No destructor is skipped by the tail call.
    unsafe {
        let [netns, portal_ifindex, portal_nsid, legacy_port] =
            core::ptr::read_volatile(&raw const MD_NETNS).words();
        (*ctx.skb.skb).cb = [netns, portal_ifindex, portal_nsid, legacy_port, 0];
        MD_PROGRAMS.tail_call(ctx, slot);
    }
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The same licence as that of the programs behind the dispatchers.
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
#[expect(unsafe_code, reason = "the kernel finds the licence by its section")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
