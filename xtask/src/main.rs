//! `cargo xtask`: every command that developers and CI run in this repository.

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
mod terminal;
mod test;
mod tokens;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use requirements::Scope;
use terminal::note;

/// Sets up, builds, runs, tests and packages the metadata agent
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// Arguments that are passed on unchanged to the program that the command starts.
#[derive(Args)]
struct PassedOnArgs {
    /// Arguments for the program itself, after `--`
    #[arg(last = true, value_name = "ARGS")]
    args: Vec<String>,
}

#[derive(Subcommand)]
enum Command {
    /// Install what the project needs and this machine lacks
    ///
    /// Lists each missing requirement with its purpose, then installs it. Packages are installed
    /// only as root on Debian 12. Elsewhere the command prints what to run, and fails.
    Setup {
        /// Purpose of the machine. Each scope includes the ones before it
        #[arg(long = "for", value_enum, default_value_t = Scope::Test, value_name = "SCOPE")]
        scope: Scope,
    },

    /// Build the agent and run it on this host or, without a configuration, in a lab
    ///
    /// Starts the agent on this host if `--config-file` or `--config-dir` follows `--`, or if
    /// Neutron's files are in /etc/neutron. Otherwise starts the lab: guests, networks and a fake
    /// Nova in network namespaces, with the agent between them. Needs root, as the agent does.
    Run(PassedOnArgs),

    /// Check and test everything, or one stage
    ///
    /// Skips nothing: a stage that lacks a privilege or a kernel feature fails and names it.
    Test {
        /// Stage to run
        #[arg(value_enum, default_value_t = test::Selection::All)]
        stage: test::Selection,
        /// Test the release build of the agent instead of the debug build
        #[arg(long)]
        release: bool,
        #[command(flatten)]
        passed_on: PassedOnArgs,
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

    /// Measure the release build and the paths that it replaces, and write a report
    ///
    /// Takes about 25 minutes, or 3 with `--quick`. `compare OLD NEW` compares two reports. `cargo
    /// xtask bench --help` lists all options.
    #[command(disable_help_flag = true)]
    Bench {
        /// Options and subcommand of the bench
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
        args: Vec<String>,
    },

    /// Build the container image
    ///
    /// Builds the agent without shared libraries, and an image around it with the last stage of
    /// deploy/Containerfile. Needs no registry.
    Image(image::Options),
}

fn main() -> ExitCode {
    match execute(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            note(format_args!("xtask: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn execute(command: Command) -> Result<()> {
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
