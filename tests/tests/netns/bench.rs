//! The bench itself: every available peer starts, is measured for a moment, and stops without
//! leaving a trace.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{netns, privileges};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

/// Runs the bench to its end and checks that nothing is left of it.
fn bench(args: &[&str]) -> Output {
    wait_for(start(args))
}

fn start(args: &[&str]) -> Child {
    start_with(args, &[])
}

fn start_with(args: &[&str], environment: &[(&str, &Path)]) -> Child {
    privileges::require();
    let mut command = Command::new(env!("CARGO_BIN_EXE_bench"));
    command.envs(environment.iter().copied());
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().expect("start the bench")
}

fn wait_for(bench: Child) -> Output {
    let its_own = format!("mt{}-", bench.id());
    let output = bench.wait_with_output().expect("wait for the bench");
    let left: Vec<_> = netns::names().into_iter().filter(|name| name.starts_with(&its_own)).collect();
    assert_eq!(left, [""; 0], "{}", text_of(&output));
    output
}

fn text_of(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn results(folder: &Path) -> Value {
    let text = fs::read_to_string(folder.join("results.json")).expect("the results");
    serde_json::from_str(&text).expect("JSON")
}

fn runs(folder: &TempDir) -> Vec<Value> {
    results(folder.path())["runs"].as_array().expect("runs").clone()
}

/// Peers that need no more than the tests do.
const PEERS: &str = "direct,haproxy,host-haproxy,ours,neutron-agent,ovn";

#[test]
fn a_rehearsal_measures_every_peer_and_writes_a_report() {
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().display().to_string();
    let output = bench(&["--rehearse", "--peers", PEERS, "--out", &out]);
    assert!(output.status.success(), "{}", text_of(&output));
    let runs = runs(&folder);
    for (workload, peers) in [
        ("requests", &["direct", "haproxy", "host-haproxy, 4 instances", "ours", "ours, 5 more ports"][..]),
        ("boot", &["direct", "haproxy", "host-haproxy", "ours", "neutron-agent (RPC replaced)", "ovn"]),
        ("density", &["haproxy", "ours"]),
        ("tax", &["ours"]),
        ("bystander", &["tap with our programs", "tap without programs"]),
    ] {
        for peer in peers {
            assert!(
                runs.iter().any(|run| run["workload"] == workload && run["peer"] == *peer),
                "{workload} of {peer}: {}",
                text_of(&output)
            );
        }
    }
    // Neutron's agents have short queues and may fail.
    let neutrons = ["neutron-agent (RPC replaced)", "ovn"];
    for run in runs.iter().filter(|run| !neutrons.contains(&run["peer"].as_str().unwrap_or(""))) {
        assert_eq!(run["failed"], 0, "{run}");
        assert!(
            run["answers"] != 0 || !["requests", "boot"].contains(&run["workload"].as_str().unwrap_or(""))
        );
    }
    let page = fs::read_to_string(folder.path().join("report.html")).expect("the page");
    assert!(page.contains("<svg") && page.ends_with("</html>\n"));
    let compared = bench(&["compare", &out, &out]);
    assert!(
        compared.status.success() && !text_of(&compared).contains("beyond the noise:"),
        "{}",
        text_of(&compared)
    );
}

#[test]
fn an_interrupted_bench_leaves_nothing_behind() {
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("report");
    let bench = start(&[
        "--rehearse",
        "--repetitions",
        "1000",
        "--peers",
        "ours",
        "--out",
        &out.display().to_string(),
    ]);
    let portal = format!("mt{}-", bench.id());
    wait::until("our agent runs", PATIENCE, || {
        netns::names().iter().any(|name| name.starts_with(&portal) && name.ends_with("-portal")).then_some(())
    });
    kill(Pid::from_raw(bench.id().cast_signed()), Signal::SIGINT).expect("interrupt the bench");
    let output = wait_for(bench);
    assert_eq!(output.status.code(), Some(1), "{}", text_of(&output));
    assert!(text_of(&output).contains("interrupted: no report") && !out.exists(), "{}", text_of(&output));
}

#[test]
fn a_peer_that_is_not_installed_is_reported_absent() {
    let folder = tempfile::tempdir().expect("a folder");
    let (programs, out) = (folder.path().join("programs"), folder.path().join("report"));
    fs::create_dir(&programs).expect("a folder for programs");
    for name in ["ip", "nsenter", "nginx"] {
        let path = std::env::var_os("PATH").expect("a PATH");
        let mut found = std::env::split_paths(&path).map(|folder| folder.join(name));
        let found = found.find(|path| path.is_file()).expect("a program that the bench needs");
        symlink(found, programs.join(name)).expect("a link to a program");
    }
    let out_text = out.display().to_string();
    let args = ["--rehearse", "--peers", "direct,haproxy,legacy", "--out", &out_text];
    let output = wait_for(start_with(&args, &[("PATH", &programs)]));
    assert!(output.status.success(), "{}", text_of(&output));
    let results = results(&out);
    let absent: Vec<_> =
        results["absent"].as_array().expect("a list").iter().map(|one| &one["what"]).collect();
    assert_eq!(absent, ["haproxy", "legacy"]);
    assert!(results["runs"].as_array().expect("runs").iter().all(|run| run["peer"] == "direct"));
    let page = fs::read_to_string(out.join("report.md")).expect("the report");
    assert!(page.contains("rabbitmq-server") && page.contains("cargo xtask setup --for bench"), "{page}");
}

#[test]
fn an_unknown_peer_is_refused() {
    let output = bench(&["--peers", "nobody"]);
    assert_eq!(output.status.code(), Some(2), "{}", text_of(&output));
}
