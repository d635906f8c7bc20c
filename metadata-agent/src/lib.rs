//! The metadata agent: one process per host that answers the metadata requests of all its guests.
//!
//! [`app`] wires everything; the rooms below it know only their own job. Towards the kernel: [`attach`] and
//! [`namespaces`], which work on [`datapath`] and [`net`]. Towards port data: [`sources`] and
//! [`inventory`]. Towards guests and Nova: [`proxy`]. The [`directory`] is where attachments and ports meet.

pub mod admin;
pub mod app;
pub mod attach;
pub mod commands;
pub mod config;
pub mod datapath;
pub mod directory;
mod error_chain;
pub mod ids;
pub mod inventory;
pub mod namespaces;
pub mod net;
pub mod process;
pub mod proxy;
pub mod secrets;
pub mod sources;
mod teardown;
