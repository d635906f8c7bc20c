//! A named network namespace that lives as long as its value, also through a panic.
//!
//! Interfaces inside die with it. Code runs inside by [`Netns::enter`], programs by [`Netns::command`]. Only the
//! network is another one: files, mounts and process ids are those of the machine, as they are for an agent on a
//! real host. (`ip netns exec` would give a private mount namespace, where a namespace that the agent makes is
//! invisible to everybody else.)

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

/// Where iproute2, and so everybody, keeps the names.
pub const DIRECTORY: &str = "/run/netns";

/// A network namespace.
#[derive(Debug)]
pub struct Netns {
    name: String,
    path: PathBuf,
    handle: File,
    ours: bool,
}

impl Netns {
    /// A fresh one whose name holds the process id, a number and `label`.
    #[must_use]
    pub fn new(label: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Self::named(&format!("mt{}-{number}-{label}", process::id()))
    }

    /// A fresh one under exactly this name, which nobody may have yet.
    #[must_use]
    pub fn named(name: &str) -> Self {
        privileges::require();
        output_of(Command::new("ip").args(["netns", "add", name]));
        let path = PathBuf::from(DIRECTORY).join(name);
        let handle = File::open(&path).unwrap_or_else(|e| panic!("open {}: {e}", path.display()));
        let ns = Self { name: name.to_owned(), path, handle, ours: true };
        // Else a link-local address is not usable for the first second or two.
        ns.sysctl("ipv6/conf/default/accept_dad", "0");
        ns.ip("link set lo up");
        ns
    }

    /// The namespace this process runs in: to look at, never to change. Dropping it removes nothing.
    #[must_use]
    pub fn machine() -> Self {
        privileges::require();
        let path = PathBuf::from(format!("/proc/{}/ns/net", process::id()));
        let handle = File::open(&path).unwrap_or_else(|e| panic!("open {}: {e}", path.display()));
        Self { name: "machine".to_owned(), path, handle, ours: false }
    }

    /// The name under [`DIRECTORY`].
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `work` on a thread inside and hands back what it returns; a panic goes on in the caller. Sockets made
    /// inside stay inside wherever they are used.
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

    /// A command that will run inside, with the process id that `spawn` returns.
    #[must_use]
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path.display())).arg("--").arg(program);
        command
    }

    /// Runs a program inside and hands back its standard output; panics with all of its output when it fails.
    pub fn run(&self, command: &[&str]) -> String {
        let [program, args @ ..] = command else { panic!("no program to run in {}", self.name) };
        output_of(self.command(program).args(args))
    }

    /// Runs `ip` inside with one command a line.
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

    /// Writes one of the namespace's own settings, `key` as under `/proc/sys/net`.
    pub fn sysctl(&self, key: &str, value: &str) {
        // That folder shows the namespace of the thread that looks.
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

/// The names there are, sorted.
#[must_use]
pub fn names() -> Vec<String> {
    let Ok(entries) = fs::read_dir(DIRECTORY) else { return Vec::new() };
    let mut names: Vec<String> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Runs to the end and hands back standard output; panics with everything when it fails.
pub(crate) fn output_of(command: &mut Command) -> String {
    let Output { status, stdout, stderr } =
        command.output().unwrap_or_else(|e| panic!("run {command:?}: {e}"));
    let stdout = String::from_utf8_lossy(&stdout).into_owned();
    assert!(status.success(), "{command:?}: {status}\n{stdout}{}", String::from_utf8_lossy(&stderr));
    stdout
}
