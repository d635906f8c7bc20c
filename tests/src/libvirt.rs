//! Debian's own libvirtd in a host's network namespace, with a mount namespace in which all paths
//! it writes to are in a private folder.
//!
//! Its domains are emulated, have no disk and are paused, except for one that migrates. Relevant
//! are only the files that libvirtd writes and the taps that it opens. Two daemons believe that
//! they run on two machines.

use std::fs;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use uuid::Uuid;

use crate::netns::output_of;
use crate::port::Port;
use crate::topology::Host;
use crate::wait::{self, PATIENCE};

/// The paths that libvirtd writes to, each mounted from the private folder. It reads its
/// configuration from the last one. It does not migrate a domain to a machine with its own host
/// name.
const VIEW: &str = "set -e
echo \"$NAME\" > /proc/sys/kernel/hostname
for place in run var/lib var/log var/cache etc/libvirt; do mount --bind \"$FOLDER/$place\" /$place; done
for file in passwd group; do mount --bind \"$FOLDER/$file\" /etc/$file; done
exec /usr/sbin/libvirtd";

/// Without confinement, accounts and other daemons.
const DAEMON: &str = "auth_unix_rw = \"none\"\nauth_unix_ro = \"none\"\nlog_outputs = \"3:stderr\"\n";
const QEMU: &str = "user = \"root\"\ngroup = \"root\"\nsecurity_driver = \"none\"\ncgroup_controllers = []\n\
                    namespaces = []\nstdio_handler = \"file\"\nremember_owner = 0\n";

/// The Nova namespace of a domain's metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NovaMetadata {
    /// Without ports.
    V1_0,
    /// With ports.
    V1_1,
}

/// A running libvirtd. It and its domains end on drop.
#[derive(Debug)]
pub struct Libvirt {
    folder: TempDir,
    server: Child,
}

impl Libvirt {
    /// Returns the folder with the state of running domains, below the daemon's `folder`.
    fn state_of(folder: &Path) -> PathBuf {
        folder.join("run/libvirt/qemu")
    }

    /// Creates a folder for a daemon. Returns it and its subfolder for the state of running
    /// domains.
    #[must_use]
    pub fn prepare() -> (TempDir, PathBuf) {
        let folder = tempfile::Builder::new().prefix("libvirt-").tempdir();
        let folder = folder.unwrap_or_else(|e| panic!("create a folder for libvirtd: {e}"));
        let state = Self::state_of(folder.path());
        (folder, state)
    }

    /// Starts the daemon on a host and waits until it has probed the emulator.
    #[must_use]
    pub fn start(host: &Host, folder: TempDir) -> Self {
        let path = |name: &str| folder.path().join(name);
        for name in ["run", "var/lib", "var/log", "var/cache", "etc/libvirt", "domains"] {
            fs::create_dir_all(path(name)).unwrap_or_else(|e| panic!("make {name} for libvirtd: {e}"));
        }
        // The daemon does not start without this account, although it does not use it.
        for (file, account) in
            [("passwd", "libvirt-qemu:x:64055:64055::/:/bin/false\n"), ("group", "libvirt-qemu:x:64055:\n")]
        {
            let machine = fs::read_to_string(format!("/etc/{file}")).unwrap_or_default();
            write(&path(file), &(machine + account));
        }
        // The host UUID is the other identity of a machine.
        let daemon = format!("{DAEMON}host_uuid = \"{}\"\n", Uuid::new_v4());
        write(&path("etc/libvirt/libvirtd.conf"), &daemon);
        write(&path("etc/libvirt/qemu.conf"), QEMU);
        let server = spawn(host, folder.path());
        let libvirt = Self { folder, server };
        libvirt.wait_until_it_answers();
        libvirt
    }

    /// Ends the daemon, not its domains.
    pub fn stop(&mut self) {
        let server = i32::try_from(self.server.id()).map(Pid::from_raw);
        if let Ok(server) = server
            && let Err(e) = kill(server, Signal::SIGTERM)
        {
            eprintln!("end libvirtd: {e}");
        }
        if let Err(e) = self.server.wait() {
            eprintln!("wait for libvirtd: {e}");
        }
    }

    /// Starts the daemon after [`Self::stop`]. It finds its running domains.
    pub fn restart(&mut self, host: &Host) {
        // It may remain after the daemon.
        let _absent = fs::remove_file(self.socket());
        self.server = spawn(host, self.folder.path());
        self.wait_until_it_answers();
    }

    fn wait_until_it_answers(&self) {
        let answers = wait::poll(3 * PATIENCE, || {
            let there = fs::metadata(self.socket()).is_ok_and(|found| found.file_type().is_socket());
            there.then(|| self.virsh(&["domcapabilities"]))
        });
        answers.unwrap_or_else(|| panic!("libvirtd does not listen\n{}", self.log()));
    }

    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        Self::state_of(self.folder.path())
    }

    /// Starts a domain with this port, with Nova's metadata.
    pub fn create(&self, port: &Port, metadata: NovaMetadata) {
        self.virsh(&["create", "--paused", &self.file(port, &domain_xml(port, metadata))]);
    }

    /// Starts and resumes a domain with this port, so that it can migrate.
    pub fn run(&self, port: &Port, metadata: NovaMetadata) {
        self.virsh(&["create", &self.file(port, &domain_xml(port, metadata))]);
    }

    /// Migrates the running domain of `port` to another daemon.
    pub fn migrate(&self, port: &Port, to: &Self) {
        let stream = format!("unix://{}", to.folder.path().join("domains/stream").display());
        self.virsh(&["migrate", "--live", &name(port), &to.uri(), "--migrateuri", &stream]);
    }

    /// Plugs another interface into the domain of `port`, on USB, where unplugging does not need
    /// the guest.
    pub fn attach(&self, port: &Port, more: &Port) {
        self.virsh(&[
            "attach-device",
            &name(port),
            &self.file(more, &interface_xml(more, "usb-net")),
            "--live",
        ]);
    }

    pub fn detach(&self, port: &Port, more: &Port) {
        self.virsh(&[
            "detach-device",
            &name(port),
            &self.file(more, &interface_xml(more, "usb-net")),
            "--live",
        ]);
    }

    pub fn destroy(&self, port: &Port) {
        self.virsh(&["destroy", &name(port)]);
    }

    /// Migrates the domain of `port` into a file.
    pub fn send(&self, port: &Port) {
        self.virsh(&["save", &name(port), &self.saved(port)]);
    }

    /// Migrates it back from that file.
    pub fn receive(&self, port: &Port) {
        self.virsh(&["restore", "--paused", &self.saved(port)]);
    }

    fn saved(&self, port: &Port) -> String {
        self.folder.path().join("domains").join(format!("{}.saved", name(port))).display().to_string()
    }

    fn file(&self, port: &Port, xml: &str) -> String {
        let file = self.folder.path().join("domains").join(format!("{}.xml", port.id));
        write(&file, xml);
        file.display().to_string()
    }

    fn virsh(&self, args: &[&str]) -> String {
        output_of(Command::new("/usr/bin/virsh").args(["--quiet", "--connect", &self.uri()]).args(args))
    }

    fn uri(&self) -> String {
        format!("qemu+unix:///system?socket={}", self.socket().display())
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("run/libvirt/libvirt-sock")
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("stderr")).unwrap_or_default()
    }

    /// Returns the process ids of the emulators from the files of libvirtd.
    fn emulators(&self) -> Vec<Pid> {
        let Ok(entries) = fs::read_dir(self.state_dir()) else { return Vec::new() };
        let domains = entries.flatten().map(|entry| entry.path()).filter(|path| {
            path.extension().is_some_and(|extension| extension == "pid") && !path.ends_with("driver.pid")
        });
        domains
            .filter_map(|path| fs::read_to_string(path).ok()?.trim().parse().ok().map(Pid::from_raw))
            .collect()
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        self.stop();
        for emulator in self.emulators() {
            // It may have exited already.
            let _ = kill(emulator, Signal::SIGKILL);
        }
        if thread::panicking() {
            eprintln!("--- output of libvirtd\n{}", self.log());
        }
    }
}

/// Runs the daemon on a host with the paths in this folder.
fn spawn(host: &Host, folder: &Path) -> Child {
    let log = fs::File::create(folder.join("stderr"));
    let log = log.unwrap_or_else(|e| panic!("create libvirtd's log: {e}"));
    let mut command = host.netns().command("unshare");
    command.args(["--mount", "--uts", "sh", "-c", VIEW]);
    command.env("FOLDER", folder).env("NAME", host.netns().name());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    command.spawn().unwrap_or_else(|e| panic!("run {command:?}: {e}"))
}

/// Returns libvirt's name of the domain.
fn name(port: &Port) -> String {
    format!("instance-{}", &port.instance.to_string()[..8])
}

fn interface_xml(port: &Port, model: &str) -> String {
    let (mac, tap) = (port.mac, port.tap());
    format!(
        "<interface type='ethernet'><mac address='{mac}'/><target dev='{tap}' managed='no'/><model type='{model}'/>\
         </interface>"
    )
}

fn domain_xml(port: &Port, metadata: NovaMetadata) -> String {
    let Port { id, instance, project, .. } = port;
    let (version, ports) = match metadata {
        NovaMetadata::V1_0 => ("1.0", String::new()),
        NovaMetadata::V1_1 => {
            let addresses = port.fixed_ips.iter().map(|address| {
                let version = if address.is_ipv4() { 4 } else { 6 };
                format!("<nova:ip type='fixed' address='{address}' ipVersion='{version}'/>")
            });
            let addresses: String = addresses.collect();
            ("1.1", format!("<nova:ports><nova:port uuid='{id}'>{addresses}</nova:port></nova:ports>"))
        }
    };
    format!(
        "<domain type='qemu'><name>{name}</name><uuid>{instance}</uuid><metadata>\
         <nova:instance xmlns:nova='http://openstack.org/xmlns/libvirt/nova/{version}'>\
         <nova:name>&lt;nova:project uuid=&quot;evil&quot;/&gt;</nova:name>\
         <nova:owner><nova:user uuid='3b1f0c9d8e7a46f5b4c3d2e1f0a9b8c7'>alice</nova:user>\
         <nova:project uuid='{project}'>acme</nova:project></nova:owner>{ports}</nova:instance></metadata>\
         <memory unit='MiB'>16</memory><os><type arch='x86_64' machine='q35'>hvm</type></os>\
         <features><acpi/></features><devices><emulator>/usr/bin/qemu-system-x86_64</emulator>\
         <controller type='usb' model='qemu-xhci'/>{interface}<memballoon model='none'/></devices></domain>",
        name = name(port),
        interface = interface_xml(port, "virtio"),
    )
}

fn write(path: &Path, text: &str) {
    fs::write(path, text).unwrap_or_else(|e| panic!("write {}: {e}", path.display()));
}
