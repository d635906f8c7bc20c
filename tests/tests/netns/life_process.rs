//! The agent restricts its own process, however it is started.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use metadata_tests::wait::PATIENCE;
use metadata_tests::{Host, TwoTenants, agent};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Writes a program that permits core dumps of any size in the host's folder, and becomes its first
/// argument.
fn dumping(host: &Host, name: &str, command: &str) -> PathBuf {
    let path = host.folder().join(name);
    let folder = host.folder().display();
    let script = format!("#!/bin/sh\ncd {folder} && ulimit -c unlimited && exec {command} \"$@\"\n");
    fs::write(&path, script).expect("write the program");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("make the program executable");
    path
}

#[test]
fn a_crash_writes_no_core_dump() {
    let tenants = TwoTenants::new();
    let host = &tenants.host;

    // This machine writes a dump of another program.
    let mut other = Command::new(dumping(host, "other", "tail -f /dev/null"));
    let mut other = other.stdout(Stdio::piped()).spawn().expect("run tail");
    let pid = Pid::from_raw(other.id().try_into().expect("a process id"));
    let is_tail = || fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "tail\n");
    metadata_tests::wait::until("tail runs", PATIENCE, || is_tail().then_some(()));
    kill(pid, Signal::SIGABRT).expect("abort tail");
    let status = other.wait().expect("wait for tail");
    assert!(status.core_dumped(), "core dumps are impossible here: {status}");

    let binary = dumping(host, "dumping-agent", &agent::binary().display().to_string());
    let agent = tenants.agent().binary(binary).install();
    let process = agent.start();
    tenants.assert_served();
    process.signal(Signal::SIGABRT);
    let status = process.wait_exit(PATIENCE);
    assert_eq!((status.signal(), status.core_dumped()), (Some(6), false), "{status}");
    agent.detach();
}

#[test]
fn no_thread_can_gain_privileges() {
    let tenants = TwoTenants::new();
    let agent = tenants.agent().install();
    let process = agent.start();
    tenants.assert_served();
    for pid in process.pids() {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let tasks = fs::read_dir(proc.join("task")).expect("list the threads");
        let threads: Vec<String> = tasks
            .map(|task| {
                fs::read_to_string(task.expect("a thread").path().join("status")).expect("its status")
            })
            .collect();
        assert!(threads.len() > 1, "{threads:?}");
        for status in threads {
            assert!(status.lines().any(|line| line == "NoNewPrivs:\t1"), "{status}");
        }
        let limits = fs::read_to_string(proc.join("limits")).expect("its limits");
        let core = limits.lines().find(|line| line.starts_with("Max core file size")).expect("the limit");
        assert_eq!(core.split_whitespace().skip(4).take(2).collect::<Vec<_>>(), ["0", "0"], "{core}");
    }
}
