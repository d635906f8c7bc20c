//! The BPF programs, packet by packet, on the host and in the running kernel.

#![expect(clippy::panic, reason = "a helper that fails, fails its test")]

mod differential;
mod table;
