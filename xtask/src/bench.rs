//! `cargo xtask bench`: the benches of `metadata-tests`, on release builds alone.

use anyhow::Result;

use crate::command::{Invocation, target_dir};
use crate::preflight;
use crate::requirements::Scope;
use crate::setup::{Report, setup};

/// Builds what the bench needs, and becomes it. Its command line is its own.
///
/// # Errors
/// When the set-up or a build fails, a privilege is missing, or the bench cannot be started.
pub fn bench(args: Vec<String>) -> Result<()> {
    let release = target_dir().join("release");
    let build = |package, binary| {
        Invocation::cargo(["build", "--quiet", "--release", "--package", package, "--bin", binary]).run()
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

/// Whether this machine is to be measured, which takes an agent and rights; help, comparisons and reports of earlier results take neither.
fn measures(args: &[String]) -> bool {
    !args.iter().any(|arg| ["compare", "report", "help", "--help", "-h"].contains(&arg.as_str()))
}

#[cfg(test)]
mod tests {
    #[test]
    fn to_read_takes_no_rights() {
        let measures =
            |args: &[&str]| super::measures(&args.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert!(measures(&[]) && measures(&["--quick", "--peers", "ours"]));
        assert!(
            !measures(&["compare", "old", "new"]) && !measures(&["report", "old"]) && !measures(&["--help"])
        );
    }
}
