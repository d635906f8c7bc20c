//! Reads and tries out the files of `deploy/`.
//!
//! * [`Manifest`]: the DaemonSet with its `ConfigMap` and its Secret.
//! * [`Container`]: its container, run by podman with the rights, files and volumes of the
//!   manifest.
//! * [`unit_settings`]: the unit's settings; [`seccomp_profile`]: its system calls, for that
//!   container.
//! * [`sample_configuration`]: the expected text of `metadata-agent.conf`.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use crate::python;

mod container;
mod manifest;
mod sample;
mod seccomp;

pub use container::{Container, volume_folder};
pub use manifest::{AgentContainer, Manifest, Probe, SeccompProfile};
pub use sample::sample_configuration;
pub use seccomp::seccomp_profile;

/// The validator, which ships the schemas and depends on PyYAML.
const KUBERNETES_VALIDATE: &str = "kubernetes-validate==1.37.0";

/// Returns the path of the folder `deploy`.
#[must_use]
pub fn deploy_dir() -> PathBuf {
    workspace_root().join("deploy")
}

/// Returns the assignments in the text of a unit, in order.
pub fn unit_settings(unit: &str) -> impl Iterator<Item = (&str, &str)> {
    unit.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once('='))
}

/// Validates a manifest against the schemas of one Kubernetes version.
#[must_use]
pub fn validate(manifest: &Path, kubernetes_version: &str) -> Output {
    let mut command = Command::new(python_tools().join("bin/kubernetes-validate"));
    command.args(["--strict", "--kubernetes-version", kubernetes_version]).arg(manifest);
    command.output().expect("start kubernetes-validate")
}

/// Builds the image from the sources with the project's own recipe and the agent's debug build.
pub fn build_image(tag: &str) {
    let mut command = Command::new(env!("CARGO"));
    stdout_of(command.current_dir(workspace_root()).args(["xtask", "image", "--debug", "--tag", tag]));
}

/// Runs a command to its end and returns its standard output. Panics with its standard error if it
/// fails.
pub fn stdout_of(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("start {command:?}: {error}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?} failed: {}\n{errors}", output.status);
    String::from_utf8(output.stdout).unwrap_or_else(|error| panic!("{command:?} printed no text: {error}"))
}

/// Returns a virtual environment with the validator. It is kept in `target`, so that it is created
/// once.
fn python_tools() -> &'static Path {
    static PLACE: OnceLock<PathBuf> = OnceLock::new();
    PLACE
        .get_or_init(|| python::environment("python3", KUBERNETES_VALIDATE).unwrap_or_else(|e| panic!("{e}")))
}

fn workspace_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a workspace around this crate").to_path_buf()
}
