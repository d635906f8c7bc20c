//! The metadata agent.

pub mod datapath;
pub mod ids;
pub mod netlink;
pub mod netns;
pub mod portal;
