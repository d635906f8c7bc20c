//! The only function in which instructions and allocations of the calling thread are counted.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::hint::black_box;

use serde::{Deserialize, Serialize};

/// The name of [`counted`] for callgrind.
pub const COUNTED: &str = "*meter::counted*";
pub const END_OF_SUBJECT: &str = "*meter::end_of_subject*";
/// The number of rounds of the empty subject.
const ROUNDS: u64 = 100;

/// A subject after its rounds. Its instructions are those counted by callgrind up to its end.
#[derive(Debug, Serialize, Deserialize)]
pub struct Subject {
    pub name: String,
    pub rounds: u64,
    /// The number of calls of [`counted`] for it, each of which has a cost.
    pub calls: u64,
    pub allocations: u64,
}

/// A subject during its rounds.
pub struct Performance {
    name: String,
    rounds: u64,
    calls: u64,
}

thread_local! {
    static COUNTS: Cell<bool> = const { Cell::new(false) };
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

impl Performance {
    pub fn begin(name: &str) -> Self {
        ALLOCATIONS.set(0);
        Self { name: name.to_owned(), rounds: 0, calls: 0 }
    }

    /// Starts another round.
    pub fn round(&mut self) {
        self.rounds += 1;
    }

    /// Runs and counts a part of a round.
    pub fn count<T>(&mut self, work: impl FnOnce() -> T) -> Option<T> {
        self.calls += 1;
        let (mut work, mut done) = (Some(work), None);
        counted(&mut || done = work.take().map(|work| work()));
        done
    }

    pub fn end(self) -> Subject {
        end_of_subject(self.rounds);
        let Self { name, rounds, calls } = self;
        Subject { name, rounds, calls, allocations: ALLOCATIONS.get() }
    }
}

/// Not generic, or there would be many copies; not inlined, or callgrind could not find it.
#[inline(never)]
fn counted(work: &mut dyn FnMut()) {
    COUNTS.set(true);
    work();
    COUNTS.set(false);
}

#[inline(never)]
fn end_of_subject(rounds: u64) {
    black_box(rounds);
}

/// Measures the cost of counting.
pub fn nothing() -> Subject {
    let mut performance = Performance::begin("nothing");
    for _ in 0..ROUNDS {
        performance.round();
        performance.count(|| ());
    }
    performance.end()
}

/// The system's allocator, which the agent also uses.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

impl Counting {
    fn note() {
        if COUNTS.get() {
            ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        }
    }
}

#[expect(unsafe_code, reason = "an allocator has no other interface")]
// SAFETY: every call is passed unchanged to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::note();
        // SAFETY: the caller upholds the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::note();
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        Self::note();
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_allocations_inside_the_section_are_counted() {
        let mut performance = Performance::begin("a box");
        black_box(Box::new(1));
        performance.round();
        performance.count(|| black_box(Box::new(2)));
        black_box(Box::new(3));
        let Subject { rounds, calls, allocations, .. } = performance.end();
        assert_eq!((rounds, calls, allocations), (1, 1, 1));
    }
}
