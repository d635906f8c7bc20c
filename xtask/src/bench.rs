//! `cargo xtask bench`: the load benches of `metadata-tests`, on release builds alone.

use anyhow::Result;

use crate::command::{Invocation, target_dir};
use crate::preflight;
use crate::requirements::Scope;
use crate::setup::{Report, setup};

/// Builds agent and bench, and becomes this bench.
///
/// # Errors
/// When the set-up or a build fails, a privilege is missing, or the bench cannot be started.
pub fn run(bench: &str, args: Vec<String>) -> Result<()> {
    setup(Scope::Test, Report::OnlyChanges)?;
    preflight::check()?;
    let release = target_dir().join("release");
    for (package, binary) in [("metadata-agent", "metadata-agent"), ("metadata-tests", "bench")] {
        Invocation::cargo(["build", "--quiet", "--release", "--package", package, "--bin", binary]).run()?;
    }
    Invocation::new([release.join("bench").display().to_string()])
        .args([bench])
        .args(args)
        .env("METADATA_AGENT_BIN", std::path::absolute(release.join("metadata-agent"))?.display().to_string())
        .exec()
}
