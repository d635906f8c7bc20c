//! What `deploy/` says, read back, and the container that it describes, run by podman.
//!
//! The DaemonSet is the one source: capabilities, volumes and arguments of the container come from it and from
//! nowhere else, so the tests run what an operator would.

#![expect(
    clippy::panic,
    clippy::expect_used,
    reason = "a rig that cannot do its part fails the test at once"
)]
#![expect(clippy::missing_panics_doc, reason = "every function here panics when the machine refuses")]

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use serde::Deserialize;

/// The checker, with its PyYAML and the schemas that it ships.
const KUBERNETES_VALIDATE: &str = "kubernetes-validate==1.37.0";

/// The container of the DaemonSet's pod, as far as podman can be told of it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AgentContainer {
    /// Arguments after the image's entry point.
    pub args: Vec<String>,
    /// What the container may do.
    pub security_context: SecurityContext,
    /// Where volumes appear in it.
    pub volume_mounts: Vec<VolumeMount>,
}

/// `securityContext` of a container.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SecurityContext {
    /// All rights of the host's root, capabilities or not.
    pub privileged: bool,
    /// Whether the container's own files are read-only.
    pub read_only_root_filesystem: bool,
    /// `no_new_privs`, the other way round.
    pub allow_privilege_escalation: bool,
    /// What differs from the runtime's usual set.
    pub capabilities: Capabilities,
}

/// Capabilities without their `CAP_`.
#[derive(Debug, Deserialize)]
pub struct Capabilities {
    /// What is taken away first.
    pub drop: Vec<String>,
    /// What is then given.
    pub add: Vec<String>,
}

/// A volume in the container.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VolumeMount {
    /// The volume.
    pub name: String,
    /// Where it appears.
    pub mount_path: String,
    /// Whether it is read-only there.
    #[serde(default)]
    pub read_only: bool,
    /// Which mounts made later pass between host and container.
    pub mount_propagation: Option<String>,
}

/// The folder `deploy`.
#[must_use]
pub fn deploy_dir() -> PathBuf {
    workspace_root().join("deploy")
}

/// Checks a manifest against the schemas of one Kubernetes version.
#[must_use]
pub fn validate(manifest: &Path, kubernetes_version: &str) -> Output {
    let mut command = Command::new(python_tools().join("bin/kubernetes-validate"));
    command.args(["--strict", "--kubernetes-version", kubernetes_version]).arg(manifest);
    command.output().expect("start kubernetes-validate")
}

/// The container of `deploy/daemonset.yaml`.
#[must_use]
pub fn agent_container() -> AgentContainer {
    const TO_JSON: &str =
        "import json, sys, yaml; json.dump(list(yaml.safe_load_all(open(sys.argv[1]))), sys.stdout)";
    let mut command = Command::new(python_tools().join("bin/python"));
    let json = stdout_of(command.args(["-c", TO_JSON]).arg(deploy_dir().join("daemonset.yaml")));
    let documents: Vec<serde_json::Value> = serde_json::from_str(&json).expect("read the manifest as JSON");
    let set = documents.into_iter().find(|document| document["kind"] == "DaemonSet").expect("a DaemonSet");
    let containers = set["spec"]["template"]["spec"]["containers"].clone();
    let [container] =
        serde_json::from_value::<[_; 1]>(containers).expect("one container, completely described");
    container
}

/// Builds the image around a static agent with the project's own recipe, from the agent in a folder or, without
/// one, from the sources.
pub fn build_image(tag: &str, agent_from: Option<&Path>) {
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(workspace_root()).args(["xtask", "image", "--tag", tag]);
    if let Some(folder) = agent_from {
        command.arg("--agent-from").arg(folder);
    }
    stdout_of(&mut command);
}

impl AgentContainer {
    /// The words after `podman` that run `image` with `args` as the DaemonSet would run it, but in the network
    /// namespace `netns` and with the folders `volumes`, by name, in place of what the volumes are in a cluster.
    ///
    /// # Panics
    /// When a volume has no folder, or the DaemonSet asks for something that this function does not know.
    #[must_use]
    pub fn podman_run(
        &self,
        image: &str,
        netns: &Path,
        volumes: &BTreeMap<&str, PathBuf>,
        args: &[&str],
    ) -> Vec<String> {
        let SecurityContext {
            privileged,
            read_only_root_filesystem,
            allow_privilege_escalation,
            capabilities,
        } = &self.security_context;
        assert!(!privileged, "the DaemonSet asks for a privileged container");
        let mut words = vec![
            "--runtime=runc".to_owned(),
            "run".to_owned(),
            "--rm".to_owned(),
            format!("--network=ns:{}", netns.display()),
            format!("--read-only={read_only_root_filesystem}"),
            // Podman would raise both, which takes CAP_SYS_RESOURCE.
            "--ulimit=nofile=8192:8192".to_owned(),
            "--ulimit=nproc=4096:4096".to_owned(),
            "--security-opt=apparmor=unconfined".to_owned(),
        ];
        if !allow_privilege_escalation {
            words.push("--security-opt=no-new-privileges".to_owned());
        }
        words.extend(capabilities.drop.iter().map(|name| format!("--cap-drop={name}")));
        words.extend(capabilities.add.iter().map(|name| format!("--cap-add={name}")));
        for VolumeMount { name, mount_path, read_only, mount_propagation } in &self.volume_mounts {
            let folder =
                volumes.get(name.as_str()).unwrap_or_else(|| panic!("no folder for the volume {name}"));
            let access = if *read_only { "ro" } else { "rw" };
            let propagation = match mount_propagation.as_deref() {
                None | Some("None") => "rprivate",
                Some("HostToContainer") => "rslave",
                Some(other) => panic!("{name}: mountPropagation {other} is for privileged containers"),
            };
            words.push(format!("--volume={}:{mount_path}:{access},{propagation}", folder.display()));
        }
        words.push(image.to_owned());
        words.extend(args.iter().map(|&arg| arg.to_owned()));
        words
    }
}

/// Runs a command to its end and returns what it printed.
///
/// # Panics
/// When it fails, with what it wrote to standard error.
pub fn stdout_of(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("start {command:?}: {error}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?} failed: {}\n{errors}", output.status);
    String::from_utf8(output.stdout).unwrap_or_else(|error| panic!("{command:?} printed no text: {error}"))
}

/// A virtual environment with the checker. It stays under `target`, so that it is made once.
fn python_tools() -> &'static Path {
    static PLACE: OnceLock<PathBuf> = OnceLock::new();
    PLACE.get_or_init(|| {
        let place = target_dir().join(KUBERNETES_VALIDATE.replace("==", "-"));
        // The last step makes it: an installation that was cut short does not pass for one.
        let complete = place.join("complete");
        if !complete.exists() {
            stdout_of(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&place));
            let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", KUBERNETES_VALIDATE];
            stdout_of(Command::new(place.join("bin/python")).args(pip));
            std::fs::write(&complete, "").expect("mark the virtual environment as complete");
        }
        place
    })
}

fn workspace_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a workspace around this crate").to_path_buf()
}

fn target_dir() -> PathBuf {
    workspace_root().join(std::env::var_os("CARGO_TARGET_DIR").as_deref().unwrap_or(OsStr::new("target")))
}
