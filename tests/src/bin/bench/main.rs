//! The cost of the paths to the metadata service, measured side by side on one machine in one run.
//!
//! Everything runs on this machine, in namespaces that are removed afterwards. Figures can be
//! compared with each other, but not with those of another machine.

mod boot;
mod bystander;
mod compare;
mod cpu;
mod density;
mod drawing;
mod hook;
mod hostile;
mod interrupt;
mod inventory;
mod machine;
mod namespaces;
mod page;
mod peers;
mod picture;
mod plan;
mod plots;
mod profile;
mod requests;
mod results;
mod statistics;
mod tables;
mod targets;
mod tax;
mod upstream;

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use clap::{Args, Parser, Subcommand, ValueEnum as _};
use metadata_tests::hostile::{Attack, Position};
use metadata_tests::terminal::print;

use compare::Comparison;
use cpu::CpuMeter;
use hostile::Selection;
use machine::Machine;
use peers::{Choice, Crowd, Kind, Ours};
use picture::Painter;
use plan::Plan;
use results::{Absent, Results};
use upstream::{Upstream, UpstreamServer};

/// The time for which the idle machine is observed first.
const STILLNESS: Duration = Duration::from_secs(1);

/// Measures our metadata path and others, and writes a report
#[derive(Parser)]
#[command(name = "bench", bin_name = "cargo xtask bench", args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    options: Options,
}

#[derive(Subcommand)]
enum Command {
    /// Show the changes from one report to another, and which of them are beyond the noise
    Compare {
        /// Folder or results.json of the earlier report
        old: PathBuf,
        /// Folder or results.json of the later report
        new: PathBuf,
    },
    /// Write a report again from the results of an earlier run
    Report {
        /// Folder or results.json of that report
        results: PathBuf,
        /// Folder of the report
        #[arg(long, value_name = "DIR", default_value = "target/bench")]
        out: PathBuf,
    },
    /// Cost of TC and XDP for a packet that is not metadata traffic, on tap and veth
    Hook {
        /// Number of repetitions of each measurement
        #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
        repetitions: u32,
    },
    /// Time until an agent serves 1, 100 and 1,000 namespaces, and the cost of each
    Namespaces {
        /// Measure only this number of namespaces
        #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
        count: Option<u32>,
        /// Write all single figures to this file
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// Effect of a guest's attacks on a bystander; about 15 minutes
    Hostile {
        /// Only the worst position of each attack: about five minutes
        #[arg(long)]
        quick: bool,
        /// Number of repetitions of each attack
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
        repetitions: u32,
        /// Attacks, separated by commas; default: all
        #[arg(long = "attack", value_name = "ATTACKS", value_delimiter = ',')]
        attacks: Vec<Attack>,
        /// Positions of the bystander, separated by commas; default: all
        #[arg(long = "position", value_name = "POSITIONS", value_delimiter = ',')]
        positions: Vec<Position>,
        /// Write all single figures to this file
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// Cost of 10,000 ports in the inventory; takes some seconds
    Inventory {
        /// Write all single figures to this file
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
}

#[derive(Args)]
struct Options {
    /// Measure less and for a shorter time: about three minutes instead of twenty-five
    #[arg(long)]
    quick: bool,
    /// Run everything for a moment, to test the bench itself
    #[arg(long, hide = true, conflicts_with = "quick")]
    rehearse: bool,
    /// Peers: direct, haproxy, host-haproxy, ours, neutron-agent, ovn, ovn-current,
    /// ovn-current-workers, legacy, legacy-workers, legacy-router, legacy-cache, separated by
    /// commas, or all
    #[arg(long, value_name = "PEERS")]
    peers: Option<Choice>,
    /// Number of repetitions of each measurement
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    repetitions: Option<u32>,
    /// Duration of each load in milliseconds
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    millis: Option<u64>,
    /// Also record where the agent's time goes, and draw flame graphs; needs perf
    #[arg(long)]
    profile: bool,
    /// Folder of the report
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    out: PathBuf,
}

impl Options {
    fn plan(&self) -> Plan {
        let mut plan = match (self.quick, self.rehearse) {
            (true, _) => Plan::quick(),
            (_, true) => Plan::rehearsal(),
            (false, false) => Plan::full(),
        };
        plan.repetitions = self.repetitions.unwrap_or(plan.repetitions);
        plan.duration = self.millis.map_or(plan.duration, Duration::from_millis);
        plan
    }
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    match cli.command {
        Some(Command::Compare { old, new }) => {
            print(Comparison::new(&Results::read(&old)?, &Results::read(&new)?));
            Ok(())
        }
        Some(Command::Report { results, out }) => write_report(&out, Results::read(&results)?),
        Some(Command::Hook { repetitions }) => {
            require_root()?;
            print(hook::measure(repetitions)?);
            Ok(())
        }
        Some(Command::Namespaces { count, json }) => {
            require_root()?;
            namespaces::run(count, json.as_deref())
        }
        Some(Command::Hostile { quick, repetitions, attacks, positions, json }) => {
            require_root()?;
            let all = || Attack::value_variants().to_vec();
            let attacks = if attacks.is_empty() { all() } else { attacks };
            let selection = Selection { quick, repetitions, attacks, positions };
            hostile::run(&selection, json.as_deref())
        }
        Some(Command::Inventory { json }) => count_ports(json.as_deref()),
        None => measure(&cli.options),
    }
}

fn require_root() -> anyhow::Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "the bench creates network namespaces and loads BPF programs: run it as root"
    );
    Ok(())
}

fn count_ports(json: Option<&Path>) -> anyhow::Result<()> {
    let figures = inventory::measure()?;
    if let Some(path) = json {
        let text = serde_json::to_string_pretty(&figures).context("write the figures as JSON")?;
        fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
    }
    print(&figures);
    Ok(())
}

fn measure(options: &Options) -> anyhow::Result<()> {
    require_root()?;
    interrupt::listen()?;
    let plan = options.plan();
    let began = Instant::now();
    let step = |what: &str| print(format_args!("{:>5} s  {what}", began.elapsed().as_secs()));
    let (kinds, absent) = present(options.peers.as_ref().map_or(&Kind::DEFAULT, |choice| &choice.0));
    let mut results = Results {
        machine: Machine::describe()?,
        plan: plan.to_string(),
        noise: noise()?,
        absent,
        runs: Vec::new(),
        profile: Vec::new(),
    };

    let with_openstack = kinds.iter().any(|kind| kind.needs_openstack());
    if with_openstack {
        step("OpenStack");
    }
    let upstream = Upstream::start(with_openstack)?;
    step("requests");
    results.runs.extend(requests::measure(&upstream, &kinds, &plan)?);
    step("boot");
    results.runs.extend(boot::measure(&upstream, &kinds, &plan)?);
    if with_openstack {
        step("boot, real Nova");
        upstream.select(UpstreamServer::Nova);
        let identified: Vec<_> = kinds.iter().copied().filter(|kind| kind.identifies()).collect();
        results.runs.extend(boot::measure(&upstream, &identified, &plan)?);
        upstream.select(UpstreamServer::Nginx);
    }
    step("density");
    results.runs.extend(density::measure(&upstream, &kinds, &plan, &mut results.absent)?);
    if kinds.contains(&Kind::Ours) {
        step("ordinary traffic");
        let ours = Ours::start(&upstream, Crowd::ONE, 0)?;
        results.runs.extend(bystander::measure(&ours, &plan)?);
        results.runs.extend(tax::measure(&ours, plan.repetitions)?);
    }
    if options.profile {
        step("profile");
        add_profile(&mut results, &upstream, &options.out)?;
    }
    step("report");
    write_report(&options.out, results)
}

/// Splits the peers into available and absent ones.
fn present(chosen: &[Kind]) -> (Vec<Kind>, Vec<Absent>) {
    let (present, lacking): (Vec<Kind>, Vec<Kind>) = chosen.iter().partition(|kind| kind.missing().is_none());
    let absent = |kind: Kind| Some(Absent { what: kind.to_string(), why: kind.missing()? });
    (present, lacking.into_iter().filter_map(absent).collect())
}

/// Returns the share of the machine that other programs use.
fn noise() -> anyhow::Result<f64> {
    let meter = CpuMeter::start(Vec::new(), Vec::new())?;
    let end = Instant::now() + STILLNESS;
    while let Some(left) = end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
        thread::park_timeout(left);
    }
    Ok(meter.stop()?.others)
}

fn add_profile(results: &mut Results, upstream: &Upstream, folder: &Path) -> anyhow::Result<()> {
    let absent = |why: String| Absent { what: "profile".to_owned(), why };
    if let Some(why) = profile::missing() {
        results.absent.push(absent(why.to_owned()));
        return Ok(());
    }
    let ours = Ours::start(upstream, Crowd::ONE, 0)?;
    match profile::record(&ours, folder) {
        Ok(hot) => results.profile = hot,
        Err(error) => results.absent.push(absent(format!("{error:#}"))),
    }
    Ok(())
}

fn write_report(folder: &Path, mut results: Results) -> anyhow::Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    let plots = plots::plots(&results)?;
    let mut written = ["report.html", "report.md", results::FILE].map(str::to_owned).to_vec();
    match Painter::new() {
        Ok(painter) => {
            for plot in &plots {
                let name = format!("{}.png", plot.name);
                write(folder, &name, painter.png(&plot.svg)?)?;
                written.push(name);
            }
        }
        Err(error) => {
            results.absent.push(Absent { what: "PNG plots".to_owned(), why: format!("{error:#}") });
        }
    }
    let (tables, preamble) = (tables::tables(&results), tables::preamble(&results));
    let mut markdown = format!("# Metadata path: benchmark\n\n{}\n", preamble.join("\n\n"));
    for table in &tables {
        markdown.push('\n');
        markdown.push_str(&table.to_markdown());
    }
    let json = serde_json::to_string(&results).context("write the results as JSON")?;
    write(folder, results::FILE, json)?;
    write(folder, "report.md", &markdown)?;
    write(folder, "report.html", page::page(&preamble, &plots, &tables))?;
    print(format_args!("\n{markdown}\nWritten to {}: {}.", folder.display(), written.join(", ")));
    Ok(())
}

fn write(folder: &Path, name: &str, bytes: impl AsRef<[u8]>) -> anyhow::Result<()> {
    let path = folder.join(name);
    fs::write(&path, bytes).with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
