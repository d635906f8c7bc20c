//! Words that this process, other processes and BPF programs share without system calls.

#![expect(unsafe_code, reason = "a memory mapping is a raw pointer")]

use std::num::NonZero;
use std::ops::Deref;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::slice;
use std::sync::atomic::AtomicU64;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::stat::fstat;
use nix::unistd::ftruncate;

/// The least size of a page. The kernel rounds the length of a mapping up to whole pages.
const PAGE: usize = 4096;

/// The first `len` words of a mapped file or BPF array.
///
/// The mapping keeps its memory alive, even without a pin or descriptor.
#[derive(Debug)]
pub(crate) struct SharedWords {
    start: NonNull<AtomicU64>,
    len: usize,
}

// SAFETY: the mapping belongs to no thread, and all access to it is atomic.
unsafe impl Send for SharedWords {}
// SAFETY: as above.
unsafe impl Sync for SharedWords {}

impl SharedWords {
    /// Maps the first words of a BPF array that was created with `BPF_F_MMAPABLE` and has values of
    /// 8 bytes.
    ///
    /// # Errors
    /// The kernel refuses, for example because the array was created without that flag or is
    /// shorter.
    pub(crate) fn map_array(array: BorrowedFd<'_>, len: usize) -> Result<Self, Errno> {
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: the kernel chooses the address, so no memory in use is replaced. It refuses to
        // map more of an array than there is (array_map_mmap).
        let start = unsafe { mmap(None, mapped_bytes(len)?, access, MapFlags::MAP_SHARED, array, 0) }?;
        Ok(Self { start: start.cast(), len })
    }

    /// Creates words that are zero, for this process and those that get the descriptor.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) fn create(name: &str, len: usize) -> Result<(OwnedFd, Self), Errno> {
        let memory = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        let bytes = i64::try_from(mapped_bytes(len)?.get()).map_err(|_| Errno::EFBIG)?;
        ftruncate(&memory, bytes)?;
        // Another process could otherwise truncate it, and an access would end this one (SIGBUS).
        fcntl(&memory, FcntlArg::F_ADD_SEALS(FIXED_SIZE))?;
        let words = Self::map_memory(memory.as_fd(), len)?;
        Ok((memory, words))
    }

    /// Maps words that [`Self::create`] made in another process.
    ///
    /// # Errors
    /// The kernel refuses, or the memory is shorter or may become so.
    pub(crate) fn map_memory(memory: BorrowedFd<'_>, len: usize) -> Result<Self, Errno> {
        let seals = fcntl(memory, FcntlArg::F_GET_SEALS)?;
        if !SealFlag::from_bits_truncate(seals).contains(FIXED_SIZE) {
            return Err(Errno::EPERM);
        }
        let bytes = mapped_bytes(len)?;
        if usize::try_from(fstat(memory)?.st_size).is_ok_and(|size| size < bytes.get()) {
            return Err(Errno::EFBIG);
        }
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: the kernel chooses the address, so no memory in use is replaced. The file is as
        // long as the mapping, and its seals keep it so.
        let start = unsafe { mmap(None, bytes, access, MapFlags::MAP_SHARED, memory, 0) }?;
        Ok(Self { start: start.cast(), len })
    }
}

/// The size cannot change any more, and neither can this.
const FIXED_SIZE: SealFlag =
    SealFlag::F_SEAL_SHRINK.union(SealFlag::F_SEAL_GROW).union(SealFlag::F_SEAL_SEAL);

fn mapped_bytes(len: usize) -> Result<NonZero<usize>, Errno> {
    let bytes =
        len.checked_mul(size_of::<AtomicU64>()).and_then(|bytes| bytes.checked_next_multiple_of(PAGE));
    bytes.and_then(NonZero::new).ok_or(Errno::EINVAL)
}

impl Deref for SharedWords {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: the mapping has at least `len` words, is aligned to a page, initialised by the
        // kernel, and lives as long as `self`. Others change the words, which are atomic.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        let Ok(bytes) = mapped_bytes(self.len) else { unreachable!("it was mapped with this length") };
        // SAFETY: this mapping has this length, and no reference into it outlives `self`.
        let unmapped = unsafe { munmap(self.start.cast(), bytes.get()) };
        debug_assert_eq!(unmapped, Ok(()), "the arguments are those of the mapping");
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn two_mappings_share_their_words() {
        let (memory, one) = SharedWords::create("test", 600).unwrap();
        let other = SharedWords::map_memory(memory.as_fd(), 600).unwrap();
        one[599].store(7, Ordering::Relaxed);
        drop((one, memory));
        assert_eq!((other.len(), other[0].load(Ordering::Relaxed)), (600, 0));
        assert_eq!(other[599].load(Ordering::Relaxed), 7);
    }

    #[test]
    fn memory_that_may_shrink_is_not_mapped() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(PAGE as u64).unwrap();
        SharedWords::map_memory(file.as_fd(), 1).unwrap_err();
        let (memory, _words) = SharedWords::create("test", 1).unwrap();
        assert_eq!(ftruncate(&memory, 0), Err(Errno::EPERM));
        assert_eq!(SharedWords::map_memory(memory.as_fd(), 513).unwrap_err(), Errno::EFBIG);
    }

    /// `life_hung_agent` maps a BPF array, which needs privileges.
    #[test]
    fn what_cannot_be_mapped_for_writing_is_an_error() {
        let file = File::open("/proc/self/exe").unwrap();
        assert_eq!(SharedWords::map_array(file.as_fd(), 2).unwrap_err(), Errno::EACCES);
    }
}
