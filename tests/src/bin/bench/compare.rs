//! Compares two reports figure by figure and shows which changes are beyond the noise.
//!
//! A change counts if the ranges of both reports' repetitions do not overlap. With five repetitions
//! each, this happens by chance to fewer than one figure in a hundred; with three, to one in ten. A
//! figure with a single repetition has no range and is not judged.

use std::fmt;

use super::results::{Figure, Results, Run, Workload};
use super::statistics::Spread;

/// The compared figures. The others explain these, or belong to the machine.
const FIGURES: [Figure; 15] = [
    Figure::Rate,
    Figure::P50Us,
    Figure::P99Us,
    Figure::P999Us,
    Figure::MachineCpu,
    Figure::PeerCpu,
    Figure::LastMs,
    Figure::MedianMs,
    Figure::ResidentMib,
    Figure::StartMs,
    Figure::FirstByteMs,
    Figure::ProgramNs,
    Figure::AddedNs,
    Figure::TcpMbit,
    Figure::UdpMbit,
];
const WORKLOADS: [Workload; 6] = [
    Workload::Requests,
    Workload::Boot,
    Workload::BootNova,
    Workload::Density,
    Workload::Tax,
    Workload::Bystander,
];

/// The change of a figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Better,
    Worse,
    WithinNoise,
    /// Too few repetitions to know the noise.
    Unknown,
}

/// A figure of both reports.
#[derive(Debug)]
struct Change {
    name: String,
    figure: Figure,
    old: Spread,
    new: Spread,
    verdict: Verdict,
}

/// All figures that both reports have.
#[derive(Debug)]
pub struct Comparison {
    changes: Vec<Change>,
    /// Failed requests of either report.
    failures: Vec<String>,
    same_machine: bool,
    same_plan: bool,
}

impl Comparison {
    pub fn new(old: &Results, new: &Results) -> Self {
        let mut comparison = Self {
            changes: Vec::new(),
            failures: Vec::new(),
            same_machine: old.machine.is_same_as(&new.machine),
            same_plan: old.plan == new.plan,
        };
        for workload in WORKLOADS {
            for case in new.cases(workload) {
                for peer in new.peers(workload) {
                    let of = |results: &Results| -> Vec<Run> {
                        results.runs(workload, case, peer).cloned().collect()
                    };
                    comparison.add(&format!("{case}: {peer}"), &of(old), &of(new));
                }
            }
        }
        comparison
    }

    fn add(&mut self, name: &str, old: &[Run], new: &[Run]) {
        if old.is_empty() || new.is_empty() {
            return;
        }
        for figure in FIGURES {
            let of = |runs: &[Run]| -> Vec<f64> {
                runs.iter().filter_map(|run| run.figures.get(&figure).copied()).collect()
            };
            let (old, new) = (of(old), of(new));
            if !old.is_empty() && !new.is_empty() {
                let verdict = verdict(figure, &old, &new);
                let (old, new) = (Spread::new(old), Spread::new(new));
                self.changes.push(Change { name: name.to_owned(), figure, old, new, verdict });
            }
        }
        let failed = |runs: &[Run]| runs.iter().map(|run| run.failed).sum::<u64>();
        if failed(old) + failed(new) > 0 {
            self.failures.push(format!("{name}: {} failed, now {}", failed(old), failed(new)));
        }
    }
}

fn verdict(figure: Figure, old: &[f64], new: &[f64]) -> Verdict {
    if old.len() < 2 || new.len() < 2 {
        return Verdict::Unknown;
    }
    let (old, new) = (Spread::new(old.iter().copied()), Spread::new(new.iter().copied()));
    if new.lowest > old.highest {
        if figure.more_is_better() { Verdict::Better } else { Verdict::Worse }
    } else if new.highest < old.lowest {
        if figure.more_is_better() { Verdict::Worse } else { Verdict::Better }
    } else {
        Verdict::WithinNoise
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.same_machine {
            writeln!(
                f,
                "The reports are from different machines or kernels, which may cause the differences.\n"
            )?;
        }
        if !self.same_plan {
            writeln!(
                f,
                "The reports followed different plans: short measurements are less certain, and the first ones start cold.\n"
            )?;
        }
        for (title, verdict) in [
            ("Better, beyond the noise", Verdict::Better),
            ("Worse, beyond the noise", Verdict::Worse),
            ("Single repetition, so the noise is unknown", Verdict::Unknown),
        ] {
            let changes: Vec<_> = self.changes.iter().filter(|change| change.verdict == verdict).collect();
            if !changes.is_empty() {
                writeln!(f, "{title}:")?;
                changes.iter().try_for_each(|change| writeln!(f, "  {change}"))?;
                writeln!(f)?;
            }
        }
        for failure in &self.failures {
            writeln!(f, "Failures: {failure}")?;
        }
        let quiet = self.changes.iter().filter(|change| change.verdict == Verdict::WithinNoise).count();
        write!(f, "{quiet} of {} figures are within the noise.", self.changes.len())
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (digits, change) = (self.figure.digits(), 100.0 * (self.new.median / self.old.median - 1.0));
        let (name, label) = (&self.name, self.figure.label());
        write!(f, "{name}: {label} {:.digits$} -> {:.digits$} ({change:+.1} %)", self.old, self.new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::rates;

    fn comparison_of(old: &[f64], new: &[f64]) -> String {
        Comparison::new(&rates(&[("ours", old)]), &rates(&[("ours", new)])).to_string()
    }

    #[test]
    fn ranges_that_do_not_touch_are_a_change() {
        assert!(
            comparison_of(&[10.0, 11.0, 12.0], &[13.0, 14.0, 15.0]).starts_with("Better, beyond the noise:")
        );
        assert!(
            comparison_of(&[13.0, 14.0, 15.0], &[10.0, 11.0, 12.0]).starts_with("Worse, beyond the noise:")
        );
        assert_eq!(
            comparison_of(&[10.0, 11.0, 13.0], &[13.0, 14.0, 15.0]),
            "1 of 1 figures are within the noise."
        );
    }

    #[test]
    fn lower_is_better_for_costs() {
        assert_eq!(verdict(Figure::P99Us, &[5.0, 6.0], &[1.0, 2.0]), Verdict::Better);
        assert_eq!(verdict(Figure::P99Us, &[1.0, 2.0], &[5.0, 6.0]), Verdict::Worse);
    }

    #[test]
    fn one_repetition_proves_nothing() {
        assert!(comparison_of(&[10.0], &[20.0]).starts_with("Single repetition"));
    }

    #[test]
    fn failures_and_differing_plans_and_machines_are_reported() {
        let (old, mut new) = (rates(&[("ours", &[1.0, 1.0])]), rates(&[("ours", &[1.0, 1.0])]));
        new.runs[0].failed = 7;
        new.machine.kernel = "6.18".to_owned();
        new.plan = "shorter".to_owned();
        let text = Comparison::new(&old, &new).to_string();
        assert!(text.contains("different machines") && text.contains("different plans"), "{text}");
        assert!(text.contains("ours: 0 failed, now 7"), "{text}");
    }
}
