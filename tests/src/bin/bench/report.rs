//! All figures: as JSON run by run, as a table their medians.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use super::arena::AgentFootprint;
use super::http::{ANSWER, KINDS, Kind, Run, Way};
use super::machine::Machine;
use super::statistics::{Spread, precise};
use super::tax::Cost;

/// Requests per second with a connection each, as a share of the straight way's.
const LEAST_RATE: f64 = 0.4;
/// The median latency at one connection, as a multiple of the straight way's.
const GREATEST_P50: f64 = 2.5;
/// Percent of the machine. Above it, figures tell more of what else ran.
const MUCH_FOR_OTHERS: f64 = 10.0;

/// What one bench has found out.
#[derive(Debug, Serialize)]
pub struct Report {
    pub machine: Machine,
    pub repetitions: u32,
    pub duration: Duration,
    pub http: Vec<Run>,
    pub agent: AgentFootprint,
    pub tax: Vec<Cost>,
}

/// The runs of one kind.
struct Pair<'a> {
    kind: Kind,
    agent: Vec<&'a Run>,
    straight: Vec<&'a Run>,
}

impl Pair<'_> {
    fn ratio(&self, figure: impl Fn(&Run) -> f64 + Copy) -> Spread {
        Spread::of_ratios(figures(&self.agent, figure), figures(&self.straight, figure))
    }
}

fn figures<'a>(runs: &'a [&Run], figure: impl Fn(&Run) -> f64 + 'a) -> impl Iterator<Item = f64> + 'a {
    runs.iter().map(move |run| figure(run))
}

fn median(runs: &[&Run], figure: impl Fn(&Run) -> f64) -> f64 {
    Spread::of(figures(runs, figure)).median
}

impl Report {
    fn pair(&self, kind: Kind) -> Pair<'_> {
        let of = |way| self.http.iter().filter(|run| run.kind == kind && run.way == way).collect();
        Pair { kind, agent: of(Way::Agent), straight: of(Way::Straight) }
    }

    fn write_http(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "One guest asks for {ANSWER} bytes: through datapath and agent, and the same stand-in for Nova straight over a\n\
             bare veth. Right answers alone count. The SYN rate limit is off (syn_rate_limit = 0). Ratios are of\n\
             neighbouring runs: median (lowest..highest). CPU is what guest and agent take of one core.\n"
        )?;
        writeln!(
            f,
            "{:<24}{:<10}{:>9}{:>10}{:>10}{:>9}{:>9}{:>9}   {:<20}p50 ratio",
            "connections", "way", "req/s", "p50 us", "p99 us", "failed", "guest %", "agent %", "req/s ratio"
        )?;
        for kind in KINDS {
            let pair = self.pair(kind);
            self.write_runs(f, &kind.to_string(), "agent", &pair.agent)?;
            let (rate, p50) = (pair.ratio(|run| run.rate), pair.ratio(|run| run.p50_us));
            writeln!(f, "   {:<20}{p50:.2}", format!("{rate:.2}"))?;
            self.write_runs(f, "", "straight", &pair.straight)?;
            writeln!(f)?;
        }
        Ok(())
    }

    fn write_runs(&self, f: &mut fmt::Formatter<'_>, label: &str, way: &str, runs: &[&Run]) -> fmt::Result {
        let failed: u64 = runs.iter().map(|run| run.failed).sum();
        let share = |us: f64| 100.0 * us / 1e6 / self.duration.as_secs_f64();
        write!(
            f,
            "{label:<24}{way:<10}{:>9.0}{:>10.1}{:>10.1}{:>8.3}%{:>9.0}{:>9.0}",
            median(runs, |run| run.rate),
            median(runs, |run| run.p50_us),
            median(runs, |run| run.p99_us),
            100.0 * precise(failed)
                / runs.iter().map(|run| precise(run.answers + run.failed)).sum::<f64>().max(1.0),
            share(median(runs, |run| precise(run.generator_cpu_us))),
            share(median(runs, |run| precise(run.agent_cpu_us))),
        )
    }

    fn write_disturbance(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let others = Spread::of(self.http.iter().map(|run| 100.0 * run.others));
        write!(f, "Others took {others:.0} % of the machine meanwhile")?;
        let is_quiet = others.median < MUCH_FOR_OTHERS;
        writeln!(f, "{}\n", if is_quiet { "." } else { ": these figures are of a disturbed machine." })
    }

    fn write_targets(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for kind in KINDS {
            let pair = self.pair(kind);
            if !kind.keep_alive {
                let ratio = pair.ratio(|run| run.rate).median;
                let reached = if ratio >= LEAST_RATE { "reached" } else { "MISSED" };
                writeln!(
                    f,
                    "{reached:<9}{}: {ratio:.2} of the straight requests/s, at least {LEAST_RATE}",
                    pair.kind
                )?;
            }
            if kind.connections == 1 {
                let ratio = pair.ratio(|run| run.p50_us).median;
                let reached = if ratio <= GREATEST_P50 { "reached" } else { "MISSED" };
                writeln!(
                    f,
                    "{reached:<9}{}: {ratio:.2} of the straight p50, at most {GREATEST_P50}",
                    pair.kind
                )?;
            }
        }
        Ok(())
    }

    fn write_tax(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "Nanoseconds of md_from_guest for a packet (BPF_PROG_TEST_RUN): by itself, the empty program, and what is\n\
             added to the empty one: median (lowest..highest). Metadata packets are timed one by one.\n"
        )?;
        writeln!(f, "{:<38}{:>9}{:>9}   added", "packet", "ns", "empty")?;
        for cost in &self.tax {
            let (program, empty) =
                (Spread::of(cost.program_ns.iter().copied()), Spread::of(cost.empty_ns.iter().copied()));
            writeln!(
                f,
                "{:<38}{:>9.1}{:>9.1}   {:.1}",
                cost.packet,
                program.median,
                empty.median,
                cost.added()
            )?;
        }
        Ok(())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Machine { processor, cores, kernel, memory_mib, bpf_jit } = &self.machine;
        writeln!(
            f,
            "{processor}, {cores} cores, {memory_mib} MiB; Linux {kernel}, BPF JIT {}.\n\
             {} repetitions of {:?} each way in turn; medians.\n",
            if *bpf_jit { "on" } else { "off" },
            self.repetitions,
            self.duration,
        )?;
        self.write_http(f)?;
        self.write_disturbance(f)?;
        self.write_targets(f)?;
        writeln!(f)?;
        self.write_tax(f)?;
        let AgentFootprint { resident_kib, peak_resident_kib, threads } = self.agent;
        write!(
            f,
            "\nThe agent after this: {resident_kib} KiB resident (peak {peak_resident_kib}), {threads} threads."
        )
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let use_of = if self.keep_alive { "keep-alive" } else { "new each time" };
        write!(f, "{} {use_of}", self.connections)
    }
}
