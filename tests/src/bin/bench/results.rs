//! All results of one bench, run by run. This is the JSON file, from which tables, plots and
//! comparisons are generated.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use super::machine::Machine;
use super::profile::Hot;
use super::statistics::Spread;

/// The file's name in the folder of a report.
pub const FILE: &str = "results.json";

#[derive(Debug, Serialize, Deserialize)]
pub struct Results {
    pub machine: Machine,
    pub plan: String,
    /// The share of the machine that was busy while the bench was idle.
    pub noise: f64,
    pub absent: Vec<Absent>,
    pub runs: Vec<Run>,
    /// The agent's profile, if requested.
    #[serde(default)]
    pub profile: Vec<Hot>,
}

/// A peer, or a part of one, that is absent, and the reason.
#[derive(Debug, Serialize, Deserialize)]
pub struct Absent {
    pub what: String,
    pub why: String,
}

/// A workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Workload {
    /// Requests of some connections for some time.
    Requests,
    /// Guests that boot at the same moment.
    Boot,
    /// Guests that boot at the same moment, with Nova itself as upstream.
    BootNova,
    /// Idle networks with one port each.
    Density,
    /// Single packets that are not metadata traffic.
    Tax,
    /// Traffic that is not metadata traffic.
    Bystander,
}

/// One measurement of one peer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Run {
    pub workload: Workload,
    pub case: String,
    /// Connections, guests or networks: the position of the case on an axis.
    pub scale: f64,
    pub peer: String,
    /// The number of other ports or instances that the peer knows.
    #[serde(default)]
    pub others: u64,
    pub repetition: u32,
    /// Correct responses, if the workload has any.
    pub answers: u64,
    pub failed: u64,
    pub failures: BTreeMap<String, u64>,
    pub first_failure: Option<String>,
    pub figures: BTreeMap<Figure, f64>,
    /// Shares of the requests with their maximum latency in microseconds.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub distribution: Vec<(f64, f64)>,
}

/// A figure with its meaning and unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Figure {
    /// Correct responses per second.
    Rate,
    P50Us,
    P99Us,
    P999Us,
    LongestUs,
    /// CPU seconds of the whole machine per 1,000 correct responses.
    MachineCpu,
    /// The part of these in the peer's processes.
    PeerCpu,
    /// The share of the machine that is accounted to no participant.
    Others,
    /// The time until the last guest had all responses.
    LastMs,
    MedianMs,
    ResidentMib,
    ProportionalMib,
    Processes,
    StartMs,
    FirstByteMs,
    FirstByteP99Ms,
    ProgramNs,
    AddedNs,
    TcpMbit,
    UdpMbit,
}

impl Figure {
    /// Returns the heading in tables and plots.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Rate => "req/s",
            Self::P50Us => "p50 us",
            Self::P99Us => "p99 us",
            Self::P999Us => "p99.9 us",
            Self::LongestUs => "longest us",
            Self::MachineCpu => "CPU-s/1,000 machine",
            Self::PeerCpu => "CPU-s/1,000 peer",
            Self::Others => "others",
            Self::LastMs => "last guest ms",
            Self::MedianMs => "median guest ms",
            Self::ResidentMib => "RSS MiB",
            Self::ProportionalMib => "PSS MiB",
            Self::Processes => "processes",
            Self::StartMs => "start ms",
            Self::FirstByteMs => "first byte ms",
            Self::FirstByteP99Ms => "first byte p99 ms",
            Self::ProgramNs => "program ns",
            Self::AddedNs => "added ns",
            Self::TcpMbit => "TCP Mbit/s",
            Self::UdpMbit => "UDP Mbit/s",
        }
    }

    /// Returns the number of significant decimal places.
    pub const fn digits(self) -> usize {
        match self {
            Self::MachineCpu | Self::PeerCpu | Self::Others => 3,
            Self::P50Us
            | Self::P99Us
            | Self::P999Us
            | Self::LongestUs
            | Self::LastMs
            | Self::MedianMs
            | Self::ResidentMib
            | Self::ProportionalMib
            | Self::StartMs
            | Self::FirstByteMs
            | Self::FirstByteP99Ms
            | Self::ProgramNs
            | Self::AddedNs => 1,
            Self::Rate | Self::Processes | Self::TcpMbit | Self::UdpMbit => 0,
        }
    }

    /// Returns true if higher values are better.
    pub const fn more_is_better(self) -> bool {
        matches!(self, Self::Rate | Self::TcpMbit | Self::UdpMbit)
    }
}

impl Run {
    /// Creates a run without figures.
    pub fn new(workload: Workload, case: &str, scale: f64, peer: &str, repetition: u32) -> Self {
        Self {
            workload,
            case: case.to_owned(),
            scale,
            peer: peer.to_owned(),
            others: 0,
            repetition,
            answers: 0,
            failed: 0,
            failures: BTreeMap::new(),
            first_failure: None,
            figures: BTreeMap::new(),
            distribution: Vec::new(),
        }
    }

    /// Adds a figure.
    pub fn with(mut self, figure: Figure, value: f64) -> Self {
        self.figures.insert(figure, value);
        self
    }
}

impl Results {
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let path = if path.is_dir() { path.join(FILE) } else { path.to_owned() };
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        serde_json::from_str(&text)
            .with_context(|| format!("{} is not a report of this bench", path.display()))
    }

    /// Returns the runs of one peer in one case.
    pub fn runs<'a>(
        &'a self,
        workload: Workload,
        case: &'a str,
        peer: &'a str,
    ) -> impl Iterator<Item = &'a Run> + 'a {
        let fits = move |run: &&Run| run.workload == workload && run.case == case && run.peer == peer;
        self.runs.iter().filter(fits)
    }

    /// Returns the spread of one of their figures, if measured.
    pub fn spread(&self, workload: Workload, case: &str, peer: &str, figure: Figure) -> Option<Spread> {
        let values: Vec<f64> =
            self.runs(workload, case, peer).filter_map(|run| run.figures.get(&figure).copied()).collect();
        (!values.is_empty()).then(|| Spread::new(values))
    }

    /// Returns a figure of a peer relative to another peer's in the same repetition.
    pub fn ratio(
        &self,
        workload: Workload,
        case: &str,
        (peer, to): (&str, &str),
        figure: Figure,
    ) -> Option<Spread> {
        let of = |peer| {
            let runs = self.runs(workload, case, peer);
            runs.filter_map(|run| run.figures.get(&figure).copied()).collect::<Vec<f64>>()
        };
        let (figures, to) = (of(peer), of(to));
        (!figures.is_empty() && !to.is_empty()).then(|| Spread::of_ratios(figures, to))
    }

    /// Returns the cases of a workload in the order of measurement.
    pub fn cases(&self, workload: Workload) -> Vec<&str> {
        in_order(self.runs.iter().filter(|run| run.workload == workload).map(|run| run.case.as_str()))
    }

    /// Returns the peers of a workload in the order of measurement.
    pub fn peers(&self, workload: Workload) -> Vec<&str> {
        in_order(self.runs.iter().filter(|run| run.workload == workload).map(|run| run.peer.as_str()))
    }
}

fn in_order<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    names.fold(Vec::new(), |mut seen, name| {
        if !seen.contains(&name) {
            seen.push(name);
        }
        seen
    })
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// Returns results with rates of peers in one case.
    pub fn rates(of: &[(&str, &[f64])]) -> Results {
        let run = |peer: &str, repetition: usize, rate: f64| {
            let repetition = u32::try_from(repetition).expect("few");
            Run::new(Workload::Requests, "64 new, 1 KiB", 64.0, peer, repetition).with(Figure::Rate, rate)
        };
        let runs = of.iter().flat_map(|(peer, rates)| {
            rates.iter().enumerate().map(move |(repetition, rate)| run(peer, repetition, *rate))
        });
        Results {
            machine: Machine {
                processor: "a <fast> one".to_owned(),
                cores: 2,
                kernel: "6.1".to_owned(),
                memory_mib: 1024,
                bpf_jit: true,
                versions: vec!["nginx/1".to_owned()],
            },
            plan: "a test".to_owned(),
            noise: 0.01,
            absent: Vec::new(),
            runs: runs.collect(),
            profile: Vec::new(),
        }
    }

    #[test]
    fn a_ratio_compares_the_same_repetition() {
        let results = rates(&[("ours", &[1.0, 2.0, 9.0]), ("haproxy", &[2.0, 4.0, 10.0])]);
        let ratio = results.ratio(Workload::Requests, "64 new, 1 KiB", ("ours", "haproxy"), Figure::Rate);
        assert_eq!(ratio, Some(Spread { lowest: 0.5, median: 0.5, highest: 0.9 }));
        assert_eq!(results.ratio(Workload::Boot, "", ("ours", "haproxy"), Figure::Rate), None);
    }

    #[test]
    fn results_survive_a_round_trip() {
        let results = rates(&[("ours", &[1.5])]);
        let text = serde_json::to_string(&results).expect("JSON");
        let back: Results = serde_json::from_str(&text).expect("the same");
        assert_eq!(serde_json::to_string(&back).expect("JSON"), text);
    }

    #[test]
    fn cases_and_peers_keep_their_order() {
        let results = rates(&[("ours", &[1.0, 1.0]), ("direct", &[2.0])]);
        assert_eq!(results.peers(Workload::Requests), ["ours", "direct"]);
        assert_eq!(results.cases(Workload::Requests), ["64 new, 1 KiB"]);
    }
}
