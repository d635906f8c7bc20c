//! The programs: the maps and two entry points, each a table from reason to verdict.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![expect(clippy::needless_pass_by_value, reason = "the signature that the macro asks for")]

mod kernel_skb;
mod kernel_world;

use aya_ebpf::bindings::{BPF_F_INGRESS, TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::{bpf_redirect, bpf_redirect_peer};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use metadata_ebpf::from_guest::{Outcome, from_guest};
use metadata_ebpf::reason::Verdict;
use metadata_ebpf::to_guest::to_guest;

use kernel_skb::KernelSkb;
use kernel_world::{KernelWorld, count};

/// TC ingress on guest-facing interfaces.
#[classifier]
pub fn md_from_guest(ctx: TcContext) -> i32 {
    let world = KernelWorld::new(&ctx);
    match from_guest(&mut KernelSkb::new(&ctx), &world) {
        None => TC_ACT_UNSPEC,
        Some(outcome) => apply_verdict(&ctx, outcome),
    }
}

/// TC ingress on the host end of the portal's veth pair.
#[classifier]
pub fn md_to_guest(ctx: TcContext) -> i32 {
    let world = KernelWorld::new(&ctx);
    let outcome = to_guest(&mut KernelSkb::new(&ctx), &world);
    apply_verdict(&ctx, outcome)
}

/// `TC_ACT_UNSPEC` equals `TCX_NEXT`: other programs on the hook, and the host's own path, continue
/// as if our program were not attached.
#[inline(always)]
#[expect(unsafe_code, reason = "helpers are unsafe to call")]
#[expect(clippy::cast_possible_truncation, reason = "the helpers return a verdict")]
fn apply_verdict(ctx: &TcContext, outcome: Outcome) -> i32 {
    count(outcome.reason);
    trace(ctx, outcome);
    // SAFETY: the helpers take plain numbers; for a wrong interface index the kernel drops the
    // frame.
    let redirected = unsafe {
        match outcome.reason.verdict() {
            Verdict::Next => return TC_ACT_UNSPEC,
            Verdict::Drop => return TC_ACT_SHOT,
            Verdict::ToPortal => bpf_redirect_peer(outcome.ifindex, 0),
            Verdict::ToGuest => bpf_redirect(outcome.ifindex, 0),
            Verdict::AsGuest => bpf_redirect(outcome.ifindex, u64::from(BPF_F_INGRESS)),
        }
    };
    redirected as i32
}

#[cfg(feature = "trace-log")]
#[inline(always)]
fn trace(ctx: &TcContext, outcome: Outcome) {
    use metadata_ebpf::skb::Skb as _;
    aya_log_ebpf::info!(ctx, "ifindex {} {}", KernelSkb::new(ctx).ifindex(), outcome.reason.label());
}

#[cfg(not(feature = "trace-log"))]
#[inline(always)]
fn trace(_ctx: &TcContext, _outcome: Outcome) {}

#[cfg(not(target_arch = "bpf"))]
fn main() {}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// `bpf_tcp_check_syncookie` and others are GPL-only.
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
#[expect(unsafe_code, reason = "the kernel finds the licence by its section")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
