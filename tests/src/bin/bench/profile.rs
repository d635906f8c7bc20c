//! The agent's time under load, including its system calls: recorded by perf, drawn as flame
//! graphs.
//!
//! A virtual machine may not have hardware counters, so samples are taken by the clock. The
//! kernel's work for the agent's packets in the context of other processes (guest, upstream, idle)
//! is not included.

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

/// Samples per second. A prime, so that it does not align with anything periodic.
const HERTZ: &str = "997";
/// The stack bytes kept with each sample, because the release build does not have frame pointers.
const CALL_GRAPH: &str = "dwarf,16384";
const DURATION: Duration = Duration::from_secs(4);
/// The number of functions to print.
const TOP: usize = 20;

/// A function that runs often.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Hot {
    pub load: String,
    pub function: String,
    /// The share of samples in the function itself, and in it or its callees.
    pub own: f64,
    pub with_callees: f64,
}

/// Returns the reason why a profile is not possible.
pub fn missing() -> Option<&'static str> {
    (!machine::has_program("perf")).then_some("perf is not installed: apt-get install linux-perf")
}

/// Records both loads with 64 connections and writes a flame graph of each to the folder.
pub fn record(ours: &Ours, folder: &Path) -> anyhow::Result<Vec<Hot>> {
    fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    let mut hot = Vec::new();
    for (name, keep_alive) in [("new", false), ("kept", true)] {
        let case = Case::get(64, keep_alive);
        let stacks = folded(ours, case)?;
        let path = folder.join(format!("flame-{name}.svg"));
        let mut options = Options::default();
        options.title = format!("The agent at {}", case.label());
        // Weights are time, not samples.
        "ns".clone_into(&mut options.count_name);
        options.deterministic = true;
        let file = File::create(&path).with_context(|| format!("write {}", path.display()))?;
        flamegraph::from_lines(&mut options, stacks.lines(), file)
            .with_context(|| format!("draw {}", path.display()))?;
        hot.extend(hottest(&case.label(), &stacks));
    }
    Ok(hot)
}

/// Returns the stacks under a load, one per line, each with its number of samples.
fn folded(ours: &Ours, case: Case) -> anyhow::Result<String> {
    let scratch = tempfile::tempdir().context("a folder for perf")?;
    let data = scratch.path().join("perf.data");
    let [agent] = ours.processes()[..] else { anyhow::bail!("one agent") };
    // Warm up, then run long enough that perf starts before the load ends.
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
    ensure!(!folded.is_empty(), "perf has no samples: this machine may not permit sampling");
    String::from_utf8(folded).context("fold stacks")
}

/// Interrupts perf, which then writes its data.
fn stop(perf: &mut Child) -> anyhow::Result<()> {
    kill(Pid::from_raw(perf.id().cast_signed()), Signal::SIGINT).context("stop perf")?;
    // It exits by the signal that stopped it, or with a status if it could not start.
    let status = perf.wait().context("wait for perf")?;
    ensure!(status.code().is_none_or(|code| code == 0), "perf record: {status}");
    Ok(())
}

/// Returns the functions with most samples.
fn hottest(load: &str, folded: &str) -> Vec<Hot> {
    let mut found: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
    let mut all = 0;
    for (stack, count) in folded.lines().filter_map(|line| line.rsplit_once(' ')) {
        let count: u64 = count.parse().unwrap_or_default();
        all += count;
        // The first frame is the process. A recursive function counts once.
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
    fn a_function_has_self_and_total_time() {
        let hot = hottest("a load", "agent;main;send;copy 6\nagent;main;send 2\nagent;main;main 2\n");
        let of = |name: &str| {
            let hot = hot.iter().find(|hot| hot.function == name).expect(name);
            (hot.own, hot.with_callees)
        };
        assert_eq!((of("copy"), of("send"), of("main")), ((0.6, 0.6), (0.2, 0.8), (0.2, 1.0)));
        assert_eq!(hot[0].function, "copy");
    }
}
