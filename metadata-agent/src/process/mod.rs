//! The agent as a process: its critical tasks, capabilities, restrictions and signals.

pub(crate) mod blocking;
pub mod capabilities;
pub(crate) mod hardening;
pub(crate) mod progress;
pub(crate) mod signals;
pub(crate) mod supervisor;
