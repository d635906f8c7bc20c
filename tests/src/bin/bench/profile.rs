//! Where the agent's time goes under load, its system calls included: recorded by perf, drawn as flame graphs.
//!
//! A virtual machine may have no hardware counters, so samples are taken by the clock. What the kernel does for the agent's
//! packets in the name of others (guest, upstream, idle) is not among them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use inferno::collapse::Collapse as _;
use inferno::collapse::perf::{Folder, Options as FoldOptions};
use inferno::flamegraph::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::machine;
use super::peers::{Ours, Peer as _};
use super::requests::Case;
use super::statistics::precise;

/// Times a second; a prime, so as not to keep step with anything.
const HERTZ: &str = "997";
/// How much of the stack is kept with each sample: the release build has no frame pointers.
const CALL_GRAPH: &str = "dwarf,16384";
const DURATION: Duration = Duration::from_secs(4);
/// How many of the functions are told.
const TOP: usize = 20;

/// A function that runs often.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Hot {
    pub load: String,
    pub function: String,
    /// Of the samples, those that found it running, and those that found it running or waiting for what it called.
    pub own: f64,
    pub with_callees: f64,
}

/// Why there can be none.
pub fn lacks() -> Option<&'static str> {
    (!machine::has_program("perf")).then_some("perf is not installed: apt-get install linux-perf")
}

/// Records both loads of 64 connections, and leaves a flame graph of each in the folder.
pub fn record(ours: &Ours, folder: &Path) -> anyhow::Result<Vec<Hot>> {
    fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    let mut hot = Vec::new();
    for (name, keep_alive) in [("new", false), ("kept", true)] {
        let case = Case::get(64, keep_alive);
        let stacks = folded(ours, case)?;
        let path = folder.join(format!("flame-{name}.svg"));
        let mut options = Options::default();
        options.title = format!("The agent at {}", case.label());
        // Weights are of the clock, not of samples.
        "ns".clone_into(&mut options.count_name);
        options.deterministic = true;
        let file = File::create(&path).with_context(|| format!("write {}", path.display()))?;
        flamegraph::from_lines(&mut options, stacks.lines(), file)
            .with_context(|| format!("draw {}", path.display()))?;
        hot.extend(hottest(&case.label(), &stacks));
    }
    Ok(hot)
}

/// The stacks under a load, one a line, with how often each was found.
fn folded(ours: &Ours, case: Case) -> anyhow::Result<String> {
    let scratch = tempfile::tempdir().context("a folder for perf")?;
    let data = scratch.path().join("perf.data");
    let [agent] = ours.processes()[..] else { anyhow::bail!("one agent") };
    // Warm, and so that perf is there before the load ends.
    drop(case.load(ours, DURATION / 8));
    let mut perf = Command::new("perf")
        .args(["record", "--quiet", "--event", "cpu-clock", "--freq", HERTZ, "--call-graph", CALL_GRAPH])
        .args(["--pid", &agent.to_string(), "--output"])
        .arg(&data)
        .stdin(Stdio::null())
        .spawn()
        .context("run perf")?;
    drop(case.load(ours, DURATION));
    stop(&mut perf)?;
    let script = Command::new("perf")
        .args(["script", "--no-inline", "--input"])
        .arg(&data)
        .stderr(Stdio::null())
        .output()
        .context("run perf")?;
    ensure!(script.status.success(), "perf script: {}", script.status);
    let mut folded = Vec::new();
    Folder::from(FoldOptions::default()).collapse(&script.stdout[..], &mut folded).context("fold stacks")?;
    ensure!(!folded.is_empty(), "perf found nothing: this machine may not let it sample");
    String::from_utf8(folded).context("fold stacks")
}

/// As by Ctrl-C: it writes down what it has.
fn stop(perf: &mut Child) -> anyhow::Result<()> {
    kill(Pid::from_raw(perf.id().cast_signed()), Signal::SIGINT).context("stop perf")?;
    // It ends by the signal that it was stopped with, and by a status where it could not begin.
    let status = perf.wait().context("wait for perf")?;
    ensure!(status.code().is_none_or(|code| code == 0), "perf record: {status}");
    Ok(())
}

/// Those that are found running most often.
fn hottest(load: &str, folded: &str) -> Vec<Hot> {
    let mut found: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
    let mut all = 0;
    for (stack, count) in folded.lines().filter_map(|line| line.rsplit_once(' ')) {
        let count: u64 = count.parse().unwrap_or_default();
        all += count;
        // The first is the process; and a function that calls itself is found once.
        let mut frames: Vec<&str> = stack.split(';').skip(1).collect();
        if let Some(leaf) = frames.last() {
            found.entry(leaf).or_default().0 += count;
        }
        frames.sort_unstable();
        frames.dedup();
        for frame in frames {
            found.entry(frame).or_default().1 += count;
        }
    }
    let mut found: Vec<_> = found.into_iter().collect();
    found.sort_by_key(|(_, (own, _))| std::cmp::Reverse(*own));
    let share = |count| precise(count) / precise(all).max(1.0);
    let hot = |(function, (own, with)): (&str, (u64, u64))| Hot {
        load: load.to_owned(),
        function: function.to_owned(),
        own: share(own),
        with_callees: share(with),
    };
    found.into_iter().take(TOP).map(hot).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_function_has_what_it_runs_and_what_it_calls() {
        let hot = hottest("a load", "agent;main;send;copy 6\nagent;main;send 2\nagent;main;main 2\n");
        let of = |name: &str| {
            let hot = hot.iter().find(|hot| hot.function == name).expect(name);
            (hot.own, hot.with_callees)
        };
        assert_eq!((of("copy"), of("send"), of("main")), ((0.6, 0.6), (0.2, 0.8), (0.2, 1.0)));
        assert_eq!(hot[0].function, "copy");
    }
}
