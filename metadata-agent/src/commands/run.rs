//! `metadata-agent run`: serves the guests of this host.

use std::process::ExitCode;

use super::cli::RunArgs;
use super::with_config;
use crate::app;
use crate::process::signals::HeldSignals;

pub(super) fn run(args: &RunArgs, held: HeldSignals) -> ExitCode {
    with_config(&args.config, |config| app::run(config, &args.config, held).map(|()| ExitCode::SUCCESS))
}
