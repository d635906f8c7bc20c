//! `deploy/daemonset.yaml`, as far as a container runtime can be told of it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{deploy_dir, python_tools, stdout_of};

/// What the manifest makes on a node.
#[derive(Clone, Debug)]
pub struct Manifest {
    /// The pod's only container.
    pub container: AgentContainer,
    /// How long the pod may take to stop, in seconds.
    pub grace: u64,
    /// The files of the volume `config`, by name.
    pub config: BTreeMap<String, String>,
    /// The files of the volume `secret`, by name.
    pub secret: BTreeMap<String, String>,
}

/// The container of the DaemonSet's pod.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AgentContainer {
    /// Arguments after the image's entry point.
    pub args: Vec<String>,
    /// What the container may do.
    pub security_context: SecurityContext,
    /// Whether the agent is up.
    pub startup_probe: Probe,
    /// Whether it lives.
    pub liveness_probe: Probe,
    /// Whether it serves.
    pub readiness_probe: Probe,
    /// Where volumes appear in it.
    pub volume_mounts: Vec<VolumeMount>,
}

/// `securityContext` of a container.
#[derive(Clone, Debug, Deserialize)]
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
    /// Which system calls there are.
    pub seccomp_profile: SeccompProfile,
}

/// `seccompProfile` of a container.
#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "type", rename_all_fields = "camelCase")]
pub enum SeccompProfile {
    /// Those of the runtime's own list.
    RuntimeDefault,
    /// Those of a list on the host.
    Localhost {
        /// Its file.
        localhost_profile: PathBuf,
    },
}

/// Capabilities without their `CAP_`.
#[derive(Clone, Debug, Deserialize)]
pub struct Capabilities {
    /// What is taken away first.
    pub drop: Vec<String>,
    /// What is then given.
    pub add: Vec<String>,
}

/// A question to the container.
#[derive(Clone, Debug, Deserialize)]
pub struct Probe {
    /// How it is asked.
    pub exec: Exec,
}

/// A command that runs in the container.
#[derive(Clone, Debug, Deserialize)]
pub struct Exec {
    /// Its words.
    pub command: Vec<String>,
}

/// A volume in the container.
#[derive(Clone, Debug, Deserialize)]
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

impl Manifest {
    /// Reads it.
    #[must_use]
    pub fn read() -> Self {
        const TO_JSON: &str =
            "import json, sys, yaml; json.dump(list(yaml.safe_load_all(open(sys.argv[1]))), sys.stdout)";
        let mut command = Command::new(python_tools().join("bin/python"));
        let json = stdout_of(command.args(["-c", TO_JSON]).arg(deploy_dir().join("daemonset.yaml")));
        let documents: Vec<Value> = serde_json::from_str(&json).expect("read the manifest as JSON");
        let of_kind = |kind: &str| -> &Value {
            let found = documents.iter().find(|document| document["kind"] == kind);
            found.unwrap_or_else(|| panic!("the manifest has no {kind}"))
        };
        let pod = &of_kind("DaemonSet")["spec"]["template"]["spec"];
        let [container] = typed("one container, completely described", &pod["containers"]);
        Self {
            container,
            grace: typed("a grace period", &pod["terminationGracePeriodSeconds"]),
            config: typed("a ConfigMap with files", &of_kind("ConfigMap")["data"]),
            secret: typed("a Secret with files", &of_kind("Secret")["stringData"]),
        }
    }

    /// The same without one of its capabilities.
    #[must_use]
    pub fn without(&self, capability: &str) -> Self {
        let mut manifest = self.clone();
        manifest.container.security_context.capabilities.add.retain(|name| name != capability);
        manifest
    }
}

fn typed<T: DeserializeOwned>(what: &str, value: &Value) -> T {
    serde_json::from_value(value.clone()).unwrap_or_else(|e| panic!("the manifest lacks {what}: {e}"))
}
