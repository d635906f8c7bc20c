//! What stands in front of the programs in other namespaces than the host's: a few instructions that say which namespace it
//! is and go on in the one copy of the programs that all of these share. A copy for each would have the kernel verify
//! some ten thousand steps, and keep its machine code, a thousand times over.
//!
//! Every word of the site is written before anything reads it: what the control block held before may be a guest's.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![expect(clippy::needless_pass_by_value, reason = "the signature that the macro asks for")]
#![expect(missing_docs, reason = "statics that the map macro writes; metadata_ebpf::abi documents each")]

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::macros::{classifier, map};
use aya_ebpf::maps::ProgramArray;
use aya_ebpf::programs::TcContext;
use metadata_ebpf::abi::{NetnsContext, slots};

/// Written by the loader, once for each namespace.
#[unsafe(no_mangle)]
#[expect(unsafe_code, reason = "the loader finds it by its name")]
static MD_NETNS: NetnsContext = NetnsContext { netns: 0, portal_ifindex: 0, portal_nsid: 0, legacy_port: 0 };

#[map]
static MD_PROGRAMS: ProgramArray = ProgramArray::pinned(slots::COUNT, 0);

/// Without the programs it is as if nothing were on the hook.
#[classifier]
pub fn md_from_guest(ctx: TcContext) -> i32 {
    enter(&ctx, slots::FROM_GUEST);
    TC_ACT_UNSPEC
}

/// Nothing but answers comes out of the portal, and without the programs those are nobody's.
#[classifier]
pub fn md_to_guest(ctx: TcContext) -> i32 {
    enter(&ctx, slots::TO_GUEST);
    TC_ACT_SHOT
}

/// Comes back only if the slot is empty.
#[inline(always)]
#[expect(
    unsafe_code,
    reason = "the control block is the kernel's memory, and nothing returns from a tail call"
)]
fn enter(ctx: &TcContext, slot: u32) {
    // SAFETY: a valid pointer; volatile, as the compiler does not know that the loader writes there. The kernel hands a valid
    // context to the program, whose control block has five words. Nothing here is to be dropped.
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

/// The same as of the programs that it stands before.
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
#[expect(unsafe_code, reason = "the kernel finds the licence by its section")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
