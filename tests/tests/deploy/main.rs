//! The deployment files: the unit, the DaemonSet and the image, checked with the tools that read
//! them.

#![expect(clippy::unwrap_used, reason = "a helper that fails, fails its test")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use metadata_agent::config::{Config, ConfigArgs, ConfigSource, Origin};
use metadata_agent::process::capabilities;
use metadata_tests::deploy::{
    AgentContainer, Container, Manifest, SeccompProfile, build_image, deploy_dir, sample_configuration,
    seccomp_profile, unit_settings, validate, volume_folder,
};
use metadata_tests::vm::domain_xml;
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{Agent, Guest, Host, HostState, Instance, NovaStandIn, agent, netns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The oldest version whose pods can name an AppArmor profile, and the newest that the validator
/// knows.
const KUBERNETES: [&str; 2] = ["1.30", "1.37"];

/// Options that give a service its own mount namespace (systemd.exec(5)).
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

fn unit() -> String {
    fs::read_to_string(deploy_dir().join("metadata-agent.service")).unwrap()
}

#[test]
fn systemd_accepts_the_unit() {
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("metadata-agent.service");
    // systemd checks that the program exists, and the agent is not installed here.
    let text = unit();
    assert!(text.contains("ExecStart=/usr/bin/metadata-agent run\n"));
    fs::write(&copy, text.replace("/usr/bin/metadata-agent", "/bin/true")).unwrap();
    let verify = |file: &Path| {
        let output = Command::new("systemd-analyze")
            .args(["verify", "--man=no", "--recursive-errors=no"])
            .arg(file)
            .output()
            .unwrap();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        // Ignore other units of the machine.
        let ours: Vec<_> = errors.lines().filter(|line| line.contains("metadata-agent.service")).collect();
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
    let found: Vec<_> = unit_settings(&unit).filter(|(name, _)| MOUNT_NAMESPACE.contains(name)).collect();
    assert_eq!(found, []);
}

#[test]
fn the_unit_forbids_core_dumps_and_new_privileges() {
    let unit = unit();
    let settings: BTreeMap<_, _> = unit_settings(&unit).collect();
    assert_eq!((settings["LimitCORE"], settings["NoNewPrivileges"]), ("0", "yes"));
}

#[test]
fn unit_and_daemonset_grant_what_check_requires() {
    let wanted: BTreeSet<_> = capabilities::TO_RUN.map(|(capability, _)| capability.to_string()).into();
    let unit = unit();
    let of_unit = unit_settings(&unit).filter(|(name, _)| *name == "CapabilityBoundingSet");
    let of_unit = of_unit.flat_map(|(_, names)| names.split_whitespace().map(str::to_owned));
    let capabilities = Manifest::read().container.security_context.capabilities;
    let of_daemonset = capabilities.add.iter().map(|name| format!("CAP_{name}"));

    assert_eq!(of_unit.collect::<BTreeSet<_>>(), wanted);
    assert_eq!(of_daemonset.collect::<BTreeSet<_>>(), wanted);
    assert_eq!(capabilities.drop, ["ALL"]);
}

#[test]
fn kubernetes_accepts_the_daemonset() {
    let manifest = deploy_dir().join("daemonset.yaml");
    for version in KUBERNETES {
        let output = validate(&manifest, version);
        let text =
            format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "Kubernetes {version}: {text}");
        assert!(text.contains("daemonset/metadata-agent"), "Kubernetes {version}: {text}");
    }

    let folder = tempfile::tempdir().unwrap();
    let broken = folder.path().join("daemonset.yaml");
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(&broken, text.replace("hostNetwork: true", "hostNetwrk: true")).unwrap();
    assert!(!validate(&broken, KUBERNETES[0]).status.success(), "the check notices an unknown field");
}

/// The container's host and the guest that its agent serves.
struct Node {
    host: Host,
    guest: Guest,
    manifest: Manifest,
    options: BTreeMap<&'static str, String>,
    _nova: NovaStandIn,
}

impl Node {
    fn new() -> Self {
        let host = Host::new();
        let guest = host.network().guest([10, 0, 0, 5]);
        let manifest = Manifest::read();
        let (_, secret) =
            manifest.secret["secret.ini"].split_once("metadata_proxy_shared_secret = ").unwrap();
        let nova = NovaStandIn::start_with(host.netns(), ([127, 0, 0, 1], 0).into(), secret.trim());
        nova.add(Instance::from_port(&guest.port));
        let libvirt = volume_folder(&host, "libvirt").join("qemu");
        fs::create_dir(&libvirt).unwrap();
        fs::write(libvirt.join("instance-00000001.xml"), domain_xml(&guest.port)).unwrap();
        let options = BTreeMap::from([
            // A name, so that its resolution is part of the test.
            ("nova_metadata_host", "localhost".to_owned()),
            ("nova_metadata_port", nova.address().port().to_string()),
            ("guest_link_kinds", "veth".to_owned()),
            ("portal_namespace", agent::portal_of(host.netns().name())),
        ]);
        Self { host, guest, manifest, options, _nova: nova }
    }

    fn start(&self, image: &Image) -> Container {
        Container::start(&self.manifest, &image.tag, &self.host, &self.options)
    }

    fn assert_guest_is_served(&self) {
        let answer = self.guest.get("/openstack/latest/meta_data.json");
        let document: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
        assert_eq!(document["uuid"], self.guest.port.instance.to_string());
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Leftovers of the portal of a killed container. Usually there are none.
        let _ = fs::remove_file(Path::new(netns::DIRECTORY).join(&self.options["portal_namespace"]));
    }
}

#[test]
fn the_daemonsets_container_serves_and_leaves_nothing_behind() {
    let image = Image::build("serves");
    let node = Node::new();
    let before = HostState::capture(&node.host);
    let AgentContainer { startup_probe, liveness_probe, .. } = &node.manifest.container;

    let container = node.start(&image);
    container.wait_ready(&node.manifest);
    for probe in [startup_probe, liveness_probe] {
        let answer = container.probe(probe);
        assert!(answer.status.success(), "{probe:?}: {answer:?}");
    }
    node.assert_guest_is_served();

    let status = container.proc("status");
    let status: BTreeMap<_, _> = status.lines().filter_map(|line| line.split_once(":\t")).collect();
    let granted = capabilities::TO_RUN.iter().fold(0, |mask, (capability, _)| mask | capability.bitmask());
    for set in ["CapEff", "CapPrm", "CapBnd"] {
        assert_eq!(status[set], format!("{granted:016x}"), "{set}");
    }
    let log = container.output();
    assert!(!log.contains("less confined"), "the data plane restricts itself: {log}");
    assert_eq!(status["Seccomp"], "2", "the runtime's filter is on");
    assert_eq!(status["NoNewPrivs"], "1", "the agent sets it");
    let limits = container.proc("limits");
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().skip(4).collect::<Vec<_>>(), ["0", "0", "bytes"], "{core}");
    let mounts = container.proc("mounts");
    for place in ["/", "/proc/sys", "/etc/metadata-agent", "/etc/metadata-agent-secret", "/run/libvirt"] {
        let options = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let options = options.filter(|fields| fields[1] == place).map(|fields| fields[3]).next_back();
        assert!(options.is_some_and(|options| options.starts_with("ro,")), "{place}: {options:?}\n{mounts}");
    }

    assert_eq!(container.stop(), 0);
    before.assert_same(&HostState::capture(&node.host));
}

#[test]
fn the_container_needs_each_of_its_capabilities() {
    let image = Image::build("needs");
    let mut node = Node::new();
    let before = HostState::capture(&node.host);
    let manifest = node.manifest.clone();
    for capability in &manifest.container.security_context.capabilities.add {
        node.manifest = manifest.without(capability);
        let container = node.start(&image);
        assert_eq!(container.exit_code(), 1, "without {capability}: {}", container.output());
        let output = container.output();
        assert!(output.contains(&format!("without CAP_{capability} (")), "without {capability}: {output}");
        before.assert_same(&HostState::capture(&node.host));
    }
}

#[test]
fn a_new_container_takes_over_from_a_killed_one() {
    let image = Image::build("takes-over");
    let node = Node::new();
    let before = HostState::capture(&node.host);
    let killed = node.start(&image);
    killed.wait_ready(&node.manifest);
    killed.kill();
    drop(killed);
    assert!(before.diff(&HostState::capture(&node.host)).contains("+ pin "), "the programs stay");

    let container = node.start(&image);
    container.wait_ready(&node.manifest);
    node.assert_guest_is_served();
    assert_eq!(container.stop(), 0);
    before.assert_same(&HostState::capture(&node.host));
}

#[test]
fn the_agent_serves_with_the_system_calls_of_the_unit() {
    let image = Image::build("unit");
    let mut node = Node::new();
    let run = |node: &mut Node, unit: &str| {
        let profile = node.host.folder().join("seccomp.json");
        fs::write(&profile, seccomp_profile(unit)).unwrap();
        node.manifest.container.security_context.seccomp_profile =
            SeccompProfile::Localhost { localhost_profile: profile };
        node.start(&image)
    };

    let container = run(&mut node, &unit());
    container.wait_ready(&node.manifest);
    node.assert_guest_is_served();
    let log = container.output();
    assert!(!log.contains("less confined"), "the data plane restricts itself: {log}");
    assert_eq!(container.stop(), 0);
    drop(container);

    let container = run(&mut node, &unit().replace(" seccomp ", " "));
    container.wait_ready(&node.manifest);
    node.assert_guest_is_served();
    let log = container.output();
    assert!(log.contains("less confined"), "it serves without, and logs what is missing: {log}");
    drop(container);

    let container = run(&mut node, &unit().replace(" bpf ", " "));
    assert_eq!(container.exit_code(), 1, "the filter filters");
    assert!(container.output().contains("Operation not permitted"), "{}", container.output());
}

/// An image that is removed at the end of the test.
struct Image {
    tag: String,
}

impl Image {
    fn build(test: &str) -> Self {
        let image = Self { tag: format!("localhost/metadata-agent-{test}:{}", std::process::id()) };
        build_image(&image.tag);
        image
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // A failed test is unwinding here and must not panic again.
        let _ = Command::new("podman").args(["rmi", "--force", &self.tag]).output();
    }
}

#[test]
fn systemd_is_notified_of_start_watchdog_and_stop() {
    let host = Host::new();
    let nova = NovaStandIn::start(host.netns());
    let agent = Agent::on(&host, &nova).install();
    let place = host.folder().join("notify");
    let systemd = UnixDatagram::bind(&place).unwrap();
    systemd.set_read_timeout(Some(PATIENCE)).unwrap();
    let hear = || {
        let mut message = [0; 4096];
        let length = systemd.recv(&mut message).expect("a message in time");
        String::from_utf8(message[..length].to_vec()).unwrap()
    };

    let mut command = host.netns().command(agent::binary());
    command.arg("run").arg("--config-file").arg(agent.config_file());
    command.env("NOTIFY_SOCKET", &place).env("WATCHDOG_USEC", "100000");
    let mut service = Service(command.stderr(Stdio::null()).spawn().unwrap());

    wait::until("systemd is notified of the start", PATIENCE, || {
        let message = hear();
        assert!(message.starts_with("STATUS=") || message.trim_end() == "READY=1", "{message}");
        (message.trim_end() == "READY=1").then_some(())
    });
    assert!(netns::names().iter().any(|name| name == agent.portal()), "ready means that guests are served");
    for _ in 0..5 {
        assert_eq!(hear().trim_end(), "WATCHDOG=1");
    }
    service.signal(Signal::SIGTERM);
    wait::until("systemd is notified of the stop", PATIENCE, || {
        let message = hear();
        assert!(["WATCHDOG=1", "STOPPING=1"].contains(&message.trim_end()), "{message}");
        (message.trim_end() == "STOPPING=1").then_some(())
    });
    assert!(service.0.wait().unwrap().success());
}

/// A process that is killed at the end of the test.
struct Service(Child);

impl Service {
    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.0.id().cast_signed()), signal).unwrap();
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // Both fail only if it has already exited.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `BLESS=1` rewrites the file.
#[test]
fn the_sample_configuration_matches_the_table_of_options() {
    let place = deploy_dir().join("metadata-agent.conf");
    let wanted = sample_configuration();
    if std::env::var_os("BLESS").is_some() {
        fs::write(&place, &wanted).unwrap();
    }
    let found = fs::read_to_string(&place).unwrap();
    assert!(found == wanted, "{} is behind the agent; run this test with BLESS=1", place.display());
}

#[test]
fn the_sample_configuration_states_the_defaults() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("metadata-agent.conf");
    let is_option = |line: &str| line.starts_with('#') && !line.starts_with("# ") && line.contains(" =");
    let uncommented: Vec<_> = sample_configuration()
        .lines()
        .map(|line| if is_option(line) { line[1..].to_owned() } else { line.to_owned() })
        .collect();
    fs::write(&place, uncommented.join("\n")).unwrap();
    let load = |sources| Config::load(&ConfigArgs { sources, ..ConfigArgs::default() }).unwrap();
    let empty = folder.path().join("empty.conf");
    fs::write(&empty, "").unwrap();

    let (written, default) = (load(vec![ConfigSource::File(place)]), load(vec![ConfigSource::File(empty)]));
    for (written, default) in written.settings().iter().zip(default.settings()) {
        assert!(matches!(written.origin, Origin::File { .. }), "{} is not in the sample", written.name);
        assert_eq!(written.value, default.value, "{}", written.name);
    }
}
