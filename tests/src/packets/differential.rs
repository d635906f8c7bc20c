//! The kernel against the host build: frames that nobody wrote down, of which both must make the same, to the last byte,
//! with the same reason and the same clients on record; and what is not moved goes on as it came.
//!
//! A batch is a state and a seed. Frames of one batch meet what those before them left in the maps.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::panic::resume_unwind;
use std::thread::{self, ScopedJoinHandle};
use std::time::Instant;

use metadata_ebpf::abi::{Client, ClientKey};
use metadata_ebpf::from_guest::from_guest;
use metadata_ebpf::host::{HostSkb, HostWorld};
use metadata_ebpf::reason::{Reason, Verdict};
use metadata_ebpf::skb::HEAD;
use metadata_ebpf::to_guest::to_guest;

use super::kernel::{CLIENTS, Kernel, Site, verdict_of};
use super::shapes::Shapes;
use super::world::{IFINDEX, host_world};
use super::{ATTACHMENT, NORMAL, Program, State};

const BATCH: u64 = 2_000;
/// One for each core of the smallest machine that runs the tests.
const THREADS: u64 = 2;

/// A tag lies beside the frame, where `BPF_PROG_TEST_RUN` cannot put one; and no helper refuses a frame that was judged.
const OUT_OF_REACH: [Reason; 2] = [Reason::Vlan, Reason::HelperFailed];

/// The states, and how many of every sixteen batches each gets.
const STATES: [(usize, State); 10] = [
    (5, NORMAL),
    (2, State { port_known: false, client_known: true, ..NORMAL }),
    (2, State { port_known: false, client_quota: u32::MAX, ..NORMAL }),
    (1, State { client_known: true, syn_exhausted: true, ..NORMAL }),
    (1, State { client_quota: 0, ..NORMAL }),
    (1, State { attached: false, client_known: true, ..NORMAL }),
    (1, State { alive: false, ..NORMAL }),
    (1, State { listening: false, client_known: true, ..NORMAL }),
    (1, State { routed: true, port_known: false, client_known: true, ..NORMAL }),
    (1, State { routed: true, ..NORMAL }),
];

/// How often each reason was, in the order of the counters, and how often none.
type Tally = [u64; Reason::COUNT + 1];

/// Runs so many frames through both builds, beginning with `seed`, and gives the tally as text.
///
/// Panics at the first difference, and when a reason within reach did not occur.
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
    let mut told = format!("{} frames in {:?}, from seed {seed}", total.iter().sum::<u64>(), began.elapsed());
    for (name, count) in names.zip(total) {
        write!(told, "\n{count:>10} {name}").expect("a string takes all");
    }
    let dull: Vec<_> = Reason::ALL
        .iter()
        .filter(|reason| total[reason.index() as usize] == 0 && !OUT_OF_REACH.contains(reason))
        .collect();
    assert!(dull.is_empty() && total[Reason::COUNT] > 0, "no frame of {dull:?}: {told}");
    told
}

/// One thread's part of the batches, in namespaces of its own.
fn share(number: u64, batches: u64, seed: u64) -> Tally {
    Site::set_up(&format!("differ{number}"), |site| {
        let mut pair = Pair::new(site.load());
        let turns = STATES.map(|(times, state)| vec![state; times]).concat();
        let mine = (0..batches).filter(|batch| batch % THREADS == number);
        let (deaf, listening): (Vec<_>, Vec<_>) = mine
            .map(|batch| Batch {
                state: turns[(batch / THREADS) as usize % turns.len()],
                seed: seed.wrapping_add(batch),
            })
            .partition(|batch| !batch.state.listening);
        let ends = site.listen();
        for batch in &listening {
            pair.run(batch);
        }
        drop(ends);
        for batch in &deaf {
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

/// What a build made of a frame. The kernel counts its reasons by itself.
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
        let mut shapes = Shapes::new(batch.seed);
        for number in 0..BATCH {
            let (program, frame) = shapes.next_frame();
            let (reason, host) = self.on_the_host(program, &frame);
            let kernel = self.in_the_kernel(program, &frame);
            if host != kernel {
                self.report(batch, number, program, &frame, (reason, &host), &kernel);
            }
            assert!(moved(reason) || host.frame == frame, "changed, though {reason:?}: {}", hex(&frame));
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
        assert_eq!(self.kernel.admitted(), self.world.attachments.borrow()[&ATTACHMENT].clients, "{batch:?}");
        for (sum, count) in self.tally.iter_mut().zip(counted) {
            *sum += count;
        }
    }

    fn on_the_host(&mut self, program: Program, frame: &[u8]) -> (Option<Reason>, Made) {
        self.world.clients_full = self.world.clients.borrow().len() >= CLIENTS as usize;
        // In the kernel's runs all of it is linear. Here every other frame has the head alone there, which is the same to the guest.
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

    /// The reason that the kernel counts for one frame, and what both builds make of it.
    fn one(&mut self, program: Program, frame: &[u8]) -> (Option<Reason>, Option<Reason>, Made, Made) {
        let before = self.kernel.counters();
        let (reason, host) = self.on_the_host(program, frame);
        let kernel = self.in_the_kernel(program, frame);
        let after = self.kernel.counters();
        let moved = before.iter().zip(&after).position(|(before, after)| before != after);
        (moved.map(|at| Reason::ALL[at]), reason, kernel, host)
    }

    /// Runs a batch once more and looks at the counters after each frame.
    fn find_miscounted(&mut self, batch: &Batch) {
        self.set(&batch.state);
        let mut shapes = Shapes::new(batch.seed);
        for number in 0..BATCH {
            let (program, frame) = shapes.next_frame();
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

    /// The least frame that still makes a difference by itself: cut, then zeroed, as much as it stands.
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
        // Shorter frames are not taken, see `Shapes`.
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
    matches!(reason.map(Reason::verdict), Some(Verdict::ToPortal | Verdict::ToGuest | Verdict::ToNeighbour))
}

fn position(reason: Option<Reason>) -> usize {
    reason.map_or(Reason::COUNT, |reason| reason.index() as usize)
}

/// Without what the clock says: the host build's stands.
pub(super) fn timeless(mut clients: HashMap<ClientKey, Client>) -> HashMap<ClientKey, Client> {
    for client in clients.values_mut() {
        (client.first_seen_ns, client.last_seen_ns) = (0, 0);
    }
    clients
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}
