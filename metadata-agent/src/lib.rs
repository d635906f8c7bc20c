//! The metadata agent.

pub mod datapath;
pub mod config;
pub mod ids;
pub mod netlink;
pub mod netns;
pub mod portal;
