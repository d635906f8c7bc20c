//! "Ready" has one meaning: for `/ready`, `status`, `check` and systemd.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;

use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{Agent, AgentProcess, TwoTenants, agent};
use serde_json::{Value, json};

/// Writes a program that becomes the agent on a host without libvirt: it hides this machine's.
fn without_libvirt(tenants: &TwoTenants) -> PathBuf {
    let path = tenants.host.folder().join("without-libvirt");
    // Only the mount above /run/libvirt becomes private. The agent's own mounts stay visible.
    let hide = "mount --make-private \"$(findmnt -n -o TARGET --target /run/libvirt)\" && \
                mount -t tmpfs none /run/libvirt && exec \"$0\" \"$@\"";
    let binary = agent::binary().display().to_string();
    let script = format!(
        "#!/bin/sh\n[ -e /run/libvirt ] || exec {binary} \"$@\"\n\
         exec unshare --mount --propagation unchanged sh -c '{hide}' {binary} \"$@\"\n"
    );
    fs::write(&path, script).expect("write the program");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("make the program executable");
    path
}

/// Removes the option that every installation of the rig has.
fn leave_libvirt_at_its_default(agent: &Agent) {
    let text = fs::read_to_string(agent.config_file()).expect("read the configuration");
    let lines: Vec<_> = text.lines().filter(|line| !line.starts_with("libvirt_dir")).collect();
    assert_eq!(lines.len() + 1, text.lines().count(), "{text}");
    fs::write(agent.config_file(), lines.join("\n")).expect("write the configuration");
}

fn source(process: &AgentProcess, name: &str) -> Value {
    let state = process.state();
    let sources = state["sources"].as_array().expect("sources").clone();
    sources.into_iter().find(|source| source["source"] == name).expect("the source")
}

/// Taps by hand, as README describes.
#[test]
fn a_host_without_libvirt_becomes_ready() {
    let tenants = TwoTenants::new();
    let agent = tenants.agent().binary(without_libvirt(&tenants)).install();
    leave_libvirt_at_its_default(&agent);
    let checked = agent.query("check", &[]);
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
    let process = agent.start();
    tenants.assert_served();
    let libvirt = source(&process, "libvirt");
    assert_eq!((&libvirt["ready"], &libvirt["faults"]), (&json!(true), &json!({})), "{libvirt}");
    assert_eq!(process.stop().code(), Some(0));
}

/// `check` and readiness agree.
#[test]
fn a_configured_directory_that_is_missing_is_awaited() {
    let tenants = TwoTenants::new();
    let agent = tenants.agent().install();
    fs::remove_dir(agent.libvirt_dir()).expect("remove the directory");
    let checked = agent.query("check", &[]);
    assert_eq!(checked.status.code(), Some(1));
    let missing = format!("MISSING  libvirt: {}", agent.libvirt_dir().display());
    assert!(String::from_utf8_lossy(&checked.stdout).contains(&missing), "{checked:?}");

    let process = agent.spawn(&[]);
    wait::until("it waits for libvirt", PATIENCE, || {
        process.try_admin("/ready").is_ok_and(|answer| answer.body == b"source libvirt\n").then_some(())
    });
    tenants.assert_served();
    fs::create_dir(agent.libvirt_dir()).expect("create the directory");
    process.wait_ready();
    assert!(agent.query("check", &[]).status.success());
    assert_eq!(process.stop().code(), Some(0));
}

#[test]
fn systemd_is_told_what_the_start_waits_for() {
    let tenants = TwoTenants::new();
    let place = tenants.host.folder().join("notify");
    let systemd = UnixDatagram::bind(&place).expect("listen as systemd");
    systemd.set_read_timeout(Some(PATIENCE)).expect("limit the wait");
    let hear = || {
        let mut message = [0; 4096];
        let length = systemd.recv(&mut message).expect("a message in time");
        String::from_utf8_lossy(&message[..length]).into_owned()
    };
    let agent = tenants.agent().env("NOTIFY_SOCKET", &place.display().to_string()).install();
    fs::remove_file(agent.config_file().with_file_name("inventory.json")).expect("remove the inventory");
    let process = agent.spawn(&[]);
    // Other sources may still be on their way.
    let waiting = "STATUS=waiting for source static_file\nEXTEND_TIMEOUT_USEC=30000000";
    wait::until("systemd knows what is missing", PATIENCE, || {
        let message = hear();
        assert!(message.starts_with("STATUS=waiting for "), "{message}");
        (message.trim_end() == waiting).then_some(())
    });
    assert_eq!(process.admin("/ready").body, b"source static_file\n");
    assert_eq!(agent.query("status", &["--ready"]).status.code(), Some(1));

    agent.set_ports(tenants.guests.each_ref().map(|guest| &guest.port));
    process.wait_ready();
    wait::until("systemd is told", PATIENCE, || {
        let message = hear();
        (message.trim_end() == "READY=1").then_some(())
    });
    assert!(agent.query("status", &["--ready"]).status.success());
    tenants.assert_served();
    assert_eq!(process.stop().code(), Some(0));
}

/// Thousands of interfaces take longer than the time-out of a start.
#[test]
fn systemd_is_told_how_many_interfaces_are_attached() {
    const TAPS: usize = 300;
    let tenants = TwoTenants::new();
    let taps = (0..TAPS).map(|n| format!("tuntap add dev tapmany{n} mode tap\nlink set tapmany{n} up\n"));
    tenants.host.netns().ip(&taps.collect::<String>());
    let place = tenants.host.folder().join("notify");
    let systemd = UnixDatagram::bind(&place).expect("listen as systemd");
    systemd.set_read_timeout(Some(PATIENCE)).expect("limit the wait");
    let agent = tenants.agent().env("NOTIFY_SOCKET", &place.display().to_string()).install();
    let process = agent.spawn(&[]);
    let mut attached = Vec::new();
    wait::until("the start is over", PATIENCE, || {
        let mut message = [0; 4096];
        let length = systemd.recv(&mut message).expect("a message in time");
        let message = String::from_utf8_lossy(&message[..length]).into_owned();
        if let Some(text) = message.strip_prefix("STATUS=attached ") {
            let all = TAPS + tenants.guests.len();
            let rest = format!(" of {all} guest interfaces\nEXTEND_TIMEOUT_USEC=30000000");
            let done = text.trim_end().strip_suffix(&rest).unwrap_or_else(|| panic!("{message}"));
            attached.push(done.parse::<usize>().expect("a number"));
        }
        (message.trim_end() == "READY=1").then_some(())
    });
    assert!(!attached.is_empty() && attached.is_sorted(), "{attached:?}");
    tenants.assert_served();
    assert_eq!(process.stop().code(), Some(0));
}
