//! The `metadata-agent` command: parses the command line and runs the command.

use std::process::ExitCode;

use metadata_agent::commands;
use metadata_agent::commands::cli::Cli;

fn main() -> ExitCode {
    commands::dispatch(&Cli::parse_or_exit().command)
}
