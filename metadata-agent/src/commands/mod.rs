//! The subcommands of `metadata-agent` and their command line.

pub mod check;
pub mod cli;
pub mod config_show;
pub mod detach;
pub mod status;
