//! The agent as a process: its critical tasks and its capabilities.

pub mod capabilities;
pub(crate) mod supervisor;
