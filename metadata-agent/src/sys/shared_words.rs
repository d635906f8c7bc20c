//! Words that this process, other processes and BPF programs share without system calls.

#![expect(unsafe_code, reason = "a memory mapping is a raw pointer")]

use std::num::NonZero;
use std::ops::Deref;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// The least size of a page. The kernel rounds the length of a mapping up to whole pages.
const PAGE: NonZero<usize> = NonZero::<usize>::MIN.saturating_add(4095);

/// The first `N` elements of a memory-mapped BPF array with values of 8 bytes.
///
/// The mapping keeps the map alive, even without a pin or descriptor.
#[derive(Debug)]
pub(crate) struct SharedWords<const N: usize>(NonNull<[AtomicU64; N]>);

// SAFETY: the mapping belongs to no thread, and all access to it is atomic.
unsafe impl<const N: usize> Send for SharedWords<N> {}
// SAFETY: as above.
unsafe impl<const N: usize> Sync for SharedWords<N> {}

impl<const N: usize> SharedWords<N> {
    /// Maps a BPF array that was created with `BPF_F_MMAPABLE`.
    ///
    /// # Errors
    /// The kernel refuses, for example because the array was created without that flag.
    pub(crate) fn map(array: BorrowedFd<'_>) -> Result<Self, Errno> {
        const { assert!(N * size_of::<AtomicU64>() <= PAGE.get(), "the words take more than a page") }
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: the kernel chooses the address, so no memory in use is replaced. Whatever the
        // descriptor stands for, the result is a page of its own.
        let start = unsafe { mmap(None, PAGE, access, MapFlags::MAP_SHARED, array, 0) }?;
        Ok(Self(start.cast()))
    }
}

impl<const N: usize> Deref for SharedWords<N> {
    type Target = [AtomicU64; N];

    fn deref(&self) -> &Self::Target {
        // SAFETY: the mapping is at least a page long, aligned to a page, initialised by the
        // kernel, and lives as long as `self`. Others change the words, which are atomic.
        unsafe { self.0.as_ref() }
    }
}

impl<const N: usize> Drop for SharedWords<N> {
    fn drop(&mut self) {
        // SAFETY: `map` made this mapping, and no reference into it outlives `self`.
        let unmapped = unsafe { munmap(self.0.cast(), PAGE.get()) };
        debug_assert_eq!(unmapped, Ok(()), "the arguments are those of the mapping");
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd as _;
    use std::sync::atomic::Ordering;

    use super::*;

    /// A file instead of a BPF array, which needs privileges. `life_hung_agent` maps the real one.
    #[test]
    fn two_mappings_share_their_words() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(PAGE.get() as u64).unwrap();
        let [one, other] = [(); 2].map(|()| SharedWords::<2>::map(file.as_fd()).unwrap());
        one[1].store(7, Ordering::Relaxed);
        drop((one, file));
        assert_eq!(other.each_ref().map(|word| word.load(Ordering::Relaxed)), [0, 7]);
    }

    #[test]
    fn what_cannot_be_mapped_for_writing_is_an_error() {
        let file = File::open("/proc/self/exe").unwrap();
        assert_eq!(SharedWords::<2>::map(file.as_fd()).unwrap_err(), Errno::EACCES);
    }
}
