//! Output that cannot be written: a reader that has left, as in `status | head`, and a full disk.

use std::fs::File;
use std::io;
use std::process::{Command, Output, Stdio};

use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{Agent, ServedTenants, TwoTenants, agent};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Commands that print something and succeed.
const PRINTING: [&[&str]; 8] = [
    &["status"],
    &["status", "--json"],
    &["status", "--live"],
    &["status", "--ready"],
    &["check"],
    &["check", "--json"],
    &["config", "show"],
    &["config", "show", "--json"],
];
const HELP: [&[&str]; 5] =
    [&["--help"], &["--version"], &["run", "--help"], &["status", "-h"], &["config", "show", "--help"]];

/// Returns the end of a pipe whose reader has left.
fn abandoned_pipe() -> Stdio {
    let (_, writer) = io::pipe().expect("create a pipe");
    writer.into()
}

fn full_disk() -> Stdio {
    File::options().write(true).open("/dev/full").expect("open /dev/full").into()
}

/// Builds every command that prints. Those of the installation read its configuration.
fn printing(installed: &Agent) -> Vec<Command> {
    let help = HELP.map(|arguments| {
        let mut command = Command::new(agent::binary());
        command.args(arguments);
        command
    });
    let printing = PRINTING.map(|arguments| match arguments {
        ["config", "show", rest @ ..] => {
            let mut command = Command::new(agent::binary());
            command.args(["config", "show", "--config-file"]).arg(installed.config_file()).args(rest);
            command
        }
        [subcommand, rest @ ..] => {
            let mut command = installed.command(subcommand);
            command.args(rest);
            command
        }
        [] => unreachable!("every command has a name"),
    });
    help.into_iter().chain(printing).collect()
}

fn outcome(command: &mut Command, stdout: Stdio) -> (Option<i32>, String) {
    // `output` would replace stdout by a pipe.
    let child = command.stdout(stdout).stderr(Stdio::piped()).spawn().expect("run the command");
    let Output { status, stderr, .. } = child.wait_with_output().expect("wait for the command");
    (status.code(), String::from_utf8(stderr).expect("UTF-8"))
}

#[test]
fn every_command_ends_quietly_without_a_reader() {
    let tenants = ServedTenants::new();
    for mut command in printing(&tenants.agent) {
        let ended = outcome(&mut command, abandoned_pipe());
        assert_eq!(ended, (Some(0), String::new()), "{command:?}");
    }
}

#[test]
fn every_command_reports_a_full_disk() {
    let tenants = ServedTenants::new();
    for mut command in printing(&tenants.agent) {
        let ended = outcome(&mut command, full_disk());
        let error = "metadata-agent: write to standard output: No space left on device (os error 28)\n";
        assert_eq!(ended, (Some(1), error.to_owned()), "{command:?}");
    }
}

#[test]
fn an_error_that_cannot_be_printed_keeps_its_exit_code() {
    for stderr in [abandoned_pipe, full_disk] {
        for (arguments, code) in [
            (&["status", "--admin-socket", "/nonexistent"][..], 1),
            (&["config", "show", "--config-file", "/nonexistent"], 64),
            (&["serve"], 64),
        ] {
            let mut command = Command::new(agent::binary());
            let status = command.args(arguments).stdout(Stdio::null()).stderr(stderr()).status();
            assert_eq!(status.expect("run the command").code(), Some(code), "{arguments:?}");
        }
    }
}

#[test]
fn the_agent_serves_although_its_log_cannot_be_written() {
    for log in [abandoned_pipe, full_disk] {
        let tenants = TwoTenants::new();
        let agent = tenants.agent().install();
        let mut process = agent.command("run").stderr(log()).spawn().expect("run the agent");
        wait::until("it is ready", PATIENCE, || {
            assert_eq!(process.try_wait().expect("wait for the agent"), None);
            agent.query("status", &["--ready"]).status.success().then_some(())
        });
        tenants.assert_served();
        let pid = Pid::from_raw(process.id().try_into().expect("a process id"));
        kill(pid, Signal::SIGTERM).expect("stop the agent");
        assert_eq!(process.wait().expect("wait for the agent").code(), Some(0));
    }
}
