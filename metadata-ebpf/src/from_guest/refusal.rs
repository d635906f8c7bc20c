//! Records each dropped packet at the attachment of its sender, and reports it to the agent.
//!
//! Only packets that are dropped get here, so no other packet pays for it. An attachment reports
//! each reason once a second at most, however many packets are dropped.

use core::hint::black_box;

use super::port_key;
use crate::abi::{REFUSAL_EVENT_INTERVAL_NS, Refusal};
use crate::reason::{REFUSAL_COUNT, Reason};
use crate::skb::Skb;
use crate::wire::{ETH_LEN, ethertype};
use crate::world::World;

/// Does nothing for a packet that belongs to no attachment. Not inlined, for the reason given in
/// [`super::segment`].
#[inline(never)]
pub(super) fn record<S: Skb, W: World>(skb: &S, world: &W, reason: Reason) {
    let Ok(key) = port_key(skb, world, skb.vlan()) else { return };
    let Some(attachment) = world.port(&key).map(|port| port.attachment) else { return };
    let now_ns = world.now_ns();
    world.refusals(attachment, |refusals| {
        let last = &mut refusals.last;
        (last.at_ns, last.attachment, last.reason) = (now_ns, attachment, reason.index());
        (last.mac, last.address) = ([0; 6], [0; 16]);
        // A helper that failed may have left a frame that is partly rewritten.
        if reason != Reason::HelperFailed {
            note_source(skb, last);
        }

        // Linux 5.10 forgets the bound of a value that it keeps on the stack during a helper call,
        // so no call comes between this comparison and the last use.
        let position = black_box(reason.index() as usize).wrapping_sub(Reason::Confined.index() as usize);
        if position >= REFUSAL_COUNT {
            return;
        }
        refusals.packets[position] = refusals.packets[position].wrapping_add(1);
        if now_ns.saturating_sub(refusals.reported_ns[position]) < REFUSAL_EVENT_INTERVAL_NS {
            return;
        }
        refusals.reported_ns[position] = now_ns;
        world.report(&refusals.last);
    });
}

/// Notes the source of a frame as far as it has one.
#[inline(always)]
fn note_source<S: Skb>(skb: &S, last: &mut Refusal) {
    /// Offset of the sender's address in an ARP packet.
    const ARP_SENDER: u32 = ETH_LEN + 14;

    let Ok(ethernet) = skb.load::<14>(0) else { return };
    let [_, _, _, _, _, _, a, b, c, d, e, f, kind @ ..] = ethernet;
    last.mac = [a, b, c, d, e, f];
    let at = match kind {
        ethertype::IPV6 => {
            if let Ok(address) = skb.load(ETH_LEN + 8) {
                last.address = address;
            }
            return;
        }
        ethertype::IPV4 => ETH_LEN + 12,
        ethertype::ARP => ARP_SENDER,
        _ => return,
    };
    if let Ok([a, b, c, d]) = skb.load(at) {
        last.address = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d];
    }
}
