//! The metadata agent.

pub mod datapath;
pub mod config;
pub mod ids;
pub mod netlink;
pub mod netns;
pub mod portal;
pub mod admin;
pub mod cli;
pub mod config;
pub mod ids;
pub mod logging;
pub mod inventory;
pub mod sources;
pub mod metrics;
pub mod proxy;
