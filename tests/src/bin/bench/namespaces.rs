//! The cost of routers' namespaces on a network node: the time from the agent's start until all are
//! served, and the memory of each, in the agent and in the kernel.
//!
//! The namespaces exist before the agent. Each has one interface on which guests' requests would
//! arrive, but no guest. Kernel memory is the growth of slab, vmalloc and per-CPU areas while the
//! agent creates its veths, programs, links and sockets. It includes everything else on the
//! machine, so it means little for few namespaces.

use std::fmt;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, ensure};
use metadata_tests::terminal::print;
use metadata_tests::{Agent, Host, Netns, NovaStandIn};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Serialize;
use uuid::Uuid;

use super::machine::{Machine, Memory, read};

const COUNTS: [u32; 3] = [1, 100, 1000];
/// The limit for one agent before the bench gives up.
const PATIENCE: Duration = Duration::from_mins(10);
/// The fields of /proc/meminfo that are counted.
const KERNEL: [&str; 3] = ["Slab:", "VmallocUsed:", "Percpu:"];

#[derive(Debug, Serialize)]
struct Figures {
    machine: Machine,
    rows: Vec<Row>,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Row {
    namespaces: u32,
    ready_ms: u128,
    stopped_ms: u128,
    agent_kib: u64,
    kernel_growth_kib: i64,
}

/// Measures and prints the figures, and writes a file if one is given.
pub fn run(count: Option<u32>, json: Option<&Path>) -> anyhow::Result<()> {
    let counts = count.map_or_else(|| COUNTS.to_vec(), |count| vec![count]);
    let rows = counts.into_iter().map(measure).collect::<anyhow::Result<_>>()?;
    let figures = Figures { machine: Machine::describe()?, rows };
    if let Some(path) = json {
        let text = serde_json::to_string_pretty(&figures).context("write the figures as JSON")?;
        fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
    }
    print(&figures);
    Ok(())
}

fn measure(namespaces: u32) -> anyhow::Result<Row> {
    let host = Host::new();
    let nova = NovaStandIn::start(host.netns());
    let tag = Uuid::new_v4().to_string();
    let prefix = tag.get(..23).context("a UUID is too short")?;
    let routers: Vec<Netns> = (0..namespaces)
        .map(|number| {
            let netns = Netns::named(&format!("qrouter-{prefix}-{number:012x}"));
            netns.ip("link add qr-00000000-00 type bridge\naddress add 10.0.0.1/24 dev qr-00000000-00");
            netns
        })
        .collect();
    let agent = Agent::on(&host, &nova).only_in(&format!("qrouter-{prefix}-*")).install();
    let before = kernel_kib()?;
    let began = Instant::now();
    let process = agent.spawn(&[]);
    process.ready_within(PATIENCE).map_err(|error| anyhow!("{error}"))?;
    let ready_ms = began.elapsed().as_millis();
    let kernel_growth_kib = kernel_kib()? - before;
    let agent_kib = Memory::of_processes(&process.pids())?.resident_kib;
    let served = &process.state()["namespaces"]["served"];
    ensure!(*served == namespaces, "{served} of {namespaces} namespaces are served");
    let began = Instant::now();
    kill(Pid::from_raw(process.pid().cast_signed()), Signal::SIGTERM).context("stop the agent")?;
    let status = process.wait_exit(PATIENCE);
    ensure!(status.success(), "the agent exited with {status}");
    let stopped_ms = began.elapsed().as_millis();
    drop(routers);
    Ok(Row { namespaces, ready_ms, stopped_ms, agent_kib, kernel_growth_kib })
}

fn kernel_kib() -> anyhow::Result<i64> {
    let meminfo = read("/proc/meminfo")?;
    let figure = |name: &str| -> anyhow::Result<i64> {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name));
        let figure = line.and_then(|rest| rest.split_whitespace().next());
        figure.with_context(|| format!("no {name} in /proc/meminfo"))?.parse().context("a figure")
    };
    KERNEL.iter().map(|name| figure(name)).sum()
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "| namespaces | time to serve | time to stop | agent memory | kernel memory growth |")?;
        writeln!(f, "|---|---|---|---|---|")?;
        for Row { namespaces, ready_ms, stopped_ms, agent_kib, kernel_growth_kib } in &self.rows {
            writeln!(
                f,
                "| {namespaces} | {ready_ms} ms | {stopped_ms} ms | {agent_kib} KiB | {kernel_growth_kib} KiB |"
            )?;
        }
        Ok(())
    }
}
