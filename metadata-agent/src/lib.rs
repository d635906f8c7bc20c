//! The metadata agent: one process per host that answers the metadata requests of all its guests.
//!
//! [`app`] wires everything; what stands below it knows only its own job. Towards the kernel: [`datapath`],
//! [`portal`], [`classifier`], [`netlink`], [`netns`]. Towards whoever knows the ports: [`sources`], [`ovsdb`],
//! [`inventory`]. Towards guests and Nova: [`proxy`].
//! [`guests`] brings links, inventory and datapath together, leaves the outcome in the [`directory`], and tells sources by
//! [`presence`] what they are needed for. [`callers`] does the same for the requests of haproxies that still run.

pub mod admin;
pub mod app;
pub mod callers;
pub mod check;
pub mod classifier;
pub mod cli;
pub mod config;
pub mod datapath;
pub mod detach;
pub mod directory;
pub mod guests;
pub mod heartbeat;
pub mod ids;
pub mod inventory;
pub mod logging;
pub mod metrics;
pub mod namespaces;
pub mod netlink;
pub mod netns;
pub mod overview;
pub mod ovsdb;
pub mod portal;
pub mod presence;
pub mod proxy;
pub mod rights;
pub mod secrets;
mod shards;
pub mod show;
pub mod socket;
pub mod socket_file;
pub mod sources;
pub mod status;
pub mod tls;
pub mod vital;
