//! Other kernels and real guests in virtual machines.

#![expect(clippy::unwrap_used, reason = "a helper that fails, fails its test")]

mod guests;
mod kernels;
