//! Workload: requests of one guest, at the maximum rate. Peers take turns within each repetition,
//! so that disturbances of the machine affect all of them.

use std::time::Duration;

use metadata_tests::load::{Load, Style, Tally};

use super::cpu::{CpuMeter, CpuUse};
use super::interrupt;
use super::peers::{Crowd, Entry, Kind, Peer};
use super::plan::Plan;
use super::results::{Figure, Run, Workload};
use super::statistics::precise;
use super::upstream::{self, SIZES, STORE, STORED, Upstream};

/// Uncounted load before the first counted one.
const WARM_UP: Duration = Duration::from_millis(200);
/// The kept quantiles of a distribution.
const SHARES: [f64; 14] =
    [0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9999, 1.0];

/// A kind of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    pub connections: usize,
    pub keep_alive: bool,
    pub ask: Ask,
}

/// The request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Gets a body of this size.
    Get(usize),
    /// Posts a body of this size.
    Post(usize),
}

impl Case {
    pub const fn get(connections: usize, keep_alive: bool) -> Self {
        let [small, ..] = SIZES;
        Self { connections, keep_alive, ask: Ask::Get(small) }
    }

    pub fn label(self) -> String {
        let connections =
            format!("{} {}", self.connections, if self.keep_alive { "keep-alive" } else { "new" });
        match self.ask {
            Ask::Get(size) => format!("{connections}, {}", bytes(size)),
            Ask::Post(size) => format!("{connections}, POST {}", bytes(size)),
        }
    }

    /// Returns true if peers that differ only in scale take part.
    fn is_for_scale(self) -> bool {
        self.connections == 64 && self.ask == Ask::Get(SIZES[0])
    }

    /// Runs the load.
    pub fn load(self, peer: &dyn Peer, duration: Duration) -> Tally {
        let caller = peer.callers()[0];
        let (path, post, body) = match self.ask {
            Ask::Get(size) => (format!("/{size}"), None, upstream::body(size)),
            Ask::Post(size) => (STORE.to_owned(), Some(upstream::body(size)), STORED.to_vec()),
        };
        let load = Load {
            target: caller.target,
            path,
            post,
            body,
            connections: self.connections,
            style: if self.keep_alive { Style::KeepAlive } else { Style::NewConnection },
            duration,
        };
        load.run(caller.netns)
    }
}

fn bytes(size: usize) -> String {
    if size >= 1 << 20 { format!("{} MiB", size >> 20) } else { format!("{} KiB", size >> 10) }
}

/// Returns the peers: one of each kind, and the variants with more load.
fn entries(kinds: &[Kind], plan: &Plan) -> Vec<Entry> {
    let with = |kind: Kind, others: &[usize]| {
        let scaled = others.iter().map(move |others| Entry { kind, others: *others });
        scaled.collect::<Vec<_>>()
    };
    let of = |kind: &Kind| match kind {
        Kind::HostHaproxy => with(*kind, &plan.instances),
        Kind::Ours => [vec![Entry::alone(*kind)], with(*kind, &plan.known_ports)].concat(),
        Kind::Direct
        | Kind::Haproxy
        | Kind::NeutronAgent
        | Kind::Ovn
        | Kind::OvnCurrent
        | Kind::OvnCurrentWorkers
        | Kind::Legacy
        | Kind::LegacyWorkers
        | Kind::LegacyRouter
        | Kind::LegacyCache => vec![Entry::alone(*kind)],
    };
    kinds.iter().flat_map(of).collect()
}

/// Measures all cases.
pub fn measure(upstream: &Upstream, kinds: &[Kind], plan: &Plan) -> anyhow::Result<Vec<Run>> {
    let mut peers: Vec<(Entry, Box<dyn Peer>)> = Vec::new();
    for entry in entries(kinds, plan) {
        interrupt::check()?;
        peers.push((entry, entry.start(upstream, Crowd::ONE)?));
    }
    let mut runs = Vec::new();
    for case in &plan.cases {
        let first = |kind: Kind| peers.iter().find(|(entry, _)| entry.kind == kind).map(|(entry, _)| *entry);
        let takes_part = |entry: &Entry| case.is_for_scale() || first(entry.kind) == Some(*entry);
        let taking_part: Vec<_> = peers.iter().filter(|(entry, _)| takes_part(entry)).collect();
        for (_, peer) in &taking_part {
            drop(case.load(&**peer, WARM_UP.min(plan.duration)));
        }
        for repetition in 0..plan.repetitions {
            for (entry, peer) in &taking_part {
                interrupt::check()?;
                let duration = if entry.kind.needs_openstack() {
                    plan.duration.max(plan.slow_duration)
                } else {
                    plan.duration
                };
                let meter = CpuMeter::start(peer.processes(), upstream.processes())?;
                let tally = case.load(&**peer, duration);
                let cpu = meter.stop()?;
                let run = run(*case, &entry.to_string(), repetition, duration, tally, cpu);
                runs.push(Run { others: entry.others as u64, ..run });
            }
        }
    }
    Ok(runs)
}

fn run(case: Case, peer: &str, repetition: u32, duration: Duration, tally: Tally, cpu: CpuUse) -> Run {
    let us = |share| tally.quantile(share).as_secs_f64() * 1e6;
    let thousands = precise(tally.latencies.len() as u64) / 1000.0;
    let connections = precise(case.connections as u64);
    let mut run = Run::new(Workload::Requests, &case.label(), connections, peer, repetition)
        .with(Figure::Rate, tally.rate(duration))
        .with(Figure::Others, cpu.others);
    // Without responses there are no latencies and no quantiles.
    if !tally.latencies.is_empty() {
        run = run
            .with(Figure::P50Us, us(0.5))
            .with(Figure::P99Us, us(0.99))
            .with(Figure::P999Us, us(0.999))
            .with(Figure::LongestUs, us(1.0))
            .with(Figure::MachineCpu, cpu.machine / thousands)
            .with(Figure::PeerCpu, cpu.peer / thousands);
        run.distribution = SHARES.map(|share| (share, us(share))).to_vec();
    }
    run.answers = tally.latencies.len() as u64;
    run.failed = tally.failed();
    run.failures = tally.failures.iter().map(|(failure, count)| (failure.to_string(), *count)).collect();
    run.first_failure = tally.first_failure;
    run
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_case_is_measured_at_every_scale() {
        assert!(Case::get(64, false).is_for_scale());
        assert!(!Case::get(1, false).is_for_scale());
        assert!(!Case { ask: Ask::Post(1024), ..Case::get(64, true) }.is_for_scale());
    }

    #[test]
    fn a_case_is_named_by_all_its_parameters() {
        assert_eq!(Case::get(8, true).label(), "8 keep-alive, 1 KiB");
        let big = Case { ask: Ask::Get(1 << 20), ..Case::get(64, false) };
        assert_eq!(big.label(), "64 new, 1 MiB");
        assert_eq!(Case { ask: Ask::Post(1024), ..big }.label(), "64 new, POST 1 KiB");
    }
}
