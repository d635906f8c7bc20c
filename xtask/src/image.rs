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

/// What of the two steps to do.
#[derive(Args)]
pub struct Options {
    /// Name of the image
    #[arg(long, default_value = DEFAULT_TAG)]
    tag: String,
    /// Only build the static agent, and put it into this folder
    #[arg(long, value_name = "DIR")]
    agent_only: Option<PathBuf>,
    /// Take the debug build: large and slow, but made in seconds where the agent was built before
    #[arg(long)]
    debug: bool,
}

/// Builds agent and image.
///
/// # Errors
/// When the set-up, the agent's build or the image's build fails.
pub fn image(options: Options) -> Result<()> {
    if let Some(folder) = options.agent_only {
        setup(Scope::Build, Report::OnlyChanges)?;
        return static_agent(options.debug, &folder);
    }
    setup(Scope::Test, Report::OnlyChanges)?;
    let folder = workspace_root().join(target_dir()).join("image");
    fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
    static_agent(options.debug, &folder)?;
    image_of(&folder, &options.tag).run()
}

/// Puts the agent without shared libraries into a folder. Only its last step differs from the usual build, so all
/// libraries are taken from there: what they link to is decided when the program is linked.
fn static_agent(debug: bool, folder: &Path) -> Result<()> {
    let (profile, output) = if debug { ("dev", "debug") } else { ("release", "release") };
    link_static(profile).run()?;
    let agent = workspace_root().join(target_dir()).join(output).join(AGENT);
    let copy = folder.join(AGENT);
    fs::copy(&agent, &copy).with_context(|| format!("copy {} to {}", agent.display(), copy.display()))?;
    Ok(())
}

fn link_static(profile: &str) -> Invocation {
    Invocation::cargo(["rustc", "--quiet", "--profile", profile, "--package", "metadata-agent"]).args([
        "--bin",
        AGENT,
        "--",
        "-C",
        "target-feature=+crt-static",
    ])
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
    fn only_the_program_itself_is_built_in_another_way() {
        assert_eq!(
            link_static("dev").to_string(),
            "cargo rustc --quiet --profile dev --package metadata-agent --bin metadata-agent -- \
             -C target-feature=+crt-static"
        );
    }

    #[test]
    fn the_builder_stage_is_replaced_by_the_folder() {
        assert_eq!(
            image_of(Path::new("target/image"), "localhost/a:1").to_string(),
            "buildah build --build-context build=target/image --file deploy/Containerfile --tag localhost/a:1 deploy"
        );
    }
}
