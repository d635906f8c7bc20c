//! Makes a thread of another process issue system calls, as if it had been taken over.

use std::ffi::c_void;

use nix::errno::Errno;
use nix::libc::user_regs_struct;
use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::processes::raw;

/// The main thread of a process, stopped inside a system call. Dropping this lets it go on.
#[derive(Debug)]
pub struct Injection {
    thread: Pid,
    /// The registers with which it goes on.
    original: user_regs_struct,
}

/// A text for the memory of the other process.
#[derive(Debug)]
pub struct Text(Vec<u8>);

impl Text {
    #[must_use]
    pub fn new(text: &str) -> Self {
        let mut bytes = text.as_bytes().to_vec();
        bytes.push(0);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        Self(bytes)
    }
}

/// Distance below the stack pointer, beyond the part that code may use without moving it.
const SCRATCH: u64 = 4096;

impl Injection {
    /// Stops the main thread, which must be waiting in a system call.
    #[must_use]
    pub fn into(pid: u32) -> Self {
        let thread = raw(pid);
        ptrace::seize(thread, ptrace::Options::empty()).expect("seize the thread");
        ptrace::interrupt(thread).expect("interrupt the thread");
        let status = waitpid(thread, Some(WaitPidFlag::__WALL));
        assert!(matches!(status, Ok(WaitStatus::PtraceEvent(..))), "it did not stop: {status:?}");
        let original = ptrace::getregs(thread).expect("read its registers");
        let code = ptrace::read(thread, pointer(original.rip - 2)).expect("read its code");
        let [first, second, ..] = code.to_le_bytes();
        assert_eq!([first, second], [0x0f, 0x05], "it is not in a system call");
        Self { thread, original }
    }

    /// Issues a system call.
    ///
    /// # Errors
    /// Returns the kernel's error.
    pub fn call(&mut self, number: i64, arguments: &[u64]) -> Result<i64, Errno> {
        self.call_with(number, arguments, None)
    }

    /// Issues a system call with the address of a text as its argument: the second one of `openat`,
    /// and the first one of others.
    ///
    /// # Errors
    /// Returns the kernel's error.
    pub fn call_with(&mut self, number: i64, arguments: &[u64], text: Option<&Text>) -> Result<i64, Errno> {
        let mut arguments = arguments.to_vec();
        if let Some(Text(bytes)) = text {
            let address = (self.original.rsp - SCRATCH) & !15;
            for (position, word) in bytes.chunks_exact(8).enumerate() {
                let word = i64::from_le_bytes(word.try_into().expect("eight bytes"));
                let at = pointer(address + 8 * position as u64);
                ptrace::write(self.thread, at, word).expect("write its memory");
            }
            arguments[usize::from(number == nix::libc::SYS_openat)] = address;
        }
        arguments.resize(6, 0);
        let mut registers = self.original;
        registers.rip -= 2;
        registers.rax = number.cast_unsigned();
        // Nothing to restart (signal(7)).
        registers.orig_rax = u64::MAX;
        let [a, b, c, d, e, f] = arguments[..] else { panic!("too many arguments: {arguments:?}") };
        (registers.rdi, registers.rsi, registers.rdx) = (a, b, c);
        (registers.r10, registers.r8, registers.r9) = (d, e, f);
        ptrace::setregs(self.thread, registers).expect("set its registers");
        ptrace::step(self.thread, None).expect("let it issue the call");
        let status = waitpid(self.thread, Some(WaitPidFlag::__WALL));
        assert!(matches!(status, Ok(WaitStatus::Stopped(_, nix::sys::signal::SIGTRAP))), "{status:?}");
        let result = ptrace::getregs(self.thread).expect("read its registers").rax.cast_signed();
        match i32::try_from(result) {
            Ok(error @ -4095..=-1) => Err(Errno::from_raw(-error)),
            _ => Ok(result),
        }
    }
}

impl Drop for Injection {
    fn drop(&mut self) {
        // It restarts the call that was interrupted. If it is gone, its test fails by itself.
        let restored = ptrace::setregs(self.thread, self.original);
        if let Err(error) = restored.and_then(|()| ptrace::detach(self.thread, None)) {
            eprintln!("let the thread go on: {error}");
        }
    }
}

fn pointer(address: u64) -> *mut c_void {
    std::ptr::with_exposed_provenance_mut(
        usize::try_from(address).unwrap_or_else(|_| unreachable!("64 bits")),
    )
}
