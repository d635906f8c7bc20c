//! The metadata agent: one process per host that answers the metadata requests of all its guests.
//!
//! [`app`] starts and connects the components, with settings from [`config`]. Kernel side:
//! [`attach`] and [`namespaces`], which use [`datapath`] and [`net`]. Port data: [`sources`] and
//! [`inventory`]. Guests and Nova: [`proxy`], with [`nova_access`]. The [`directory`] joins
//! attachments and ports.
//!
//! `cargo xtask lint` checks that each module imports only modules of lower layers.

#![warn(unreachable_pub)]

pub(crate) mod admin;
pub(crate) mod app;
pub(crate) mod attach;
pub mod commands;
pub mod config;
pub(crate) mod data_path_probe;
pub mod data_plane;
pub mod datapath;
pub mod directory;
mod error_chain;
pub mod ids;
pub mod inventory;
pub(crate) mod ipc;
pub(crate) mod namespaces;
pub mod net;
pub mod nova_access;
pub mod process;
pub mod proxy;
pub mod secrets;
pub(crate) mod sources;
mod sys;
mod teardown;
