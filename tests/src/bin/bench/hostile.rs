//! The effect of an attack on a bystander: its errors and latencies at rest, under the attack, and
//! under the same attack on a server that is not ours.
//!
//! The bench shows facts and does not fail because of them. The scenarios `hostile_*` in
//! `tests/tests/netns` assert that a bystander has no errors.

use std::fmt;
use std::path::Path;
use std::time::Duration;
use std::{fs, iter};

use anyhow::Context as _;
use metadata_tests::hostile::{Attack, Condition, Observation, Position, Scene, name};
use metadata_tests::terminal::print;
use serde::Serialize;

use super::interrupt;
use super::machine::Machine;
use super::statistics::precise;

/// Requests of a bystander under one condition: five seconds.
const REQUESTS: u32 = 100;
/// The factor by which two measurements of the same may differ.
const NOISE: f64 = 1.1;
/// Bytes of a page of memory.
const PAGE: u64 = 4096;

/// The attacks to run.
pub struct Selection {
    pub quick: bool,
    pub repetitions: u32,
    pub attacks: Vec<Attack>,
    pub positions: Vec<Position>,
}

#[derive(Debug, Serialize)]
struct Report {
    machine: Machine,
    runs: Vec<Run>,
}

/// One attack in one position.
#[derive(Debug, Serialize)]
struct Run {
    attack: String,
    position: String,
    quiet: Phase,
    control: Phase,
    attacked: Phase,
    verdict: Verdict,
}

/// A bystander under one condition.
#[derive(Clone, Debug, Default, Serialize)]
struct Phase {
    requests: u64,
    errors: u64,
    /// The number of each kind of error.
    kinds: Vec<(String, u64)>,
    first_error: Option<String>,
    /// Latencies of successful requests; none if all failed.
    p50_ms: Option<f64>,
    p99_ms: Option<f64>,
    /// Memory of the portal's TCP sockets at the end.
    portal_kib: u64,
    /// Growth of the memory of all TCP sockets of the machine.
    tcp_kib: u64,
    /// Connections of the host's namespace in TIME-WAIT at the end.
    time_wait: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    /// No errors, and a p99 within twice its quiet value or, within [`NOISE`], no worse than the
    /// control.
    Fair,
    /// No errors, but a longer p99.
    Slow,
    Errors,
}

/// Runs the attacks, prints the table, and writes a file if one is given.
pub fn run(selection: &Selection, json: Option<&Path>) -> anyhow::Result<()> {
    interrupt::listen()?;
    let mut runs = Vec::new();
    for (attack, position) in selection.cases() {
        for repetition in 1..=selection.repetitions {
            interrupt::check()?;
            let run = measure(attack, position)?;
            print(format_args!("{repetition} of {}: {run}", selection.repetitions));
            runs.push(run);
        }
    }
    let report = Report { machine: Machine::describe()?, runs };
    if let Some(path) = json {
        let text = serde_json::to_string_pretty(&report).context("write the figures as JSON")?;
        fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
    }
    print(format_args!("\n{report}"));
    Ok(())
}

impl Selection {
    /// Returns the attacks with their positions; in a quick run, only the worst position of each.
    fn cases(&self) -> Vec<(Attack, Position)> {
        let chosen = |position: &Position| self.positions.is_empty() || self.positions.contains(position);
        let positions = |attack: Attack| {
            let all = attack.positions().iter().copied().filter(chosen);
            all.take(if self.quick { 1 } else { usize::MAX }).zip(iter::repeat(attack))
        };
        let cases = self.attacks.iter().flat_map(|attack| positions(*attack));
        cases.map(|(position, attack)| (attack, position)).collect()
    }
}

fn measure(attack: Attack, position: Position) -> anyhow::Result<Run> {
    let scene = Scene::new(attack, position);
    let phase = |condition| -> anyhow::Result<Phase> {
        interrupt::check()?;
        Ok(Phase::new(scene.observe(condition, REQUESTS)))
    };
    let quiet = phase(Condition::Quiet)?;
    let control = phase(Condition::Control)?;
    let attacked = phase(Condition::Attacked)?;
    let verdict = Verdict::new(&quiet, &control, &attacked);
    Ok(Run { attack: name(&attack), position: name(&position), quiet, control, attacked, verdict })
}

impl Phase {
    fn new(observation: Observation) -> Self {
        let Observation { tally, portal_memory, tcp_pages, time_wait } = observation;
        let millis = |share| {
            let quantile: Duration = tally.quantile(share);
            (!tally.latencies.is_empty()).then_some(quantile.as_secs_f64() * 1e3)
        };
        Self {
            requests: tally.failed() + tally.latencies.len() as u64,
            errors: tally.failed(),
            kinds: tally.failures.iter().map(|(failure, count)| (failure.to_string(), *count)).collect(),
            p50_ms: millis(0.5),
            p99_ms: millis(0.99),
            first_error: tally.first_failure,
            portal_kib: portal_memory / 1024,
            tcp_kib: tcp_pages * PAGE / 1024,
            time_wait,
        }
    }
}

impl Verdict {
    fn new(quiet: &Phase, control: &Phase, attacked: &Phase) -> Self {
        let (Some(p99), 0) = (attacked.p99_ms, attacked.errors) else { return Self::Errors };
        let at_most = |bound: Option<f64>| bound.is_none_or(|bound| p99 <= bound);
        if at_most(quiet.p99_ms.map(|p99| 2.0 * p99)) || at_most(control.p99_ms.map(|p99| NOISE * p99)) {
            Self::Fair
        } else {
            Self::Slow
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fair => "fair",
            Self::Slow => "SLOW",
            Self::Errors => "ERRORS",
        })
    }
}

/// Formats a row of the table.
impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { attack, position, quiet, control, attacked, verdict } = self;
        let three = |show: &dyn Fn(&Phase) -> String| {
            format!("{} / {} / {}", show(quiet), show(attacked), show(control))
        };
        let time = |millis: Option<f64>| millis.map_or_else(|| "-".to_owned(), |ms| format!("{ms:.1}"));
        write!(
            f,
            "| {attack} | {position} | {} | {} | {} | {:.1} | {} | {verdict} |",
            three(&|phase| phase.errors.to_string()),
            three(&|phase| time(phase.p50_ms)),
            three(&|phase| time(phase.p99_ms)),
            precise(attacked.portal_kib) / 1024.0,
            attacked.time_wait,
        )
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "Of a bystander's {REQUESTS} requests: quiet / attacked / control. Memory is that of the portal's TCP \
             sockets.\n"
        )?;
        writeln!(f, "| attack | position | errors | p50 ms | p99 ms | memory MiB | TIME-WAIT | verdict |")?;
        writeln!(f, "|---|---|---|---|---|---|---|---|")?;
        for run in &self.runs {
            writeln!(f, "{run}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn phase(p99: f64) -> Phase {
        Phase { p99_ms: Some(p99), ..Phase::default() }
    }

    #[test]
    fn a_verdict_compares_with_quiet_and_control() {
        let verdict = |quiet, control, attacked| Verdict::new(&phase(quiet), &phase(control), &attacked);
        assert_eq!(verdict(1.0, 1.0, phase(2.0)), Verdict::Fair);
        assert_eq!(verdict(1.0, 3.0, phase(3.0)), Verdict::Fair);
        assert_eq!(verdict(1.0, 3.0, phase(3.2)), Verdict::Fair, "within the noise");
        assert_eq!(verdict(1.0, 3.0, phase(3.5)), Verdict::Slow);
        assert_eq!(verdict(1.0, 1.0, Phase { errors: 1, ..phase(1.0) }), Verdict::Errors);
        assert_eq!(verdict(1.0, 1.0, Phase::default()), Verdict::Errors, "no request succeeded");
    }

    #[test]
    fn a_quick_run_takes_the_worst_position_of_each_attack() {
        let attacks = vec![Attack::SynFlood, Attack::ClientMap];
        let selection = Selection { quick: true, repetitions: 1, attacks, positions: Vec::new() };
        assert_eq!(
            selection.cases(),
            [(Attack::SynFlood, Position::SameInterface), (Attack::ClientMap, Position::Tap)]
        );
        let selection = Selection { quick: false, positions: vec![Position::Tap], ..selection };
        assert_eq!(
            selection.cases(),
            [(Attack::SynFlood, Position::Tap), (Attack::ClientMap, Position::Tap)]
        );
    }
}
