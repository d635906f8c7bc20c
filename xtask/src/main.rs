//! `cargo xtask`: every command that a person or CI runs in this repository.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a command-line tool: the terminal is its interface"
)]

mod abi;
mod bench;
mod boundaries;
mod build_ebpf;
mod command;
mod image;
mod lint;
mod preflight;
mod probe;
mod requirements;
mod run;
mod setup;
mod test;
mod tokens;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use requirements::Scope;

/// Sets up, builds, runs, tests and packages the metadata agent
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// What is passed on, word for word, to the program that the command starts.
#[derive(Args)]
struct PassedOn {
    /// Arguments for the program itself, after `--`
    #[arg(last = true, value_name = "ARGS")]
    args: Vec<String>,
}

#[derive(Subcommand)]
enum Command {
    /// Install what the project needs and this machine lacks
    ///
    /// Looks for each requirement, says what is missing and why it is needed, and installs it. Changes nothing
    /// when nothing is missing. Installs by itself as root on Debian 12; elsewhere it prints the commands and
    /// fails when something is missing.
    Setup {
        /// For what: `build` is all that building and running the agent takes, `test` adds the test tools
        #[arg(long = "for", value_enum, default_value_t = Scope::Test, value_name = "SCOPE")]
        scope: Scope,
    },

    /// Build the agent and run it; without a configuration, run it in a lab of its own
    ///
    /// With `--config-file` or `--config-dir` after `--`, or with Neutron's files in /etc/neutron, this starts
    /// the agent on this host. Otherwise it starts the lab: guests, networks and a Nova in namespaces, and the
    /// agent between them. Needs root, as the agent does.
    Run(PassedOn),

    /// Check and test everything, or one stage
    ///
    /// A stage that lacks a privilege or a kernel feature fails and says what is missing; nothing is skipped.
    Test {
        /// Which stages
        #[arg(value_enum, default_value_t = test::Selection::All)]
        stage: test::Selection,
        /// Test the release build of the agent instead of the debug build
        #[arg(long)]
        release: bool,
        #[command(flatten)]
        passed_on: PassedOn,
    },

    /// Run every check that does not run the code, or the checks that `--only` selects
    Lint {
        /// Record the ABI of a new ABI_VERSION, instead of comparing it
        #[arg(long)]
        record_abi: bool,
        #[command(flatten)]
        options: lint::Options,
    },

    /// Build the BPF programs and print their sizes
    BuildEbpf,

    /// Measure the release build against the paths that it replaces, and write a report
    ///
    /// Takes some twenty-five minutes; `--quick` takes three. `compare OLD NEW` holds two reports against each other.
    /// `cargo xtask bench --help` lists everything.
    #[command(disable_help_flag = true)]
    Bench {
        /// Options and subcommand of the bench
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
        args: Vec<String>,
    },

    /// Build the container image around a static agent
    ///
    /// Builds the agent for this machine without shared libraries, and puts it into an image with the recipe
    /// deploy/Containerfile, whose own builder stage is left out. No registry is needed.
    Image(image::Options),
}

fn main() -> ExitCode {
    match carry_out(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn carry_out(command: Command) -> Result<()> {
    match command {
        Command::Setup { scope } => setup::setup(scope, setup::Report::Always),
        Command::Run(passed_on) => run::run(passed_on.args),
        Command::Test { stage, release, passed_on } => test::test(stage, release, &passed_on.args),
        Command::Lint { record_abi: true, .. } => abi::record(),
        Command::Lint { record_abi: false, options } => lint::run(&options),
        Command::BuildEbpf => build_ebpf::build_ebpf(),
        Command::Bench { args } => bench::bench(args),
        Command::Image(options) => image::image(options),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
