//! Tests with values in a packet's control block (`skb->cb`) that earlier code left there. The
//! host's programs ignore it, and a dispatcher overwrites it with the context of its namespace.

use std::collections::HashMap;

use metadata_ebpf::abi::{Client, ClientKey, NetnsContext};
use metadata_ebpf::reason::Reason;

use super::differential::timeless;
use super::kernel::{ControlBlock, Kernel};
use super::table::each_in_the_kernel;
use super::{Case, State};

/// Runs every row on the host and behind a dispatcher, each with several control blocks.
pub fn has_no_effect() {
    let mut opened = [0; 2];
    each_in_the_kernel("block", |kernel, case| {
        for routed in [false, true] {
            let state = State { routed, ..case.state };
            let (clean, _) = run(kernel, case, &state, [0; 5]);
            for block in dirty(kernel) {
                let (made, left) = run(kernel, case, &state, block);
                assert_eq!(made, clean, "{}, {routed}: {block:x?}", case.name);
                let expected = if routed { control_block(kernel.netns_context(true), 0) } else { block };
                assert_eq!(left, expected, "{}, {routed}: the control block for the next program", case.name);
            }
            // The attachment is found by its namespace.
            if clean.counted == [Reason::ConnectionOpened] {
                opened[usize::from(routed)] += 1;
            }
        }
    });
    assert!(opened.iter().all(|cases| *cases > 0), "connections are opened on both sides: {opened:?}");
}

/// Returns control blocks with meaningless numbers and with the context of a served namespace.
fn dirty(kernel: &Kernel) -> [ControlBlock; 2] {
    [[u32::MAX; 5], control_block(kernel.netns_context(true), 1)]
}

/// Returns the control block with this context and this last word.
fn control_block(context: NetnsContext, last: u32) -> ControlBlock {
    let [netns, portal_ifindex, portal_nsid, legacy_port] = context.words();
    [netns, portal_ifindex, portal_nsid, legacy_port, last]
}

/// The outcome for a packet, and the state of the maps after it.
#[derive(Debug, PartialEq, Eq)]
struct Made {
    verdict: i32,
    frame: Vec<u8>,
    counted: Vec<Reason>,
    clients: HashMap<ClientKey, Client>,
}

/// Runs a row. Also returns the control block as the program leaves it.
fn run(kernel: &mut Kernel, case: &Case, state: &State, mut block: ControlBlock) -> (Made, ControlBlock) {
    kernel.set(state);
    let before = kernel.counters();
    let mut frame = vec![0; 4096];
    let (verdict, len) = kernel.test_run_behind(&mut block, case.program, &case.frame, &mut frame);
    frame.truncate(len);
    let made =
        Made { verdict, frame, counted: kernel.counted_since(&before), clients: timeless(kernel.clients()) };
    (made, block)
}
