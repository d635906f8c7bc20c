//! `cargo xtask lint`: everything that is checked without running the code.

use anyhow::Result;

use crate::command::Invocation;
use crate::requirements::Scope;
use crate::setup::{Report, setup};
use crate::{abi, boundaries};

/// Runs all checks, the quick ones first.
///
/// # Errors
/// Says which check failed.
pub fn lint() -> Result<()> {
    setup(Scope::Build, Report::OnlyChanges)?;
    boundaries::check()?;
    abi::check()?;
    Invocation::cargo(["fmt", "--all", "--check"]).run()?;
    let clippy = |selection: &[&str]| {
        let clippy = Invocation::cargo(["clippy", "--quiet"]).args(selection.iter().copied());
        clippy.args(["--all-targets", "--", "--deny", "warnings"]).run()
    };
    clippy(&["--workspace"])?;
    clippy(&["--package", "metadata-agent", "--features", "trace-log"])?;
    // The entry points, which no other package asks for; the BPF build itself runs no lints.
    clippy(&["--package", "metadata-ebpf", "--features", "program"])
}
