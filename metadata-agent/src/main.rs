//! The `metadata-agent` command: parses the command line and runs the command.

use std::process::ExitCode;

fn main() -> ExitCode {
    metadata_agent::commands::main()
}
