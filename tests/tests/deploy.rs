//! What an operator deploys: the unit, the DaemonSet and the image, checked by the tools that will read them.

#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail the test at once")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use metadata_tests::deploy::{agent_container, build_image, deploy_dir, stdout_of, validate};

/// The oldest version whose pods can name an AppArmor profile, and the newest that the checker knows.
const KUBERNETES: [&str; 2] = ["1.30", "1.37"];

/// Options that give a service a mount namespace of its own (systemd.exec(5)).
const MOUNT_NAMESPACE: [&str; 28] = [
    "BindPaths",
    "BindReadOnlyPaths",
    "DynamicUser",
    "ExecPaths",
    "ExtensionDirectories",
    "ExtensionImages",
    "InaccessiblePaths",
    "LogNamespace",
    "MountFlags",
    "MountImages",
    "NoExecPaths",
    "PrivateDevices",
    "PrivateIPC",
    "PrivateMounts",
    "PrivateNetwork",
    "PrivateTmp",
    "PrivateUsers",
    "ProcSubset",
    "ProtectControlGroups",
    "ProtectHome",
    "ProtectKernelLogs",
    "ProtectKernelModules",
    "ProtectKernelTunables",
    "ProtectProc",
    "ProtectSystem",
    "ReadOnlyPaths",
    "ReadWritePaths",
    "RootDirectory",
];

/// A static program in the agent's place that tells what it was given: its capabilities, whether it can write to
/// its root, and what a host name resolves to.
const WITNESS: &str = r#"
use std::net::ToSocketAddrs;

fn main() {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    for line in status.lines().filter(|line| line.starts_with("Cap") || line.starts_with("Seccomp:")) {
        println!("{}", line.replace(":\t", "="));
    }
    println!("root_writable={}", std::fs::write("/witness", "").is_ok());
    for argument in std::env::args().skip(1) {
        match argument.strip_prefix("write:") {
            Some(file) => println!("{argument}={}", std::fs::write(file, "").is_ok()),
            None => {
                let address = (argument.as_str(), 80).to_socket_addrs().unwrap().next().unwrap();
                println!("{argument}={}", address.ip());
            }
        }
    }
}
"#;

fn unit() -> String {
    fs::read_to_string(deploy_dir().join("metadata-agent.service")).unwrap()
}

/// The unit's assignments, in order.
fn assignments(unit: &str) -> Vec<(&str, &str)> {
    unit.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once('=')).collect()
}

#[test]
fn systemd_understands_the_unit() {
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("metadata-agent.service");
    // systemd looks whether the program exists, and the agent is not installed here.
    let text = unit();
    assert!(text.contains("ExecStart=/usr/bin/metadata-agent run\n"));
    fs::write(&copy, text.replace("/usr/bin/metadata-agent", "/bin/true")).unwrap();
    let verify = |file: &Path| {
        let output = Command::new("systemd-analyze")
            .args(["verify", "--man=no", "--recursive-errors=no"])
            .arg(file)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        // Other units of the machine are none of our business.
        let ours: Vec<_> = said.lines().filter(|line| line.contains("metadata-agent.service")).collect();
        (output.status.success(), ours.join("\n"))
    };
    assert_eq!(verify(&copy), (true, String::new()));

    fs::write(&copy, text.replace("WatchdogSec=", "WatchdogSecs=")).unwrap();
    let (_, complaint) = verify(&copy);
    assert!(complaint.contains("WatchdogSecs"), "the check notices an unknown option: {complaint}");
}

#[test]
fn the_unit_stays_in_the_hosts_mount_namespace() {
    let unit = unit();
    let found: Vec<_> =
        assignments(&unit).into_iter().filter(|(name, _)| MOUNT_NAMESPACE.contains(name)).collect();
    assert_eq!(found, []);
}

#[test]
fn unit_and_daemonset_grant_the_same_capabilities() {
    let unit = unit();
    let of_unit: Vec<_> = assignments(&unit)
        .into_iter()
        .filter(|(name, _)| *name == "CapabilityBoundingSet")
        .flat_map(|(_, value)| value.split_whitespace())
        .collect();
    let of_unit: BTreeSet<_> = of_unit.iter().map(|name| name.strip_prefix("CAP_").unwrap()).collect();
    let container = agent_container();
    let capabilities = &container.security_context.capabilities;
    assert_eq!(capabilities.drop, ["ALL"]);
    assert_eq!(of_unit, capabilities.add.iter().map(String::as_str).collect());
}

#[test]
fn kubernetes_accepts_the_daemonset() {
    let manifest = deploy_dir().join("daemonset.yaml");
    for version in KUBERNETES {
        let output = validate(&manifest, version);
        let said =
            format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "Kubernetes {version}: {said}");
        assert!(said.contains("daemonset/metadata-agent"), "Kubernetes {version}: {said}");
    }

    let folder = tempfile::tempdir().unwrap();
    let broken = folder.path().join("daemonset.yaml");
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(&broken, text.replace("hostNetwork: true", "hostNetwrk: true")).unwrap();
    assert!(!validate(&broken, KUBERNETES[0]).status.success(), "the check notices an unknown field");
}

#[test]
fn the_agents_arguments_name_files_that_the_daemonset_mounts() {
    let container = agent_container();
    let files: Vec<_> = container.args.iter().filter(|arg| arg.starts_with('/')).collect();
    assert_eq!(files.len(), 2, "{:?}", container.args);
    for file in files {
        let folder = Path::new(file).parent().and_then(Path::to_str).unwrap();
        assert!(container.volume_mounts.iter().any(|mount| mount.mount_path == folder), "{file}");
    }
}

#[test]
fn the_image_runs_with_the_daemonsets_rights_and_no_others() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("witness.rs");
    fs::write(&source, WITNESS).unwrap();
    stdout_of(
        Command::new("rustc")
            .args(["--edition=2024", "-C", "target-feature=+crt-static", "--target=x86_64-unknown-linux-gnu"])
            .arg("-o")
            .arg(folder.path().join("metadata-agent"))
            .arg(&source),
    );
    let image = Image::around(folder.path());
    let netns = Namespace::new();
    let container = agent_container();
    let volumes: BTreeMap<_, _> = container
        .volume_mounts
        .iter()
        .map(|mount| {
            let place = folder.path().join(&mount.name);
            fs::create_dir(&place).unwrap();
            (mount.name.as_str(), place)
        })
        .collect();

    let words = container.podman_run(
        &image.tag,
        &netns.path,
        &volumes,
        &["localhost", "write:/run/metadata-agent/x", "write:/etc/metadata-agent/x"],
    );
    let said = stdout_of(Command::new("podman").args(&words));

    let said: BTreeMap<_, _> = said.lines().filter_map(|line| line.split_once('=')).collect();
    let granted = format!("{:016x}", mask(&container.security_context.capabilities.add));
    assert_eq!(said["CapEff"], granted);
    assert_eq!(said["CapBnd"], granted);
    assert_eq!(said["Seccomp"], "2", "the runtime's filter is on");
    assert_eq!(said["root_writable"], "false");
    assert_eq!(said["write:/run/metadata-agent/x"], "true");
    assert_eq!(said["write:/etc/metadata-agent/x"], "false");
    assert_eq!(said["localhost"], "127.0.0.1", "names resolve without shared libraries");
    assert!(volumes["run"].join("x").exists(), "the volume is the host's folder");
}

/// The bits of capabilities (linux/capability.h).
fn mask(names: &[String]) -> u64 {
    let bit = |name: &String| match name.as_str() {
        "NET_BIND_SERVICE" => 10,
        "NET_ADMIN" => 12,
        "SYS_ADMIN" => 21,
        other => panic!("{other} is not among the capabilities that this test knows"),
    };
    names.iter().fold(0, |mask, name| mask | 1 << bit(name))
}

/// An image that goes with the test.
struct Image {
    tag: String,
}

impl Image {
    fn around(folder: &Path) -> Self {
        let image = Self { tag: format!("localhost/metadata-agent-test:{}", std::process::id()) };
        build_image(&image.tag, Some(folder));
        image
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // A failed test is unwinding here: no second panic.
        let _ = Command::new("podman").args(["rmi", "--force", &self.tag]).output();
    }
}

/// A network namespace that goes with the test.
struct Namespace {
    name: String,
    path: PathBuf,
}

impl Namespace {
    fn new() -> Self {
        let name = format!("md-deploy-{}", std::process::id());
        stdout_of(Command::new("ip").args(["netns", "add", &name]));
        let path = Path::new("/run/netns").join(&name);
        Self { name, path }
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "delete", &self.name]).output();
    }
}
