//! `deploy/daemonset.yaml`, as far as a container runtime can apply it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{deploy_dir, python_tools, stdout_of};

/// The objects of the manifest.
#[derive(Clone, Debug)]
pub struct Manifest {
    /// The pod's only container.
    pub container: AgentContainer,
    /// The pod's termination grace period in seconds.
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
    pub security_context: SecurityContext,
    pub startup_probe: Probe,
    pub liveness_probe: Probe,
    pub readiness_probe: Probe,
    pub volume_mounts: Vec<VolumeMount>,
}

/// `securityContext` of a container.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SecurityContext {
    pub privileged: bool,
    pub read_only_root_filesystem: bool,
    pub allow_privilege_escalation: bool,
    pub capabilities: Capabilities,
    pub seccomp_profile: SeccompProfile,
}

/// `seccompProfile` of a container.
#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "type", rename_all_fields = "camelCase")]
pub enum SeccompProfile {
    /// The runtime's default profile.
    RuntimeDefault,
    /// A profile on the host.
    Localhost { localhost_profile: PathBuf },
}

/// Capabilities without the prefix `CAP_`.
#[derive(Clone, Debug, Deserialize)]
pub struct Capabilities {
    pub drop: Vec<String>,
    pub add: Vec<String>,
}

/// A probe of the container.
#[derive(Clone, Debug, Deserialize)]
pub struct Probe {
    pub exec: Exec,
}

/// A command that runs in the container.
#[derive(Clone, Debug, Deserialize)]
pub struct Exec {
    pub command: Vec<String>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VolumeMount {
    pub name: String,
    pub mount_path: String,
    #[serde(default)]
    pub read_only: bool,
    pub mount_propagation: Option<String>,
}

impl Manifest {
    /// Reads the manifest.
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

    /// Returns the manifest without one of its capabilities.
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
