//! The agent as a process: its critical tasks, its capabilities and its restrictions.

pub(crate) mod blocking;
pub mod capabilities;
pub(crate) mod hardening;
pub(crate) mod supervisor;
