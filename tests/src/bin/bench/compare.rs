//! Two reports, figure by figure: what changed, and whether that is beyond the noise.
//!
//! A change counts where the ranges of the two reports' repetitions do not touch. Of five repetitions each, chance alone does that
//! to fewer than one figure in a hundred; of three, to one in ten. A figure of a single repetition has no range: nothing is said of it.

use std::fmt;

use super::results::{Figure, Results, Run, Workload};
use super::statistics::Spread;

/// What is compared: the rest explains these, or is the machine's.
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

/// How a figure stands to what it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Better,
    Worse,
    WithinNoise,
    /// Too few repetitions to know the noise.
    Unknown,
}

/// One figure of both.
#[derive(Debug)]
struct Change {
    name: String,
    figure: Figure,
    old: Spread,
    new: Spread,
    verdict: Verdict,
}

/// Everything that both have.
#[derive(Debug)]
pub struct Comparison {
    changes: Vec<Change>,
    /// Failed requests of either.
    failures: Vec<String>,
    same_machine: bool,
    same_plan: bool,
}

impl Comparison {
    pub fn of(old: &Results, new: &Results) -> Self {
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
                let (old, new) = (Spread::of(old), Spread::of(new));
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
    let (old, new) = (Spread::of(old.iter().copied()), Spread::of(new.iter().copied()));
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
            writeln!(f, "The two are of different machines or kernels: what differs may be theirs.\n")?;
        }
        if !self.same_plan {
            writeln!(
                f,
                "The two followed different plans: what is short is less sure, and what is first is colder.\n"
            )?;
        }
        for (title, verdict) in [
            ("Better, beyond the noise", Verdict::Better),
            ("Worse, beyond the noise", Verdict::Worse),
            ("Of one repetition, so nobody knows", Verdict::Unknown),
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

    fn said(old: &[f64], new: &[f64]) -> String {
        Comparison::of(&rates(&[("ours", old)]), &rates(&[("ours", new)])).to_string()
    }

    #[test]
    fn ranges_that_do_not_touch_are_a_change() {
        assert!(said(&[10.0, 11.0, 12.0], &[13.0, 14.0, 15.0]).starts_with("Better, beyond the noise:"));
        assert!(said(&[13.0, 14.0, 15.0], &[10.0, 11.0, 12.0]).starts_with("Worse, beyond the noise:"));
        assert_eq!(said(&[10.0, 11.0, 13.0], &[13.0, 14.0, 15.0]), "1 of 1 figures are within the noise.");
    }

    #[test]
    fn less_is_better_where_more_is_worse() {
        assert_eq!(verdict(Figure::P99Us, &[5.0, 6.0], &[1.0, 2.0]), Verdict::Better);
        assert_eq!(verdict(Figure::P99Us, &[1.0, 2.0], &[5.0, 6.0]), Verdict::Worse);
    }

    #[test]
    fn one_repetition_proves_nothing() {
        assert!(said(&[10.0], &[20.0]).starts_with("Of one repetition"));
    }

    #[test]
    fn failures_other_plans_and_other_machines_are_named() {
        let (old, mut new) = (rates(&[("ours", &[1.0, 1.0])]), rates(&[("ours", &[1.0, 1.0])]));
        new.runs[0].failed = 7;
        new.machine.kernel = "6.18".to_owned();
        new.plan = "shorter".to_owned();
        let said = Comparison::of(&old, &new).to_string();
        assert!(said.contains("different machines") && said.contains("different plans"), "{said}");
        assert!(said.contains("ours: 0 failed, now 7"), "{said}");
    }
}
