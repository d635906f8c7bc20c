//! `cargo xtask lint`: every check that does not run the code.

mod comments;
mod commits;
mod docs;
mod names;
mod sources;

use std::fmt;
use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};

use crate::command::Invocation;
use crate::requirements::Scope;
use crate::setup::{Report, setup};
use crate::terminal::note;
use crate::{abi, boundaries};

/// One check. `cargo xtask lint` runs all of them in this order, the quick ones first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Check {
    /// Comments are at most 100 columns wide; doc comments start with a verb or a noun phrase
    Comments,
    /// Names of functions, and so of tests, have at most 60 characters
    Names,
    /// Subjects of new commits have at most 72 characters
    Commits,
    /// `typos` finds no misspelt word
    Spelling,
    /// Licences, sources and versions of the dependencies follow deny.toml
    Dependencies,
    /// Links in documents lead somewhere, and the front pages are short
    Docs,
    /// Modules of the agent import only what their layer may use
    Boundaries,
    /// A change of the kernel ABI comes with a new ABI_VERSION
    Abi,
    /// The code is formatted by rustfmt
    Format,
    /// Clippy has no warnings
    Clippy,
}

/// Selects checks and files.
#[derive(Args)]
pub struct Options {
    /// Run only these checks
    #[arg(long, value_enum, value_delimiter = ',', value_name = "CHECKS")]
    only: Vec<Check>,
    /// Limit the checks `comments` and `names` to these files and folders
    #[arg(value_name = "PATH")]
    paths: Vec<PathBuf>,
}

/// Runs the selected checks.
///
/// # Errors
/// Returns the findings of the first check that fails.
pub fn run(options: &Options) -> Result<()> {
    let checks = if options.only.is_empty() { Check::value_variants() } else { options.only.as_slice() };
    if checks.iter().any(|check| check.needs_tools()) {
        setup(Scope::Lint, Report::OnlyChanges)?;
    }
    for check in checks {
        check.run(&options.paths)?;
    }
    Ok(())
}

/// Runs all checks.
///
/// # Errors
/// Returns the findings of the first check that fails.
pub fn lint() -> Result<()> {
    run(&Options { only: Vec::new(), paths: Vec::new() })
}

impl Check {
    fn run(self, paths: &[PathBuf]) -> Result<()> {
        match self {
            Self::Comments => report("comments", &sources::check(paths, comments::findings)?),
            Self::Names => report("names", &sources::check(paths, names::findings)?),
            Self::Commits => commits::check(),
            Self::Spelling => Invocation::new(["typos"]).run(),
            Self::Dependencies => dependencies(),
            Self::Docs => report("documents", &docs::check()?),
            Self::Boundaries => boundaries::check(),
            Self::Abi => abi::check(),
            Self::Format => Invocation::cargo(["fmt", "--all", "--check"]).run(),
            Self::Clippy => clippy(),
        }
    }

    /// Returns false for checks that this program does by itself, which need no set-up.
    const fn needs_tools(self) -> bool {
        matches!(self, Self::Spelling | Self::Dependencies | Self::Format | Self::Clippy)
    }
}

/// One line of a source file that a check rejects.
#[derive(Debug, PartialEq, Eq)]
struct Finding {
    line: usize,
    problem: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.line, self.problem)
    }
}

fn report(check: &str, findings: &[(PathBuf, Finding)]) -> Result<()> {
    note(format_args!("+ check {check}"));
    if findings.is_empty() {
        return Ok(());
    }
    let list: Vec<_> =
        findings.iter().map(|(file, finding)| format!("{}:{finding}", file.display())).collect();
    bail!("{check}: {} findings:\n{}", findings.len(), list.join("\n"))
}

fn dependencies() -> Result<()> {
    // cargo-deny reads the manifests of all dependencies, also of those for other systems, which no
    // build has downloaded.
    Invocation::cargo(["fetch", "--locked"]).run()?;
    let deny = ["cargo-deny", "--offline", "--locked", "check", "--hide-inclusion-graph"];
    Invocation::new(deny).args(["bans", "licenses", "sources"]).run()
}

fn clippy() -> Result<()> {
    let clippy = |selection: &[&str]| {
        let clippy = Invocation::cargo(["clippy", "--quiet"]).args(selection.iter().copied());
        clippy.args(["--all-targets", "--", "--deny", "warnings"]).run()
    };
    clippy(&["--workspace"])?;
    clippy(&["--package", "metadata-agent", "--features", "trace-log"])?;
    // No other package builds the entry points, and the BPF build itself runs no lints.
    clippy(&["--package", "metadata-ebpf", "--features", "program"])
}
