//! A named network namespace that lives as long as its value, even after a panic.
//!
//! Its interfaces are removed with it. [`Netns::enter`] runs code inside, [`Netns::command`] runs
//! programs inside. Files, mounts and process ids are those of the machine, as for an agent on a
//! real host. (`ip netns exec` would create a private mount namespace, and a namespace created by
//! the agent would be invisible outside it.)

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write as _;
use std::panic;
use std::path::PathBuf;
use std::process::{self, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use nix::sched::{CloneFlags, setns};

use crate::privileges;

/// The folder in which iproute2 keeps the names.
pub const DIRECTORY: &str = "/run/netns";

#[derive(Debug)]
pub struct Netns {
    name: String,
    path: PathBuf,
    handle: File,
    ours: bool,
}

impl Netns {
    /// Creates a namespace whose name contains the process id, a number and `label`.
    #[must_use]
    pub fn new(label: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Self::named(&format!("mt{}-{number}-{label}", process::id()))
    }

    /// Creates a namespace with exactly this name, which must be free.
    #[must_use]
    pub fn named(name: &str) -> Self {
        privileges::require();
        output_of(Command::new("ip").args(["netns", "add", name]));
        let path = PathBuf::from(DIRECTORY).join(name);
        let handle = File::open(&path).unwrap_or_else(|e| panic!("open {}: {e}", path.display()));
        let ns = Self { name: name.to_owned(), path, handle, ours: true };
        // Otherwise a link-local address is not usable for the first one or two seconds.
        ns.sysctl("ipv6/conf/default/accept_dad", "0");
        ns.ip("link set lo up");
        ns
    }

    /// Returns the namespace of this process, for reading only. Dropping it does not remove it.
    #[must_use]
    pub fn machine() -> Self {
        privileges::require();
        let path = PathBuf::from(format!("/proc/{}/ns/net", process::id()));
        let handle = File::open(&path).unwrap_or_else(|e| panic!("open {}: {e}", path.display()));
        Self { name: "machine".to_owned(), path, handle, ours: false }
    }

    /// Returns the name in [`DIRECTORY`].
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `work` on a thread inside and returns its result. A panic is propagated. Sockets
    /// created inside stay in the namespace wherever they are used.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(&self.handle, CloneFlags::CLONE_NEWNET)
                    .unwrap_or_else(|e| panic!("enter namespace {}: {e}", self.name));
                work()
            });
            inside.join().unwrap_or_else(|panic| panic::resume_unwind(panic))
        })
    }

    /// Builds a command that runs inside. `spawn` returns the process id of the program itself.
    #[must_use]
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path.display())).arg("--").arg(program);
        command
    }

    /// Runs a program inside and returns its standard output. Panics with all output if it fails.
    pub fn run(&self, command: &[&str]) -> String {
        let [program, args @ ..] = command else { panic!("no program to run in {}", self.name) };
        output_of(self.command(program).args(args))
    }

    /// Runs `ip` inside with one command per line.
    pub fn ip(&self, batch: &str) {
        let mut ip = self.command("ip");
        ip.args(["-batch", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = ip.spawn().unwrap_or_else(|e| panic!("run {ip:?}: {e}"));
        let written = child.stdin.take().map(|mut stdin| stdin.write_all(batch.as_bytes()));
        let output = child.wait_with_output().unwrap_or_else(|e| panic!("wait for {ip:?}: {e}"));
        assert!(
            output.status.success() && matches!(written, Some(Ok(()))),
            "in {}: ip of\n{batch}\nfailed: {}",
            self.name,
            String::from_utf8_lossy(&output.stderr)
        );
    }

    /// Sets a per-namespace sysctl. `key` is a path below `/proc/sys/net`.
    pub fn sysctl(&self, key: &str, value: &str) {
        // /proc/sys/net shows the namespace of the reading thread.
        self.enter(|| fs::write(format!("/proc/sys/net/{key}"), value))
            .unwrap_or_else(|e| panic!("in {}: set {key} to {value}: {e}", self.name));
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if !self.ours {
            return;
        }
        match Command::new("ip").args(["netns", "del", &self.name]).output() {
            Ok(output) if output.status.success() => {}
            Ok(output) => {
                eprintln!("remove namespace {}: {}", self.name, String::from_utf8_lossy(&output.stderr));
            }
            Err(e) => eprintln!("remove namespace {}: {e}", self.name),
        }
    }
}

/// Returns the names of all namespaces, sorted.
#[must_use]
pub fn names() -> Vec<String> {
    let Ok(entries) = fs::read_dir(DIRECTORY) else { return Vec::new() };
    let mut names: Vec<String> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Runs a command to its end and returns its standard output. Panics with all output if it fails.
pub(crate) fn output_of(command: &mut Command) -> String {
    let Output { status, stdout, stderr } =
        command.output().unwrap_or_else(|e| panic!("run {command:?}: {e}"));
    let stdout = String::from_utf8_lossy(&stdout).into_owned();
    assert!(status.success(), "{command:?}: {status}\n{stdout}{}", String::from_utf8_lossy(&stderr));
    stdout
}
