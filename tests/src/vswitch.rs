//! The real `ovs-vswitchd` on a host, with its userspace datapath. It treats the interfaces of its
//! bridge as it would with the kernel's datapath.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::netns::{Netns, output_of};
use crate::ovsdb::SCHEMA;
use crate::ovsdb::server::Server;
use crate::port::Port;

const BRIDGE: &str = "br-int";

/// The switch and its database. Both run as long as the value.
#[derive(Debug)]
pub struct Vswitch {
    server: Server,
    folder: TempDir,
    process: Child,
}

impl Vswitch {
    /// Starts a switch with an integration bridge without ports.
    #[must_use]
    pub fn start(netns: &Netns) -> Self {
        let mut server = Server::alone(SCHEMA);
        server.start(Some(netns));
        let folder = tempfile::Builder::new().prefix("vswitch-").tempdir();
        let folder = folder.unwrap_or_else(|e| panic!("create a folder for a switch: {e}"));
        let log = File::create(folder.path().join("log")).unwrap_or_else(|e| panic!("create its log: {e}"));
        let mut command = netns.command("/usr/sbin/ovs-vswitchd");
        command
            .arg(server.remote())
            .args(["--disable-system", "--disable-system-route", "--no-chdir"])
            .arg(format!("--unixctl={}", folder.path().join("ctl").display()))
            .env("OVS_RUNDIR", folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        let process = command.spawn().unwrap_or_else(|e| panic!("run {command:?}: {e}"));
        let this = Self { server, folder, process };
        this.configure(&["add-br", BRIDGE, "--", "set", "bridge", BRIDGE, "datapath_type=netdev"]);
        this
    }

    /// Adds an interface to the bridge.
    pub fn add(&self, interface: &str) {
        self.configure(&["add-port", BRIDGE, interface]);
    }

    /// Plugs a guest's tap as libvirt does and removes an earlier row with its name. Does not wait
    /// for the switch.
    pub fn plug(&self, port: &Port) {
        let tap = port.tap();
        let ids = [
            ("iface-id", port.id.to_string()),
            ("iface-status", "active".to_owned()),
            ("attached-mac", port.mac.to_string()),
            ("vm-uuid", port.instance.to_string()),
        ];
        let ids = ids.map(|(key, value)| format!("external_ids:{key}=\"{value}\""));
        let mut words = vec!["--no-wait", "--", "--if-exists", "del-port", &tap];
        words.extend(["--", "add-port", BRIDGE, &tap, "--", "set", "Interface", &tap]);
        words.extend(ids.iter().map(String::as_str));
        self.configure(&words);
    }

    /// Returns the address of the database server for `ovsdb_connection`.
    #[must_use]
    pub fn remote(&self) -> String {
        self.server.remote()
    }

    /// Returns the interface index that the switch has written, or `None`.
    #[must_use]
    pub fn index_of(&self, interface: &str) -> Option<u32> {
        let mut tool = Command::new("/usr/bin/ovs-vsctl");
        let remote = format!("--db={}", self.server.remote());
        output_of(tool.arg(remote).args(["get", "Interface", interface, "ifindex"])).trim().parse().ok()
    }

    /// Stops the switch with SIGSTOP while its database keeps running.
    pub fn freeze(&self) {
        self.signal(Signal::SIGSTOP);
    }

    /// Continues the switch.
    pub fn thaw(&self) {
        self.signal(Signal::SIGCONT);
    }

    fn signal(&self, signal: Signal) {
        let process = Pid::from_raw(self.process.id().cast_signed());
        kill(process, signal).unwrap_or_else(|e| panic!("send {signal} to ovs-vswitchd: {e}"));
    }

    /// Limits the ingress of an interface, in kilobits per second; 0 means no limit.
    pub fn police(&self, interface: &str, rate: u32) {
        self.configure(&["set", "interface", interface, &format!("ingress_policing_rate={rate}")]);
    }

    #[must_use]
    pub fn log(&self) -> String {
        let path: PathBuf = self.folder.path().join("log");
        fs::read_to_string(&path).unwrap_or_else(|e| panic!("read {}: {e}", path.display()))
    }

    /// Changes the database and waits until the switch has applied the change.
    fn configure(&self, words: &[&str]) {
        let mut tool = Command::new("/usr/bin/ovs-vsctl");
        output_of(tool.arg(format!("--db={}", self.server.remote())).arg("--timeout=20").args(words));
    }
}

impl Drop for Vswitch {
    fn drop(&mut self) {
        if let Err(e) = self.process.kill().and_then(|()| self.process.wait()) {
            eprintln!("kill ovs-vswitchd: {e}");
        }
        if thread::panicking() {
            eprintln!("--- output of ovs-vswitchd\n{}", self.log());
        }
    }
}
