//! `metadata-agent run`: serves the guests of this host.

use std::process::ExitCode;

use super::cli::RunArgs;
use super::with_config;
use crate::app;

pub(super) fn run(args: &RunArgs) -> ExitCode {
    with_config(&args.config, |config| app::run(config).map(|()| ExitCode::SUCCESS))
}
