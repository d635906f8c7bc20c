//! `cargo xtask image`: the static agent, and the container image that holds nothing else.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;

use crate::command::{Invocation, target_dir, workspace_root};
use crate::requirements::Scope;
use crate::setup::{Report, setup};

/// The program's name.
const AGENT: &str = "metadata-agent";

/// What the DaemonSet asks for.
const DEFAULT_TAG: &str = "localhost/metadata-agent:latest";

/// The target that the static agent is built for. Naming it keeps `RUSTFLAGS` away from build scripts and
/// procedural macros, which cannot be static.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// What of the two steps to do.
#[derive(Args)]
pub struct Options {
    /// Name of the image
    #[arg(long, default_value = DEFAULT_TAG)]
    tag: String,
    /// Take the static `metadata-agent` of this folder instead of building it
    #[arg(long, value_name = "DIR", conflicts_with = "agent_only")]
    agent_from: Option<PathBuf>,
    /// Only build the static agent, and put it into this folder
    #[arg(long, value_name = "DIR")]
    agent_only: Option<PathBuf>,
}

/// Builds agent and image.
///
/// # Errors
/// When the set-up, the agent's build or the image's build fails.
pub fn image(options: Options) -> Result<()> {
    if let Some(folder) = options.agent_only {
        setup(Scope::Build, Report::OnlyChanges)?;
        let agent = workspace_root().join(static_agent()?).join(AGENT);
        let copy = folder.join(AGENT);
        fs::copy(&agent, &copy).with_context(|| format!("copy {} to {}", agent.display(), copy.display()))?;
        return Ok(());
    }
    setup(Scope::Test, Report::OnlyChanges)?;
    let folder = match options.agent_from {
        Some(folder) => std::path::absolute(folder)?,
        None => static_agent()?,
    };
    image_of(&folder, &options.tag).run()
}

/// Builds the agent without shared libraries and returns the folder it is in.
fn static_agent() -> Result<PathBuf> {
    Invocation::cargo(["build", "--quiet", "--release", "--package", "metadata-agent"])
        .args(["--bin", AGENT, "--target", TARGET])
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .run()?;
    Ok(target_dir().join(TARGET).join("release"))
}

/// The recipe is the Containerfile's last stage; the stage `build`, which makes the agent from the sources, is
/// replaced by the folder of the agent that is already there, and so nothing is pulled or run.
fn image_of(folder: &Path, tag: &str) -> Invocation {
    let build = format!("build={}", folder.display());
    Invocation::new(["buildah", "build", "--build-context", &build, "--file", "deploy/Containerfile"])
        .args(["--tag", tag, "deploy"])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_builder_stage_is_replaced_by_the_folder() {
        assert_eq!(
            image_of(Path::new("target/x/release"), "localhost/a:1").to_string(),
            "buildah build --build-context build=target/x/release --file deploy/Containerfile --tag localhost/a:1 deploy"
        );
    }
}
