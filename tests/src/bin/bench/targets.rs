//! The targets of the project, compared with the measurements.

use super::bystander::{WITH, WITHOUT};
use super::results::{Figure, Results, Workload};
use super::statistics::{Spread, precise};

/// A bound on a median.
#[derive(Clone, Copy, Debug)]
pub enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

#[derive(Debug)]
pub struct Target {
    pub what: &'static str,
    pub bound: Bound,
    /// The measurement, or `None` if a peer or a case is absent.
    pub found: Option<Spread>,
}

impl Target {
    pub fn is_reached(&self) -> Option<bool> {
        self.found.map(|found| match self.bound {
            Bound::AtLeast(least) => found.median >= least,
            Bound::AtMost(most) => found.median <= most,
        })
    }
}

const NEW: &str = "64 new, 1 KiB";
const KEPT: &str = "64 keep-alive, 1 KiB";
const THOUSAND: &str = "1000 networks";

/// Returns all targets in their original order.
pub fn targets(results: &Results) -> Vec<Target> {
    use Bound::{AtLeast, AtMost};
    let ratio = |case, peers, figure| results.ratio(Workload::Requests, case, peers, figure);
    let traffic = |figure| results.ratio(Workload::Bystander, "one stream", (WITH, WITHOUT), figure);
    let target = |what, bound, found| Target { what, bound, found };
    vec![
        target(
            "new connections at 64, req/s: ours / haproxy",
            AtLeast(1.05),
            ratio(NEW, ("ours", "haproxy"), Figure::Rate),
        ),
        target(
            "keep-alive at 64, req/s: ours / haproxy",
            AtLeast(1.5),
            ratio(KEPT, ("ours", "haproxy"), Figure::Rate),
        ),
        target(
            "new connections at 64, req/s: ours / legacy as shipped",
            AtLeast(100.0),
            ratio(NEW, ("ours", "legacy"), Figure::Rate),
        ),
        target("wrong or failed responses of ours at 256 connections", AtMost(0.0), failed_at_256(results)),
        target(
            "new connections at 64, req/s: ours with 4,000 ports / with one",
            AtLeast(0.97),
            ratio(NEW, ("ours, 3999 more ports", "ours"), Figure::Rate),
        ),
        target(
            "p50 at 1 new connection: ours / direct",
            AtMost(2.0),
            ratio("1 new, 1 KiB", ("ours", "direct"), Figure::P50Us),
        ),
        target(
            "p99 at 64 new connections: ours / haproxy",
            AtMost(0.8),
            ratio(NEW, ("ours", "haproxy"), Figure::P99Us),
        ),
        target(
            "CPU seconds per 1,000 requests, above direct, at 64 new connections: ours / haproxy",
            AtMost(0.9),
            cpu_above_direct(results),
        ),
        target(
            "boot storm of 200 guests, real Nova, last guest: ours / legacy as shipped",
            AtMost(0.1),
            results.ratio(Workload::BootNova, "200 guests", ("ours", "legacy"), Figure::LastMs),
        ),
        target(
            "RSS with 1,000 networks, MiB, in one process",
            AtMost(40.0),
            results.spread(Workload::Density, THOUSAND, "ours", Figure::ResidentMib),
        ),
        target(
            "processes with 1,000 networks",
            AtMost(1.0),
            results.spread(Workload::Density, THOUSAND, "ours", Figure::Processes),
        ),
        target(
            "interface appears to first byte, median, ms (worst density)",
            AtMost(10.0),
            first_byte(results),
        ),
        target("added to an ordinary packet, ns (worst kind)", AtMost(5.0), tax(results)),
        target("ordinary TCP through the tap: with / without us", AtLeast(0.99), traffic(Figure::TcpMbit)),
        target("ordinary UDP through the tap: with / without us", AtLeast(0.99), traffic(Figure::UdpMbit)),
    ]
}

fn failed_at_256(results: &Results) -> Option<Spread> {
    let of_ours = |run: &&super::results::Run| {
        run.workload == Workload::Requests && run.peer == "ours" && run.case.starts_with("256 ")
    };
    let failed: Vec<f64> = results.runs.iter().filter(of_ours).map(|run| precise(run.failed)).collect();
    // One failure in one run is a failure.
    let worst = failed.iter().copied().reduce(f64::max)?;
    Some(Spread { median: worst, ..Spread::new(failed) })
}

/// The cost of guest and upstream is the same for both and is subtracted.
fn cpu_above_direct(results: &Results) -> Option<Spread> {
    let of = |peer| {
        let runs = results.runs(Workload::Requests, NEW, peer);
        runs.filter_map(|run| run.figures.get(&Figure::MachineCpu).copied()).collect::<Vec<f64>>()
    };
    let (direct, ours, haproxy) = (of("direct"), of("ours"), of("haproxy"));
    let above =
        |peer: &[f64]| -> Vec<f64> { peer.iter().zip(&direct).map(|(peer, direct)| peer - direct).collect() };
    let (ours, haproxy) = (above(&ours), above(&haproxy));
    (!ours.is_empty() && !haproxy.is_empty()).then(|| Spread::of_ratios(ours, haproxy))
}

fn worst(spreads: impl Iterator<Item = Spread>) -> Option<Spread> {
    spreads.max_by(|one, other| one.median.total_cmp(&other.median))
}

fn first_byte(results: &Results) -> Option<Spread> {
    let cases = results.cases(Workload::Density).into_iter();
    worst(cases.filter_map(|case| results.spread(Workload::Density, case, "ours", Figure::FirstByteMs)))
}

fn tax(results: &Results) -> Option<Spread> {
    let ordinary = results.cases(Workload::Tax).into_iter().filter(|packet| !packet.starts_with("metadata"));
    worst(ordinary.filter_map(|packet| results.spread(Workload::Tax, packet, "ours", Figure::AddedNs)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::rates;

    #[test]
    fn a_target_is_reached_missed_or_not_measured() {
        let reached = |rate| {
            let results = rates(&[("ours", &[rate; 3]), ("haproxy", &[100.0; 3])]);
            targets(&results).iter().map(Target::is_reached).collect::<Vec<_>>()
        };
        assert_eq!(reached(105.0)[..2], [Some(true), None]);
        assert_eq!(reached(104.0)[..2], [Some(false), None]);
    }

    #[test]
    fn one_failure_in_one_run_misses() {
        let mut results = rates(&[("ours", &[1.0, 1.0, 1.0])]);
        for run in &mut results.runs {
            run.case = "256 new, 1 KiB".to_owned();
        }
        let found = |results: &Results| failed_at_256(results).map(|spread| spread.median);
        assert_eq!(found(&results), Some(0.0));
        results.runs[1].failed = 1;
        assert_eq!(found(&results), Some(1.0));
    }
}
