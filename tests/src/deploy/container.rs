//! The agent's container on a host of the rig, run by podman as the DaemonSet would run it.
//!
//! Capabilities, files, volumes and arguments all come from the manifest. [`Container::start`]
//! replaces what only a cluster has by folders of the host. Settings that differ between hosts of a
//! test are passed in the environment.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::manifest::{Manifest, Probe, SeccompProfile, SecurityContext, VolumeMount};
use super::stdout_of;
use crate::netns;
use crate::topology::Host;
use crate::wait::{self, PATIENCE};

/// A container, running or exited. It is removed on drop.
#[derive(Debug)]
pub struct Container {
    name: String,
    grace: u64,
}

impl Container {
    /// Starts a container without waiting until it is ready. `options` are options of the agent, by
    /// name.
    #[must_use]
    pub fn start(manifest: &Manifest, image: &str, host: &Host, options: &BTreeMap<&str, String>) -> Self {
        let container = Self { name: format!("{}-agent", host.netns().name()), grace: manifest.grace };
        let volumes = volumes(manifest, host);
        let mut command = Command::new("podman");
        command.args(["--runtime=runc", "run", "--detach", "--name", &container.name]);
        command.arg(format!("--network=ns:{}/{}", netns::DIRECTORY, host.netns().name()));
        command.args(rights(&manifest.container.security_context));
        command.args(manifest.container.volume_mounts.iter().map(|mount| volume(mount, &volumes)));
        command.args(
            options
                .iter()
                .map(|(name, value)| format!("--env=METADATA_AGENT_{}={value}", name.to_uppercase())),
        );
        stdout_of(command.arg(image).args(&manifest.container.args));
        container
    }

    pub fn wait_ready(&self, manifest: &Manifest) {
        wait::until("the container is ready", PATIENCE, || {
            let ready = self.probe(&manifest.container.readiness_probe).status.success();
            assert!(ready || self.inspect("{{.State.Running}}") == "true", "the container has ended");
            ready.then_some(())
        });
    }

    /// Runs a probe's command in the container.
    #[must_use]
    pub fn probe(&self, probe: &Probe) -> Output {
        let mut command = Command::new("podman");
        command.args(["--runtime=runc", "exec", &self.name]).args(&probe.exec.command);
        command.output().unwrap_or_else(|error| panic!("start {command:?}: {error}"))
    }

    /// Returns a file of the agent process in `/proc`, as the machine sees it.
    #[must_use]
    pub fn proc(&self, file: &str) -> String {
        let path = format!("/proc/{}/{file}", self.inspect("{{.State.Pid}}"));
        fs::read_to_string(&path).unwrap_or_else(|e| panic!("read {path}: {e}"))
    }

    /// Stops it as Kubernetes would and returns the exit code, which is 137 if it had to be killed.
    #[must_use]
    pub fn stop(&self) -> i32 {
        stdout_of(Command::new("podman").args(["stop", "--time", &self.grace.to_string(), &self.name]));
        self.exit_code()
    }

    /// Kills it with SIGKILL.
    pub fn kill(&self) {
        stdout_of(Command::new("podman").args(["kill", "--signal=KILL", &self.name]));
        assert_eq!(self.exit_code(), 137, "128 and the signal");
    }

    /// Waits until it exits and returns the exit code.
    #[must_use]
    pub fn exit_code(&self) -> i32 {
        let code = stdout_of(Command::new("podman").args(["wait", &self.name]));
        code.trim().parse().unwrap_or_else(|e| panic!("parse the exit code {code:?}: {e}"))
    }

    #[must_use]
    pub fn output(&self) -> String {
        let mut command = Command::new("podman");
        let output = command.args(["logs", &self.name]).output();
        let Output { stdout, stderr, .. } = output.unwrap_or_else(|e| panic!("start {command:?}: {e}"));
        String::from_utf8_lossy(&[stdout, stderr].concat()).into_owned()
    }

    fn inspect(&self, format: &str) -> String {
        stdout_of(Command::new("podman").args(["inspect", "--format", format, &self.name])).trim().to_owned()
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- output of the container\n{}", self.output());
        }
        match Command::new("podman").args(["rm", "--force", "--time=0", &self.name]).output() {
            Ok(output) if output.status.success() => {}
            Ok(output) => eprintln!("remove {}: {}", self.name, String::from_utf8_lossy(&output.stderr)),
            Err(error) => eprintln!("remove {}: {error}", self.name),
        }
    }
}

fn rights(context: &SecurityContext) -> Vec<String> {
    let SecurityContext {
        privileged,
        read_only_root_filesystem,
        allow_privilege_escalation,
        capabilities,
        seccomp_profile,
    } = context;
    assert!(!privileged, "the DaemonSet asks for a privileged container");
    let mut words = vec![
        format!("--read-only={read_only_root_filesystem}"),
        // Kubernetes does not mount writable folders by itself.
        "--read-only-tmpfs=false".to_owned(),
        // Podman would raise both limits, which needs CAP_SYS_RESOURCE.
        "--ulimit=nofile=8192:8192".to_owned(),
        "--ulimit=nproc=4096:4096".to_owned(),
        "--security-opt=apparmor=unconfined".to_owned(),
    ];
    if !allow_privilege_escalation {
        words.push("--security-opt=no-new-privileges".to_owned());
    }
    if let SeccompProfile::Localhost { localhost_profile } = seccomp_profile {
        words.push(format!("--security-opt=seccomp={}", localhost_profile.display()));
    }
    words.extend(capabilities.drop.iter().map(|name| format!("--cap-drop={name}")));
    words.extend(capabilities.add.iter().map(|name| format!("--cap-add={name}")));
    words
}

/// Returns the folder of each volume: files as in the manifest, and host paths as folders of the
/// host.
fn volumes(manifest: &Manifest, host: &Host) -> BTreeMap<&'static str, PathBuf> {
    let files = |name: &str, files: &BTreeMap<String, String>| {
        let folder = volume_folder(host, name);
        for (file, content) in files {
            write_secretly(&folder.join(file), content);
        }
        folder
    };
    BTreeMap::from([
        ("config", files("config", &manifest.config)),
        ("secret", files("secret", &manifest.secret)),
        ("bpffs", host.bpffs().to_owned()),
        ("netns", PathBuf::from(netns::DIRECTORY)),
        ("libvirt", volume_folder(host, "libvirt")),
        ("openvswitch", volume_folder(host, "openvswitch")),
        ("run", volume_folder(host, "run")),
    ])
}

/// Returns the folder that stands for a volume's host path, and creates it if needed.
#[must_use]
pub fn volume_folder(host: &Host, name: &str) -> PathBuf {
    let path = host.folder().join("volumes").join(name);
    fs::create_dir_all(&path).unwrap_or_else(|e| panic!("make {}: {e}", path.display()));
    path
}

/// Writes a file that only root can read, as `defaultMode: 0400` does.
fn write_secretly(path: &Path, content: &str) {
    fs::write(path, content)
        .and_then(|()| fs::set_permissions(path, Permissions::from_mode(0o400)))
        .unwrap_or_else(|e| panic!("write {}: {e}", path.display()));
}

fn volume(mount: &VolumeMount, folders: &BTreeMap<&str, PathBuf>) -> String {
    let VolumeMount { name, mount_path, read_only, mount_propagation } = mount;
    let folder = folders.get(name.as_str()).unwrap_or_else(|| panic!("no folder for the volume {name}"));
    let access = if *read_only { "ro" } else { "rw" };
    let propagation = match mount_propagation.as_deref() {
        None | Some("None") => "rprivate",
        Some("HostToContainer") => "rslave",
        Some(other) => panic!("{name}: mountPropagation {other} is for privileged containers"),
    };
    format!("--volume={}:{mount_path}:{access},{propagation}", folder.display())
}
