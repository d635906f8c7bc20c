//! The one function within which instructions and allocations are counted, of the thread that calls it.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::hint::black_box;

use serde::{Deserialize, Serialize};

/// What of this file callgrind is told, as it prints names.
pub const COUNTED: &str = "*meter::counted*";
pub const END_OF_SUBJECT: &str = "*meter::end_of_subject*";
/// How often the empty subject is performed.
const ROUNDS: u64 = 100;

/// What was performed. Its instructions are what callgrind has counted up to its end.
#[derive(Debug, Serialize, Deserialize)]
pub struct Subject {
    pub name: String,
    pub rounds: u64,
    /// How often [`counted`] was called for it, which costs something by itself.
    pub calls: u64,
    pub allocations: u64,
}

/// One of them.
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

    /// Once more.
    pub fn round(&mut self) {
        self.rounds += 1;
    }

    /// Does a part of a round, and counts it.
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

/// Of generic code there would be many; and inlined, callgrind could not see it.
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

/// What counting costs.
pub fn nothing() -> Subject {
    let mut performance = Performance::begin("nothing");
    for _ in 0..ROUNDS {
        performance.round();
        performance.count(|| ());
    }
    performance.end()
}

/// The system's, which is the agent's.
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
// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::note();
        // SAFETY: the caller's promises are those that are asked.
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
    fn allocations_count_within_and_nowhere_else() {
        let mut performance = Performance::begin("a box");
        black_box(Box::new(1));
        performance.round();
        performance.count(|| black_box(Box::new(2)));
        black_box(Box::new(3));
        let Subject { rounds, calls, allocations, .. } = performance.end();
        assert_eq!((rounds, calls, allocations), (1, 1, 1));
    }
}
