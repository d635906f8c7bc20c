//! The `metadata-agent` command: reads the command line, does what it says, and turns the outcome into an exit code.

use std::process::ExitCode;

use anyhow::{Context as _, Result};
use metadata_agent::app;
use metadata_agent::commands::cli::{Cli, Command, ConfigCommand, EX_USAGE};
use metadata_agent::commands::{check, config_show, detach, status};
use metadata_agent::config::{Config, ConfigArgs};
use tokio::runtime::Builder;

fn main() -> ExitCode {
    match Cli::parse_or_exit().command {
        Command::Run(args) => {
            with_config(&args.config, |config| app::run(config).map(|()| ExitCode::SUCCESS))
        }
        Command::Check(args) => with_config(&args.config, |config| blocking(check::run(config, args.json))),
        Command::Detach(args) => {
            with_config(&args.config, |config| blocking(detach::run(config)).map(|()| ExitCode::SUCCESS))
        }
        Command::Config(ConfigCommand::Show(args)) => with_config(&args.config, |config| {
            config_show::run(config, args.json).map(|()| ExitCode::SUCCESS)
        }),
        Command::Status(args) => match metadata_agent::config::admin_socket(&args.config) {
            Ok(socket) => conclude(blocking(status::run(&socket, status::View::of(&args)))),
            Err(faults) => unusable(&faults),
        },
    }
}

fn with_config(args: &ConfigArgs, work: impl FnOnce(&Config) -> Result<ExitCode>) -> ExitCode {
    match Config::load(args) {
        Ok(config) => conclude(work(&config)),
        Err(faults) => unusable(&faults),
    }
}

fn blocking<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    Builder::new_current_thread().enable_all().build().context("start a runtime")?.block_on(work)
}

#[expect(clippy::print_stderr, reason = "the command's own last word")]
fn conclude(outcome: Result<ExitCode>) -> ExitCode {
    outcome.unwrap_or_else(|error| {
        eprintln!("metadata-agent: {}", told(&error));
        ExitCode::FAILURE
    })
}

/// The error and its causes, each once: many of ours name their cause in their own text.
fn told(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |told, cause| {
        if told.is_empty() {
            cause
        } else if told.contains(&cause) {
            told
        } else {
            format!("{told}: {cause}")
        }
    })
}

#[expect(clippy::print_stderr, reason = "the command's own last word")]
fn unusable(faults: &metadata_agent::config::ConfigErrors) -> ExitCode {
    eprintln!("metadata-agent: {faults}");
    ExitCode::from(EX_USAGE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::anyhow;

    #[test]
    fn a_cause_is_told_once() {
        let error = anyhow!("no such file").context("cannot open x: no such file").context("start");
        assert_eq!(told(&error), "start: cannot open x: no such file");
    }
}
