//! `metadata-agent run`: serves the guests of this host.

use std::process::ExitCode;

use super::cli::RunArgs;
use super::{exit_code, with_config};
use crate::app;
use crate::process::signals::HeldSignals;

pub(super) fn run(args: &RunArgs) -> ExitCode {
    // Before anything that may take time, such as reading files.
    match HeldSignals::hold() {
        Ok(held) => with_config(&args.config, |config| app::run(config, held).map(|()| ExitCode::SUCCESS)),
        Err(error) => exit_code(Err(error.into())),
    }
}
