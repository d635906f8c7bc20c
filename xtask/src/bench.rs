//! `cargo xtask bench`: runs the benches of `metadata-tests` on release builds.

use anyhow::Result;

use crate::command::{Invocation, target_dir};
use crate::preflight;
use crate::requirements::Scope;
use crate::setup::{Report, setup};

/// Builds the bench and the agent, and replaces this process by the bench. The bench parses its
/// own command line.
///
/// # Errors
/// Fails if the set-up or a build fails, a privilege is missing, or the bench cannot be started.
pub fn bench(args: Vec<String>) -> Result<()> {
    let release = target_dir().join("release");
    let build = |package, binary| {
        Invocation::cargo(["build", "--release", "--package", package, "--bin", binary]).run()
    };
    if measures(&args) {
        setup(Scope::Test, Report::OnlyChanges)?;
        preflight::check()?;
        build("metadata-agent", "metadata-agent")?;
    }
    build("metadata-tests", "bench")?;
    Invocation::new([release.join("bench").display().to_string()])
        .args(args)
        .env("METADATA_AGENT_BIN", std::path::absolute(release.join("metadata-agent"))?.display().to_string())
        .exec()
}

/// Returns true if the bench measures this machine, which needs the agent and privileges. Help and
/// reports of earlier results need neither.
fn measures(args: &[String]) -> bool {
    !args.iter().any(|arg| ["compare", "report", "help", "--help", "-h"].contains(&arg.as_str()))
}

#[cfg(test)]
mod tests {
    #[test]
    fn reading_results_needs_no_privileges() {
        let measures =
            |args: &[&str]| super::measures(&args.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert!(measures(&[]) && measures(&["--quick", "--peers", "ours"]));
        assert!(
            !measures(&["compare", "old", "new"]) && !measures(&["report", "old"]) && !measures(&["--help"])
        );
    }
}
