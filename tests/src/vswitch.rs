//! The real `ovs-vswitchd` on a host, with its datapath in user space: what it does to the interfaces on its bridge is what
//! it does with one in the kernel.

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

/// The switch, and its database, as long as the value.
#[derive(Debug)]
pub struct Vswitch {
    server: Server,
    folder: TempDir,
    process: Child,
}

impl Vswitch {
    /// Starts one with an integration bridge and no port.
    #[must_use]
    pub fn start(netns: &Netns) -> Self {
        let mut server = Server::alone(SCHEMA);
        server.start(Some(netns));
        let folder = tempfile::Builder::new().prefix("vswitch-").tempdir();
        let folder = folder.unwrap_or_else(|e| panic!("make a folder for a switch: {e}"));
        let log = File::create(folder.path().join("log")).unwrap_or_else(|e| panic!("make its log: {e}"));
        let mut command = netns.command("ovs-vswitchd");
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

    /// Puts an interface on the bridge.
    pub fn add(&self, interface: &str) {
        self.configure(&["add-port", BRIDGE, interface]);
    }

    /// Plugs a guest's tap as libvirt does: the row of whatever had its name goes. It is for the switch to follow.
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

    /// The server of the database, as `ovsdb_connection` names it.
    #[must_use]
    pub fn remote(&self) -> String {
        self.server.remote()
    }

    /// The index that it has written of an interface; `None` for none.
    #[must_use]
    pub fn index_of(&self, interface: &str) -> Option<u32> {
        let mut tool = Command::new("ovs-vsctl");
        let remote = format!("--db={}", self.server.remote());
        output_of(tool.arg(remote).args(["get", "Interface", interface, "ifindex"])).trim().parse().ok()
    }

    /// Stops it where it is, while its database goes on.
    pub fn freeze(&self) {
        self.signal(Signal::SIGSTOP);
    }

    /// Lets it go on.
    pub fn thaw(&self) {
        self.signal(Signal::SIGCONT);
    }

    fn signal(&self, signal: Signal) {
        let process = Pid::from_raw(self.process.id().cast_signed());
        kill(process, signal).unwrap_or_else(|e| panic!("send {signal} to ovs-vswitchd: {e}"));
    }

    /// Limits what comes in by an interface, in kilobits a second; 0 for no limit.
    pub fn police(&self, interface: &str, rate: u32) {
        self.configure(&["set", "interface", interface, &format!("ingress_policing_rate={rate}")]);
    }

    /// What it has said so far.
    #[must_use]
    pub fn log(&self) -> String {
        let path: PathBuf = self.folder.path().join("log");
        fs::read_to_string(&path).unwrap_or_else(|e| panic!("read {}: {e}", path.display()))
    }

    /// Changes the database, and waits until the switch has followed.
    fn configure(&self, words: &[&str]) {
        let mut tool = Command::new("ovs-vsctl");
        output_of(tool.arg(format!("--db={}", self.server.remote())).arg("--timeout=20").args(words));
    }
}

impl Drop for Vswitch {
    fn drop(&mut self) {
        if let Err(e) = self.process.kill().and_then(|()| self.process.wait()) {
            eprintln!("kill ovs-vswitchd: {e}");
        }
        if thread::panicking() {
            eprintln!("--- ovs-vswitchd said\n{}", self.log());
        }
    }
}
