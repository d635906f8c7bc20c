//! The bench itself works: every peer that is here starts, is measured for a moment, and stops without a trace.

#![expect(clippy::expect_used, reason = "helpers of tests fail the test")]

use std::fs;
use std::process::{Child, Command, Output, Stdio};

use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{netns, privileged};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

/// Runs it to its end, and sees that nothing is left of it.
fn bench(args: &[&str]) -> Output {
    wait_for(start(args))
}

fn start(args: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bench"));
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().expect("start the bench")
}

fn wait_for(bench: Child) -> Output {
    let its_own = format!("mt{}-", bench.id());
    let output = bench.wait_with_output().expect("wait for the bench");
    let left: Vec<_> = netns::names().into_iter().filter(|name| name.starts_with(&its_own)).collect();
    assert_eq!(left, [""; 0], "{}", told(&output));
    output
}

fn told(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn runs(folder: &TempDir) -> Vec<Value> {
    let text = fs::read_to_string(folder.path().join("results.json")).expect("the results");
    let results: Value = serde_json::from_str(&text).expect("JSON");
    results["runs"].as_array().expect("runs").clone()
}

#[test]
fn a_rehearsal_measures_every_peer_and_leaves_a_report() {
    if !privileged() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().display().to_string();
    let output = bench(&["--rehearse", "--peers", "all", "--out", &out]);
    assert!(output.status.success(), "{}", told(&output));
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
                told(&output)
            );
        }
    }
    // Neutron's agents have short queues, and may well fail at this.
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
        compared.status.success() && !told(&compared).contains("beyond the noise:"),
        "{}",
        told(&compared)
    );
}

#[test]
fn an_interrupted_bench_leaves_no_trace() {
    if !privileged() {
        return;
    }
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
    assert_eq!(output.status.code(), Some(1), "{}", told(&output));
    assert!(told(&output).contains("interrupted: no report") && !out.exists(), "{}", told(&output));
}

#[test]
fn a_peer_that_nobody_knows_is_refused() {
    let output = bench(&["--peers", "nobody"]);
    assert_eq!(output.status.code(), Some(2), "{}", told(&output));
}
