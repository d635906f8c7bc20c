//! SIGHUP: the configuration is read again, and what can change at run time does.

use std::fs;
use std::os::unix::net::UnixDatagram;

use metadata_tests::two_tenants::{HOSTNAME, assert_served};
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{Agent, AgentProcess, ServedTenants, TwoTenants};
use nix::sys::signal::Signal;
use serde_json::Value;

/// Appends to the configuration. The last value of an option counts.
fn reconfigure(agent: &Agent, text: &str) {
    let before = fs::read_to_string(agent.config_file()).expect("read the configuration");
    fs::write(agent.config_file(), format!("{before}\n{text}")).expect("write the configuration");
}

fn wait_for_line(process: &AgentProcess, line: &str) {
    wait::until(line, PATIENCE, || {
        assert!(process.exited().is_none(), "SIGHUP ended the agent: {}", process.output());
        process.output().contains(line).then_some(())
    });
}

/// Returns the value of an option that the agent shows as in force.
fn in_force(process: &AgentProcess, name: &str) -> Value {
    let state = process.state();
    let settings = state["config"].as_array().expect("settings").clone();
    settings.into_iter().find(|setting| setting["name"] == name).expect("the option")["value"].clone()
}

#[test]
fn a_reload_applies_what_can_change_and_names_the_rest() {
    let tenants = TwoTenants::new();
    let agent = tenants.agent().set("DEFAULT", "metadata_proxy_shared_secret", "old-secret").install();
    let process = agent.start();
    assert_ne!(tenants.guests[0].get(HOSTNAME).status, 200, "Nova accepts no other secret than its own");
    let port = in_force(&process, "nova_metadata_port");
    assert!(!process.output().contains(" access: "), "{}", process.output());

    let secret = tenants.nova.secret();
    let text = "[DEFAULT]\ndebug = true\nnova_metadata_port = 1\nmetadata_proxy_shared_secret = ";
    reconfigure(&agent, &format!("{text}{secret}\n"));
    process.signal(Signal::SIGHUP);
    wait_for_line(&process, r#"configuration reloaded applied=["metadata_proxy_shared_secret", "debug"]"#);
    wait_for_line(&process, r#"changed options need a restart options=["nova_metadata_port"]"#);
    wait::until("the new secret is used", PATIENCE, || {
        (tenants.guests[0].get(HOSTNAME).status == 200).then_some(())
    });
    tenants.assert_served();
    wait_for_line(&process, " access: ");
    assert_eq!(in_force(&process, "debug"), "true");
    assert_eq!(in_force(&process, "nova_metadata_port"), port, "a restart is needed");
    let output = process.output();
    assert!(!output.contains("old-secret") && !output.contains(secret), "a secret is in the log");
    assert_eq!(process.stop().code(), Some(0));
}

#[test]
fn an_invalid_configuration_changes_nothing() {
    let tenants = ServedTenants::new();
    let before = fs::read_to_string(tenants.agent.config_file()).expect("read the configuration");
    reconfigure(
        &tenants.agent,
        "[DEFAULT]\ndebug = perhaps\nmetadata_proxy_shared_secret = wrong\nnova_metadata_port = 0\n",
    );
    tenants.process.signal(Signal::SIGHUP);
    wait_for_line(&tenants.process, "cannot reload the configuration; keeping the last one");
    let output = tenants.process.output();
    let error = output.lines().find(|line| line.contains("cannot reload")).expect("the error");
    assert!(error.contains("debug") && error.contains("nova_metadata_port"), "{error}");
    assert_eq!(in_force(&tenants.process, "debug"), "false");
    assert_served(&tenants.red.guest);

    fs::write(tenants.agent.config_file(), before).expect("write the configuration");
    tenants.process.signal(Signal::SIGHUP);
    wait_for_line(&tenants.process, "configuration reloaded applied=[]");
    let ServedTenants { process, .. } = tenants;
    assert_eq!(process.stop().code(), Some(0));
}

/// With `Type=notify`, `systemctl reload` then waits for the end of the reload.
#[test]
fn systemd_is_told_of_a_reload() {
    let tenants = TwoTenants::new();
    let place = tenants.host.folder().join("notify");
    let systemd = UnixDatagram::bind(&place).expect("listen as systemd");
    systemd.set_read_timeout(Some(PATIENCE)).expect("limit the wait");
    let hear = |wanted: &str| {
        wait::until(wanted, PATIENCE, || {
            let mut message = [0; 4096];
            let length = systemd.recv(&mut message).expect("a message in time");
            String::from_utf8_lossy(&message[..length]).lines().any(|line| line == wanted).then_some(())
        });
    };
    let agent = tenants.agent().env("NOTIFY_SOCKET", &place.display().to_string()).install();
    let process = agent.start();
    hear("READY=1");
    process.signal(Signal::SIGHUP);
    hear("RELOADING=1");
    hear("READY=1");
    tenants.assert_served();
    assert_eq!(process.stop().code(), Some(0));
}
