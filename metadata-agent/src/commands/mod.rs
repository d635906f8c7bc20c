//! The subcommands of `metadata-agent`, one file or folder each, and their command line.

mod check;
mod cli;
mod config_show;
mod data_plane;
mod detach;
mod output;
mod run;
mod status;

use std::process::ExitCode;

use anyhow::{Context as _, Result};
use tokio::runtime::Builder;

use crate::config::{Config, ConfigArgs, ConfigErrors};
use crate::error_chain::error_chain;
use crate::process::hardening;
use crate::process::signals::HeldSignals;
use cli::{Cli, Command, ConfigCommand, EX_USAGE};
use output::print_error;

/// Parses the command line of this process, runs its command, prints its error, and returns its
/// exit code.
#[must_use]
pub fn main() -> ExitCode {
    // First of all: no signal that a runbook may send ends `run`, however early it comes.
    let held = match HeldSignals::hold() {
        Ok(held) => held,
        Err(error) => return exit_code(Err(error.into())),
    };
    if let Err(error) = hardening::restrict_process() {
        return exit_code(Err(error.into()));
    }
    match &Cli::parse_or_exit().command {
        Command::Run(args) => run::run(args, held),
        Command::Check(args) => with_signals(held, || check::run(args)),
        Command::Config(ConfigCommand::Show(args)) => with_signals(held, || config_show::run(args)),
        Command::Status(args) => with_signals(held, || status::run(args)),
        Command::Detach(args) => with_signals(held, || detach::run(args)),
        Command::DataPlane => data_plane::run(),
    }
}

/// Runs a command that every signal ends as usual.
fn with_signals(held: HeldSignals, command: impl FnOnce() -> ExitCode) -> ExitCode {
    match held.release() {
        Ok(()) => command(),
        Err(error) => exit_code(Err(error.into())),
    }
}

/// Runs the work of a command that needs the whole configuration.
fn with_config(args: &ConfigArgs, work: impl FnOnce(&Config) -> Result<ExitCode>) -> ExitCode {
    match Config::load(args) {
        Ok(config) => exit_code(work(&config)),
        Err(errors) => unusable_config(&errors),
    }
}

/// Drives the work of a command to its end on the calling thread.
fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    Builder::new_current_thread().enable_all().build().context("start a runtime")?.block_on(work)
}

fn exit_code(outcome: Result<ExitCode>) -> ExitCode {
    outcome.unwrap_or_else(|error| {
        print_error(&error_chain(error.as_ref()));
        ExitCode::FAILURE
    })
}

fn unusable_config(errors: &ConfigErrors) -> ExitCode {
    print_error(&errors.to_string());
    ExitCode::from(EX_USAGE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::anyhow;

    #[test]
    fn a_quoted_cause_is_printed_once() {
        let error = anyhow!("no such file").context("cannot open x: no such file").context("start");
        assert_eq!(error_chain(error.as_ref()), "start: cannot open x: no such file");
    }
}
