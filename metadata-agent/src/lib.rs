//! The metadata agent.

pub mod ids;
