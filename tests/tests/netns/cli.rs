//! The command line of the real binary: its output, and the exit codes that init systems and probes
//! rely on.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Command, Output};

use metadata_agent::config::OPTIONS;
use metadata_tests::{Agent, HostState, Mode, TwoTenants, agent};
use serde_json::Value;
use tempfile::TempDir;

const COMMANDS: [&str; 4] = ["run", "check", "status", "detach"];
/// The capabilities that must be enough for the agent.
const CAPABILITIES: [&str; 5] = ["sys_admin", "net_admin", "net_bind_service", "setuid", "setgid"];

/// Builds a command without any configuration of this process.
fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(agent::binary());
    for option in OPTIONS {
        command.env_remove(option.env());
    }
    command.args(arguments);
    command
}

fn output(command: &mut Command) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = command.output().expect("run the agent's binary");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    (status.code(), text(stdout), text(stderr))
}

fn config(text: &str) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("create a folder");
    let file = folder.path().join("agent.ini");
    fs::write(&file, text).expect("write a configuration");
    (folder, file)
}

/// Returns the failed findings of `check --json`: their subjects and texts.
fn missing(json: &str) -> Vec<(String, String)> {
    let findings: Vec<Value> = serde_json::from_str(json).expect("JSON");
    assert!(findings.len() >= 8, "{json}");
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    let wrong = findings.iter().filter(|finding| finding["ok"] == false);
    wrong.map(|finding| (text(&finding["subject"]), text(&finding["detail"]))).collect()
}

#[test]
fn all_configuration_errors_are_reported_at_once() {
    let (_folder, file) = config(
        "[DEFAULT]\nnova_metadata_port = 123456\nnova_metadata_protocol = gopher\n\
         [metadata_agent]\nattach_mode = nailed\nthis is not an option\nbpffs_dir = relative\n",
    );
    let file = file.display().to_string();
    // `status` needs only one option, but its file must still be valid.
    for subcommand in ["run", "check", "detach"] {
        let mut command = command(&[subcommand, "--config-file", &file, "--guest-link-kinds", "submarine"]);
        let (code, stdout, stderr) = output(command.env("METADATA_AGENT_DRAIN_TIMEOUT", "soon"));
        assert_eq!((code, stdout.as_str()), (Some(64), ""), "{subcommand}: {stderr}");
        for fault in [
            "\"123456\" is not accepted",
            "\"gopher\" is not accepted",
            "\"nailed\" is not accepted",
            "\"relative\" is not accepted",
            "\"submarine\" is not accepted (--guest-link-kinds)",
            "\"soon\" is not accepted (environment METADATA_AGENT_DRAIN_TIMEOUT)",
            ":6",
        ] {
            assert!(stderr.contains(fault), "{subcommand}: no {fault:?} in\n{stderr}");
        }
    }
    let (code, _, stderr) = output(&mut command(&["status", "--config-file", &file]));
    assert_eq!(code, Some(64), "{stderr}");
    let (code, _, stderr) = output(&mut command(&["check", "--config-file", "/nonexistent.ini"]));
    assert_eq!(code, Some(64), "{stderr}");
    assert!(stderr.contains("/nonexistent.ini"), "{stderr}");
}

/// Unknown options in files are ignored.
#[test]
fn flags_override_environment_overrides_files() {
    let (_folder, file) = config(
        "[DEFAULT]\nnova_metadata_host = 127.0.0.3\nnova_metadata_port = 9\nno_such_option = 1\ncore_plugin = ml2\n\
         [no_such_section]\nnova_metadata_port = x\n",
    );
    let file = file.display().to_string();
    let arguments = ["check", "--json", "--config-file", &file];
    let endpoint = |command: &mut Command| {
        let (code, stdout, stderr) = output(command);
        assert_eq!(code, Some(1), "{stderr}");
        let wrong = missing(&stdout).into_iter().find(|(subject, _)| subject.starts_with("Nova"));
        wrong.expect("no listener there").1.split(": ").next().expect("an endpoint").to_owned()
    };
    let by_env =
        |command: &mut Command| endpoint(command.env("METADATA_AGENT_NOVA_METADATA_HOST", "127.0.0.2"));
    assert_eq!(endpoint(&mut command(&arguments)), "http://127.0.0.3:9");
    assert_eq!(by_env(&mut command(&arguments)), "http://127.0.0.2:9");
    let by_flag = [&arguments[..], &["--nova-metadata-host", "127.0.0.1"]].concat();
    assert_eq!(by_env(&mut command(&by_flag)), "http://127.0.0.1:9");
}

#[test]
fn help_lists_every_option_with_its_default() {
    for subcommand in COMMANDS {
        let (code, help, _) = output(&mut command(&[subcommand, "--help"]));
        assert_eq!(code, Some(0));
        // Long names are wrapped.
        let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
        for option in OPTIONS {
            let named = format!(" {} (environment {})", option.name, option.env());
            assert!(help.contains(&named), "{subcommand} --help lacks {named:?}");
            let flag = option.flag().map(|flag| format!("--{flag}"));
            assert!(flag.is_none_or(|flag| help.contains(&flag)), "{subcommand} --help: {}", option.name);
        }
    }
    let (_, help, _) = output(&mut command(&["run", "--help"]));
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    for truth in [
        "then the agent removes everything that it made",
        "Needs root, or CAP_SYS_ADMIN, CAP_NET_ADMIN, CAP_NET_BIND_SERVICE, CAP_SETUID and CAP_SETGID;",
    ] {
        assert!(help.contains(truth), "{help}");
    }
    for (arguments, want) in [(vec!["--help"], 0), (vec!["--version"], 0), (vec![], 64), (vec!["serve"], 64)]
    {
        assert_eq!(output(&mut command(&arguments)).0, Some(want), "{arguments:?}");
    }
}

#[test]
fn check_passes_on_a_good_host_and_changes_nothing() {
    let tenants = TwoTenants::new();
    let agent = tenants.agent().install();
    let before = HostState::capture(&tenants.host);
    let (code, stdout, stderr) = output(agent.command("check").arg("--json"));
    assert_eq!((code, missing(&stdout)), (Some(0), vec![]), "{stderr}");
    let (code, stdout, _) = output(&mut agent.command("check"));
    assert_eq!(code, Some(0), "{stdout}");
    assert!(stdout.lines().all(|line| line.starts_with("ok       ")), "{stdout}");
    before.assert_same(&HostState::capture(&tenants.host));
}

#[test]
fn check_names_everything_missing_and_changes_nothing() {
    let tenants = TwoTenants::new();
    let elsewhere = tenants.host.folder().join("pins");
    let agent =
        tenants.agent().set("metadata_agent", "bpffs_dir", &elsewhere.display().to_string()).install();
    tenants.nova.set_mode(Mode::Refuse);
    let before = HostState::capture(&tenants.host);
    let (code, stdout, stderr) = output(agent.command("check").arg("--json"));
    assert_eq!(code, Some(1), "{stderr}");
    let wrong = missing(&stdout);
    assert_eq!(wrong.len(), 2, "{wrong:?}");
    assert!(wrong[0].0 == "BPF file system" && wrong[0].1.contains("mount -t bpf"), "{wrong:?}");
    let nova = format!("http://{}", tenants.nova.address());
    assert!(wrong[1].0.starts_with("Nova") && wrong[1].1.starts_with(&nova), "{wrong:?}");
    let (code, stdout, _) = output(&mut agent.command("check"));
    assert_eq!(code, Some(1));
    assert_eq!(stdout.lines().filter(|line| line.starts_with("MISSING  ")).count(), 2, "{stdout}");
    before.assert_same(&HostState::capture(&tenants.host));

    // The fault that `check` finds is the one that keeps `run` from starting, and nothing else
    // changes.
    fs::create_dir(&elsewhere).expect("create an ordinary directory");
    fs::write(elsewhere.join("MD_CONFIG"), "foreign file").expect("write a file");
    let process = agent.spawn(&[]);
    assert_eq!(process.wait_exit(metadata_tests::wait::PATIENCE).code(), Some(1));
    let (code, _, stderr) = output(&mut agent.command("detach"));
    assert_eq!(code, Some(0), "{stderr}");
    assert!(elsewhere.join("MD_CONFIG").is_file(), "an ordinary directory must not be cleared");
    before.assert_same(&HostState::capture(&tenants.host));
}

#[test]
fn status_reports_by_exit_code() {
    let tenants = TwoTenants::new();
    let agent = tenants.agent().install();
    let status = |view: &[&str]| output(agent.command("status").args(view));
    for view in [&[][..], &["--json"], &["--live"], &["--ready"]] {
        let (code, stdout, stderr) = status(view);
        assert_eq!((code, stdout.as_str()), (Some(1), ""), "{view:?}");
        assert!(stderr.contains(&agent.admin_socket().display().to_string()), "{view:?}: {stderr}");
    }

    let process = agent.start();
    assert_eq!(status(&["--live"]), (Some(0), "live\n".to_owned(), String::new()));
    assert_eq!(status(&["--ready"]), (Some(0), "ready\n".to_owned(), String::new()));
    let (code, json, _) = status(&["--json"]);
    let state: Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!((code, &state["pid"]), (Some(0), &Value::from(process.pid())));
    assert!(!json.contains(tenants.nova.secret()), "the output contains the secret");
    let (code, summary, _) = status(&[]);
    assert_eq!(code, Some(0));
    for guest in &tenants.guests {
        let line = format!("  {}  instance {}  0 clients", guest.tap, guest.port.instance);
        assert!(summary.lines().any(|have| have == line), "no {line:?} in\n{summary}");
    }
    assert_eq!(process.stop().code(), Some(0));

    fs::remove_file(agent.config_file().with_file_name("inventory.json")).expect("remove the inventory");
    let process = agent.spawn(&[]);
    metadata_tests::wait::until("it waits only for its source", metadata_tests::wait::PATIENCE, || {
        (status(&["--ready"]) == (Some(1), "source static_file\n".to_owned(), String::new())).then_some(())
    });
    assert_eq!(status(&["--live"]).0, Some(0));
    assert_eq!(process.stop().code(), Some(0));
}

/// Installs an agent that has only these capabilities, also after it executes a program.
fn confined(tenants: &TwoTenants, capabilities: &[&str]) -> Agent {
    let script = tenants.host.folder().join(format!("confined-{}", capabilities.join("-")));
    let set = capabilities.join(",+");
    let text = format!(
        "#!/bin/sh\nexec setpriv --bounding-set=-all,+{set} --inh-caps=-all --no-new-privs {} \"$@\"\n",
        agent::binary().display()
    );
    fs::write(&script, text).expect("write a script");
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).expect("make it executable");
    tenants.agent().binary(script).install()
}

#[test]
fn the_stated_capabilities_are_enough() {
    for mode in ["tcx", "clsact"] {
        let tenants = TwoTenants::new();
        let agent = confined(&tenants, &CAPABILITIES);
        let before = HostState::capture(&tenants.host);
        let (code, stdout, _) = output(&mut agent.command("check"));
        assert_eq!(code, Some(0), "{stdout}");
        let process = agent.spawn(&["--attach-mode".to_owned(), mode.to_owned()]);
        process.wait_ready();
        tenants.assert_served();
        process.kill9();
        let process = agent.spawn(&["--attach-mode".to_owned(), mode.to_owned()]);
        process.wait_ready();
        tenants.assert_served();
        assert_eq!(process.stop().code(), Some(0));
        before.assert_same(&HostState::capture(&tenants.host));
    }
}

#[test]
fn a_missing_capability_is_named() {
    let tenants = TwoTenants::new();
    for absent in CAPABILITIES {
        let others: Vec<&str> = CAPABILITIES.into_iter().filter(|held| *held != absent).collect();
        let agent = confined(&tenants, &others);
        let before = HostState::capture(&tenants.host);
        let name = format!("without CAP_{} (", absent.to_uppercase());
        let (code, _, stderr) = output(&mut agent.command("run"));
        assert_eq!(code, Some(1), "{stderr}");
        assert!(stderr.contains(&name) && stderr.matches("CAP_").count() == 1, "{stderr}");
        let (code, stdout, _) = output(&mut agent.command("check"));
        assert_eq!(code, Some(1));
        assert!(stdout.contains(&format!("MISSING  capabilities: {name}")), "{stdout}");
        let (code, _, stderr) = output(&mut agent.command("detach"));
        let needed = ["sys_admin", "net_admin"].contains(&absent);
        assert_eq!((code, stderr.contains(&name)), (Some(i32::from(needed)), needed), "{stderr}");
        before.assert_same(&HostState::capture(&tenants.host));
    }
}
