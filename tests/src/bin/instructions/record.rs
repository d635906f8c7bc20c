//! The figures in the tree and their comparison with new ones.
//!
//! Another compiler generates other code. With it a figure may be higher by more, and a figure
//! between both bounds is reported without a failure. Allocations depend only on the code, so not
//! one more is accepted. Another processor has other instructions and is not compared.

use std::collections::{BTreeMap, BTreeSet};
use std::env::consts::ARCH;
use std::fmt;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, ensure};
use serde::{Deserialize, Serialize};

/// The path from the package's folder.
pub const FILE: &str = "tests/instructions.json";

/// The accepted increase in percent.
const TOLERANCE: u64 = 5;
const TOLERANCE_OF_ANOTHER_COMPILER: u64 = 15;
/// An increase that is always accepted: a few instructions on the shortest paths.
const FEW: u64 = 4;

/// The figures of one round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Figures {
    pub instructions: u64,
    pub allocations: u64,
}

/// All figures, with their compiler and processor.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub compiler: String,
    pub processor: String,
    pub figures: BTreeMap<String, Figures>,
}

impl Default for Record {
    fn default() -> Self {
        Self { compiler: String::new(), processor: ARCH.to_owned(), figures: BTreeMap::new() }
    }
}

/// The result of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    AsRecorded,
    Fewer,
    /// Too many for the recorded compiler, accepted for another one.
    Suspicious,
    TooMany,
    /// Only in the record, or only among the measured subjects.
    Unmatched,
    /// From another processor.
    NotComparable,
}

/// The record and the new figures.
#[derive(Debug)]
pub struct Comparison {
    compiler: Option<String>,
    lines: Vec<(String, Option<Figures>, Option<Figures>, Verdict)>,
}

impl Record {
    pub fn read() -> anyhow::Result<Self> {
        let text = fs::read_to_string(path()).with_context(|| format!("read {FILE}"))?;
        serde_json::from_str(&text).with_context(|| format!("{FILE} is not a record of instruction counts"))
    }

    pub fn write(&self) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(self).context("write the figures as JSON")?;
        fs::write(path(), text + "\n").with_context(|| format!("write {FILE}"))
    }

    /// Compares new figures with the record.
    pub fn against(&self, found: &Self) -> Comparison {
        let names: BTreeSet<&String> = self.figures.keys().chain(found.figures.keys()).collect();
        let compare = |name: &String| {
            let (old, new) = (self.figures.get(name).copied(), found.figures.get(name).copied());
            let verdict = match (old, new) {
                (Some(old), Some(new)) => self.verdict(old, new, found),
                (None, _) | (_, None) => Verdict::Unmatched,
            };
            (name.clone(), old, new, verdict)
        };
        let compiler = (self.compiler != found.compiler).then(|| self.compiler.clone());
        Comparison { compiler, lines: names.into_iter().map(compare).collect() }
    }

    fn verdict(&self, old: Figures, new: Figures, found: &Self) -> Verdict {
        let within = |percent: u64| new.instructions <= old.instructions * (100 + percent) / 100 + FEW;
        if new.allocations > old.allocations {
            Verdict::TooMany
        } else if self.processor != found.processor {
            Verdict::NotComparable
        } else if !within(TOLERANCE) {
            let known = self.compiler == found.compiler || !within(TOLERANCE_OF_ANOTHER_COMPILER);
            if known { Verdict::TooMany } else { Verdict::Suspicious }
        } else if new.allocations < old.allocations
            || new.instructions * 100 + 100 * FEW < old.instructions * (100 - TOLERANCE)
        {
            Verdict::Fewer
        } else {
            Verdict::AsRecorded
        }
    }
}

impl Comparison {
    pub fn fails(&self) -> bool {
        self.lines.iter().any(|(.., verdict)| matches!(verdict, Verdict::TooMany | Verdict::Unmatched))
    }
}

impl Verdict {
    const fn label(self) -> &'static str {
        match self {
            Self::AsRecorded => "",
            Self::Fewer => "fewer: update the record",
            Self::Suspicious => "more, but with another compiler",
            Self::TooMany => "TOO MANY",
            Self::Unmatched => "NOT IN BOTH: update the record",
            Self::NotComparable => "another processor",
        }
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(compiler) = &self.compiler {
            writeln!(f, "The record is from another compiler, {compiler}; higher counts are accepted.\n")?;
        }
        writeln!(f, "{:<50}{:>24}{:>24}", "instructions, allocations", "recorded", "found")?;
        let cell =
            |figures: &Option<Figures>| figures.map_or_else(|| "-".to_owned(), |figures| figures.to_string());
        for (name, old, new, verdict) in &self.lines {
            writeln!(f, "{name:<50}{:>24}{:>24}  {}", cell(old), cell(new), verdict.label())?;
        }
        if self.fails() {
            writeln!(
                f,
                "\nIf this is intended, run cargo xtask test instructions -- --record and give the reason in the commit."
            )?;
        }
        Ok(())
    }
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<50}{:>24}", "instructions, allocations", "found")?;
        self.figures
            .iter()
            .try_for_each(|(name, figures)| writeln!(f, "{name:<50}{:>24}", figures.to_string()))
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", self.instructions, self.allocations)
    }
}

/// Returns the version of the compiler that cargo uses here.
pub fn compiler() -> anyhow::Result<String> {
    let mut command = Command::new("rustc");
    let output = command.arg("--version").current_dir(env!("CARGO_MANIFEST_DIR")).output();
    let output = output.context("run rustc --version")?;
    ensure!(output.status.success(), "rustc --version: {}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn path() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(FILE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(compiler: &str, instructions: u64, allocations: u64) -> Record {
        let figures = BTreeMap::from([("a".to_owned(), Figures { instructions, allocations })]);
        Record { compiler: compiler.to_owned(), figures, ..Record::default() }
    }

    fn verdict(old: &Record, new: &Record) -> (Verdict, bool) {
        let comparison = old.against(new);
        (comparison.lines[0].3, comparison.fails())
    }

    #[test]
    fn a_rise_beyond_the_tolerance_fails() {
        let old = record("1.95", 1000, 2);
        assert_eq!(verdict(&old, &record("1.95", 1054, 2)), (Verdict::AsRecorded, false));
        assert_eq!(verdict(&old, &record("1.95", 1055, 2)), (Verdict::TooMany, true));
        assert_eq!(verdict(&old, &record("1.95", 945, 2)), (Verdict::Fewer, false));
    }

    #[test]
    fn another_compiler_has_a_wider_tolerance() {
        let old = record("1.95", 1000, 2);
        assert_eq!(verdict(&old, &record("1.96", 1154, 2)), (Verdict::Suspicious, false));
        assert_eq!(verdict(&old, &record("1.96", 1155, 2)), (Verdict::TooMany, true));
    }

    #[test]
    fn one_more_allocation_fails_with_any_compiler() {
        let old = record("1.95", 1000, 2);
        assert_eq!(verdict(&old, &record("1.96", 900, 3)), (Verdict::TooMany, true));
        let elsewhere = Record { processor: "another".to_owned(), ..record("1.95", 5000, 2) };
        assert_eq!(verdict(&old, &elsewhere), (Verdict::NotComparable, false));
    }

    #[test]
    fn a_row_missing_on_either_side_fails() {
        let (old, new) =
            (record("1.95", 1000, 2), Record { figures: BTreeMap::new(), ..record("1.95", 0, 0) });
        assert_eq!(verdict(&old, &new), (Verdict::Unmatched, true));
        assert_eq!(verdict(&new, &old), (Verdict::Unmatched, true));
    }

    #[test]
    fn the_committed_record_parses() {
        assert!(!Record::read().expect("the record").figures.is_empty());
    }
}
