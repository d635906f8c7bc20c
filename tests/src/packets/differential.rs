//! The kernel against the host build with generated frames. Both must produce the same bytes, the
//! same reason and the same recorded clients. A frame that is not redirected must not change.
//!
//! A batch is a state and a seed. The frames of one batch see the map entries of the frames before
//! them.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::panic::resume_unwind;
use std::thread::{self, ScopedJoinHandle};
use std::time::Instant;

use metadata_ebpf::abi::{AttachmentState, Client, ClientKey, Refusal, Refusals};
use metadata_ebpf::from_guest::from_guest;
use metadata_ebpf::host::{HostSkb, HostWorld};
use metadata_ebpf::reason::{Reason, Verdict};
use metadata_ebpf::skb::HEAD;
use metadata_ebpf::to_guest::to_guest;

use super::frame_mutator::FrameMutator;
use super::kernel::{Fixture, Kernel, verdict_of};
use super::world::{IFINDEX, host_world};
use super::{ATTACHMENT, Exhausted, NORMAL, Program, State};

const BATCH: u64 = 2_000;
/// One for each core of the smallest machine that runs the tests.
const THREADS: u64 = 2;

/// `BPF_PROG_TEST_RUN` cannot set a tag, which is stored beside the frame. No helper fails for a
/// frame that passed the checks.
const OUT_OF_REACH: [Reason; 2] = [Reason::Vlan, Reason::HelperFailed];

/// The states, with their share of every sixteen batches.
const STATES: [(usize, State); 12] = [
    (4, NORMAL),
    (2, State { port_known: false, client_known: true, ..NORMAL }),
    (1, State { port_known: false, ..NORMAL }),
    (1, State { client_known: true, exhausted: Exhausted::Guest, ..NORMAL }),
    (1, State { client_known: true, interface_there: false, ..NORMAL }),
    (1, State { routed: true, exhausted: Exhausted::Guest, ..NORMAL }),
    (1, State { routed: true, port_known: false, exhausted: Exhausted::All, ..NORMAL }),
    (1, State { attached: false, client_known: true, ..NORMAL }),
    (1, State { alive: false, ..NORMAL }),
    (1, State { listening: false, client_known: true, ..NORMAL }),
    (1, State { routed: true, port_known: false, client_known: true, ..NORMAL }),
    (1, State { routed: true, confined: true, ..NORMAL }),
];

/// The count of each reason, in the order of the counters, and of frames without a reason.
type Tally = [u64; Reason::COUNT + 1];

/// Runs this number of frames through both builds, starting with `seed`, and returns the tally as
/// text.
///
/// Panics at the first difference, or if a reachable reason did not occur.
#[must_use]
pub fn decide_alike(frames: u64, seed: u64) -> String {
    let began = Instant::now();
    let batches = frames.div_ceil(BATCH);
    let tallies = thread::scope(|scope| {
        let threads: Vec<_> =
            (0..THREADS).map(|number| scope.spawn(move || share(number, batches, seed))).collect();
        let join =
            |thread: ScopedJoinHandle<'_, Tally>| thread.join().unwrap_or_else(|panic| resume_unwind(panic));
        threads.into_iter().map(join).collect::<Vec<_>>()
    });
    let total: Tally = std::array::from_fn(|at| tallies.iter().map(|tally| tally[at]).sum());

    let names = Reason::ALL.iter().map(|reason| reason.label()).chain(["no metadata"]);
    let mut summary =
        format!("{} frames in {:?}, from seed {seed}", total.iter().sum::<u64>(), began.elapsed());
    for (name, count) in names.zip(total) {
        write!(summary, "\n{count:>10} {name}").expect("a string takes all");
    }
    let unseen: Vec<_> = Reason::ALL
        .iter()
        .filter(|reason| total[reason.index() as usize] == 0 && !OUT_OF_REACH.contains(reason))
        .collect();
    assert!(unseen.is_empty() && total[Reason::COUNT] > 0, "no frame of {unseen:?}: {summary}");
    summary
}

/// Runs the share of one thread in its own namespaces.
fn share(number: u64, batches: u64, seed: u64) -> Tally {
    Fixture::set_up(&format!("differ{number}"), |fixture| {
        let mut pair = Pair::new(fixture.load());
        let turns = STATES.map(|(times, state)| vec![state; times]).concat();
        let mine = (0..batches).filter(|batch| batch % THREADS == number);
        let (not_listening, listening): (Vec<_>, Vec<_>) = mine
            .map(|batch| Batch {
                state: turns[(batch / THREADS) as usize % turns.len()],
                seed: seed.wrapping_add(batch),
            })
            .partition(|batch| !batch.state.listening);
        let ends = fixture.listen();
        for batch in &listening {
            pair.run(batch);
        }
        drop(ends);
        for batch in &not_listening {
            pair.run(batch);
        }
        pair.tally
    })
}

#[derive(Clone, Copy, Debug)]
struct Batch {
    state: State,
    seed: u64,
}

/// The outcome of a frame in one build. The kernel counts its reasons separately.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Made {
    verdict: i32,
    frame: Vec<u8>,
}

/// Both builds, kept in the same state.
struct Pair {
    kernel: Kernel,
    world: HostWorld,
    out: Vec<u8>,
    tally: Tally,
}

impl Pair {
    fn new(kernel: Kernel) -> Self {
        Self { kernel, world: host_world(&NORMAL), out: vec![0; 4096], tally: [0; Reason::COUNT + 1] }
    }

    fn set(&mut self, state: &State) {
        self.kernel.set(state);
        self.world = host_world(state);
    }

    fn run(&mut self, batch: &Batch) {
        self.set(&batch.state);
        let before = self.kernel.counters();
        let mut counted: Tally = [0; Reason::COUNT + 1];
        let mut mutator = FrameMutator::new(batch.seed);
        for number in 0..BATCH {
            let (program, frame) = mutator.next_frame();
            let (reason, host) = self.on_the_host(program, &frame);
            let kernel = self.in_the_kernel(program, &frame);
            if host != kernel {
                self.report(batch, number, program, &frame, (reason, &host), &kernel);
            }
            assert!(moved(reason) || host.frame == frame, "changed despite {reason:?}: {}", hex(&frame));
            counted[position(reason)] += 1;
        }
        let in_kernel: Vec<u64> =
            self.kernel.counters().iter().zip(before).map(|(after, before)| after - before).collect();
        if in_kernel != counted[..Reason::COUNT] {
            self.find_miscounted(batch);
            panic!("{batch:?} is counted as {in_kernel:?}, not as {counted:?}, and frame by frame it is not");
        }
        assert_eq!(
            timeless(self.kernel.clients()),
            timeless(self.world.clients.borrow().clone()),
            "{batch:?}"
        );
        let noted = |state: AttachmentState| (state.metadata_mac, state.macs, state.netns, state.vlan);
        let on_host = self.world.attachments.borrow()[&ATTACHMENT];
        assert_eq!(noted(self.kernel.attachment()), noted(on_host), "{batch:?}");
        let refused = |refusals: Refusals| {
            let Refusal { attachment, reason, address, mac, .. } = refusals.last;
            (refusals.packets, attachment, reason, address, mac)
        };
        let on_host = self.world.refusals.borrow()[&ATTACHMENT];
        assert_eq!(refused(self.kernel.refusals()), refused(on_host), "{batch:?}");
        for (sum, count) in self.tally.iter_mut().zip(counted) {
            *sum += count;
        }
    }

    fn on_the_host(&mut self, program: Program, frame: &[u8]) -> (Option<Reason>, Made) {
        // In the kernel's runs every frame is linear. Here every other frame is linear only up to
        // the head, which must not make a difference.
        let linear = if frame.len().is_multiple_of(2) { HEAD } else { usize::MAX };
        let mut skb = HostSkb { linear, ..HostSkb::new(frame.to_vec(), IFINDEX) };
        let outcome = match program {
            Program::FromGuest => from_guest(&mut skb, &self.world),
            Program::ToGuest => Some(to_guest(&mut skb, &self.world)),
        };
        let reason = outcome.map(|outcome| outcome.reason);
        (reason, Made { verdict: verdict_of(reason), frame: skb.frame })
    }

    fn in_the_kernel(&mut self, program: Program, frame: &[u8]) -> Made {
        let (verdict, len) = self.kernel.test_run(program, frame, &mut self.out);
        Made { verdict, frame: self.out[..len].to_vec() }
    }

    /// Returns the reason that the kernel counts for one frame, and the outcome of both builds.
    fn one(&mut self, program: Program, frame: &[u8]) -> (Option<Reason>, Option<Reason>, Made, Made) {
        let before = self.kernel.counters();
        let (reason, host) = self.on_the_host(program, frame);
        let kernel = self.in_the_kernel(program, frame);
        let after = self.kernel.counters();
        let moved = before.iter().zip(&after).position(|(before, after)| before != after);
        (moved.map(|at| Reason::ALL[at]), reason, kernel, host)
    }

    /// Repeats a batch and compares the counters after each frame.
    fn find_miscounted(&mut self, batch: &Batch) {
        self.set(&batch.state);
        let mut mutator = FrameMutator::new(batch.seed);
        for number in 0..BATCH {
            let (program, frame) = mutator.next_frame();
            let (counted, reason, ..) = self.one(program, &frame);
            assert_eq!(counted, reason, "{batch:?}, frame {number}, {program:?}: {}", hex(&frame));
        }
    }

    fn report(
        &mut self,
        batch: &Batch,
        number: u64,
        program: Program,
        frame: &[u8],
        (reason, host): (Option<Reason>, &Made),
        kernel: &Made,
    ) -> ! {
        let known = State { client_known: true, ..batch.state };
        let least = [batch.state, known]
            .iter()
            .find_map(|state| Some((state.client_known, self.reduce(state, program, frame)?)));
        let least = least
            .map_or("no difference without the frames before it".to_owned(), |(known, frame)| {
                format!("{} (client known: {known})", hex(&frame))
            });
        panic!(
            "{batch:?}, frame {number}, {program:?}:\n  frame   {}\n  reduced {least}\n  host    {reason:?}, {} {}\n  \
             kernel  {} {}",
            hex(frame),
            host.verdict,
            hex(&host.frame),
            kernel.verdict,
            hex(&kernel.frame),
        );
    }

    /// Returns the smallest frame that still shows a difference by itself, by cutting and zeroing.
    fn reduce(&mut self, state: &State, program: Program, frame: &[u8]) -> Option<Vec<u8>> {
        let mut differs = |frame: &[u8]| {
            self.set(state);
            let (counted, reason, kernel, host) = self.one(program, frame);
            counted != reason || kernel != host
        };
        if !differs(frame) {
            return None;
        }
        let mut least = frame.to_vec();
        // Shorter frames are not accepted, see `FrameMutator`.
        let whole_headers = least.len().min(54);
        let mut step = least.len() / 2;
        while step > 0 {
            let cut =
                least.len().checked_sub(step).filter(|len| *len >= whole_headers && differs(&least[..*len]));
            match cut {
                Some(len) => least.truncate(len),
                None => step /= 2,
            }
        }
        for at in 0..least.len() {
            let byte = std::mem::take(&mut least[at]);
            if !differs(&least) {
                least[at] = byte;
            }
        }
        Some(least)
    }
}

fn moved(reason: Option<Reason>) -> bool {
    matches!(reason.map(Reason::verdict), Some(Verdict::ToPortal | Verdict::ToGuest | Verdict::AsGuest))
}

fn position(reason: Option<Reason>) -> usize {
    reason.map_or(Reason::COUNT, |reason| reason.index() as usize)
}

/// Replaces all timestamps by those of the host build.
pub(super) fn timeless(mut clients: HashMap<ClientKey, Client>) -> HashMap<ClientKey, Client> {
    for client in clients.values_mut() {
        (client.first_seen_ns, client.last_seen_ns) = (0, 0);
    }
    clients
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}
