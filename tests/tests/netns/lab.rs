//! The lab runs on the machine itself, so above all it must not leave a trace there.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{self, Child, Command, Output, Stdio};

use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{HostState, netns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// A lab with its own name and, instead of the agent, a program that never becomes ready.
struct Lab {
    name: String,
    before: HostState,
    folder: TempDir,
}

impl Lab {
    fn new(test: &str) -> Self {
        let name = format!("{test}{}", process::id());
        let folder = tempfile::tempdir().expect("create a folder");
        let lab = Self { before: machine(&name), name, folder };
        fs::write(lab.placeholder(), "#!/bin/sh\n[ \"$1\" = detach ] || exec tail -f /dev/null\n")
            .expect("write the placeholder");
        fs::set_permissions(lab.placeholder(), Permissions::from_mode(0o755)).expect("make it executable");
        lab
    }

    fn placeholder(&self) -> PathBuf {
        self.folder.path().join("agent")
    }

    fn host(&self) -> String {
        format!("metadata-{}", self.name)
    }

    fn command(&self, agent: impl Into<PathBuf>) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lab"));
        command.args(["--name", &self.name, "--agent"]).arg(agent.into());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Starts the lab and waits until its agent runs.
    fn start(&self) -> Child {
        let lab = self.command(self.placeholder()).spawn().expect("start the lab");
        wait::until("the lab's agent runs", PATIENCE, || {
            let pids = Command::new("ip").args(["netns", "pids", &self.host()]).output().expect("run ip");
            let pids = String::from_utf8_lossy(&pids.stdout).into_owned();
            let programs = pids.split_whitespace().map(|pid| fs::read_to_string(format!("/proc/{pid}/comm")));
            programs.flatten().any(|program| program == "tail\n").then_some(())
        });
        lab
    }

    fn assert_no_trace(&self) {
        self.before.assert_same(&machine(&self.name));
        assert!(!fs::exists(format!("/run/{}", self.host())).expect("look for the lab's folder"));
    }
}

fn machine(lab: &str) -> HostState {
    HostState::machine(|name| name.contains(lab))
}

fn text_of(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn signal(child: &Child, signal: Signal) {
    let pid = child.id().try_into().expect("a process id");
    kill(Pid::from_raw(pid), signal).unwrap_or_else(|e| panic!("send {signal} to the lab: {e}"));
}

#[test]
fn a_lab_whose_agent_fails_reports_it_and_cleans_up() {
    let lab = Lab::new("fails");
    let output = lab.command("/bin/false").output().expect("run the lab");
    assert_eq!(output.status.code(), Some(1), "{}", text_of(&output));
    assert!(
        text_of(&output).contains("the agent exited before it was ready: exit status: 1"),
        "{}",
        text_of(&output)
    );
    lab.assert_no_trace();
}

#[test]
fn an_interrupted_lab_leaves_nothing_behind() {
    let lab = Lab::new("interrupted");
    let child = lab.start();
    for guest in ["red-1", "red-2", "blue-1", "blue-2"] {
        assert!(netns::names().contains(&format!("{}-{guest}", lab.name)));
    }
    signal(&child, Signal::SIGINT);
    let output = child.wait_with_output().expect("wait for the lab");
    assert!(output.status.success(), "{}", text_of(&output));
    lab.assert_no_trace();
}

#[test]
fn the_next_lab_removes_what_a_killed_one_left() {
    let lab = Lab::new("killed");
    let mut child = lab.start();
    let second = lab.command("/bin/false").output().expect("run a second lab");
    assert!(text_of(&second).contains("another lab runs"), "{}", text_of(&second));

    signal(&child, Signal::SIGKILL);
    child.wait().expect("wait for the lab");
    assert!(netns::names().contains(&lab.host()));
    let next = lab.command("/bin/false").output().expect("run the next lab");
    assert!(text_of(&next).contains(&format!("earlier lab: namespace {}", lab.host())), "{}", text_of(&next));
    lab.assert_no_trace();
}
