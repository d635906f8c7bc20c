//! `cargo xtask image`: builds the static agent and the container image around it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;

use crate::command::{Invocation, target_dir, workspace_root};
use crate::requirements::Scope;
use crate::setup::{Report, setup};

const AGENT: &str = "metadata-agent";

/// The image that the DaemonSet refers to.
const DEFAULT_TAG: &str = "localhost/metadata-agent:latest";

/// Selects the steps.
#[derive(Args)]
pub struct Options {
    /// Name of the image
    #[arg(long, default_value = DEFAULT_TAG)]
    tag: String,
    /// Only build the static agent, and copy it to this folder
    #[arg(long, value_name = "DIR")]
    agent_only: Option<PathBuf>,
    /// Use the debug build: large and slow, but ready in seconds if the agent was built before
    #[arg(long)]
    debug: bool,
}

/// Builds the agent and the image.
///
/// # Errors
/// Fails if the set-up or one of the builds fails.
pub fn image(options: Options) -> Result<()> {
    if let Some(folder) = options.agent_only {
        setup(Scope::Build, Report::OnlyChanges)?;
        return static_agent(options.debug, &folder);
    }
    setup(Scope::Test, Report::OnlyChanges)?;
    let folder = workspace_root().join(target_dir()).join("image");
    fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
    static_agent(options.debug, &folder)?;
    build_image(&folder, &options.tag).run()
}

/// Builds the agent without shared libraries and copies it to a folder. Only the last step differs
/// from the usual build, whose compiled libraries are reused: linking happens with the program.
fn static_agent(debug: bool, folder: &Path) -> Result<()> {
    let (profile, output) = if debug { ("dev", "debug") } else { ("release", "release") };
    link_static(profile).run()?;
    let agent = workspace_root().join(target_dir()).join(output).join(AGENT);
    let copy = folder.join(AGENT);
    fs::copy(&agent, &copy).with_context(|| format!("copy {} to {}", agent.display(), copy.display()))?;
    Ok(())
}

fn link_static(profile: &str) -> Invocation {
    Invocation::cargo(["rustc", "--profile", profile, "--package", "metadata-agent"]).args([
        "--bin",
        AGENT,
        "--",
        "-C",
        "target-feature=+crt-static",
    ])
}

/// Builds the last stage of the Containerfile. The folder with the agent replaces the stage
/// `build`, which would compile the sources, so nothing is pulled from a registry.
fn build_image(folder: &Path, tag: &str) -> Invocation {
    let build = format!("build={}", folder.display());
    Invocation::new(["buildah", "build", "--build-context", &build, "--file", "deploy/Containerfile"])
        .args(["--tag", tag, "deploy"])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_program_itself_is_linked_statically() {
        assert_eq!(
            link_static("dev").to_string(),
            "cargo rustc --profile dev --package metadata-agent --bin metadata-agent -- \
             -C target-feature=+crt-static"
        );
    }

    #[test]
    fn the_folder_replaces_the_builder_stage() {
        assert_eq!(
            build_image(Path::new("target/image"), "localhost/a:1").to_string(),
            "buildah build --build-context build=target/image --file deploy/Containerfile --tag localhost/a:1 deploy"
        );
    }
}
