//! This program under callgrind, and the counts.

use std::collections::BTreeMap;
use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};

use super::meter::{COUNTED, END_OF_SUBJECT, Subject};
use super::record::Figures;

/// Counts everything.
pub fn count() -> anyhow::Result<BTreeMap<String, Figures>> {
    let folder = tempfile::tempdir().context("a folder for callgrind")?;
    let out = folder.path().join("out");
    let own = std::env::current_exe().context("the path of this program")?;
    let output = Command::new("valgrind")
        .args(["--quiet", "--tool=callgrind", &format!("--callgrind-out-file={}", out.display())])
        .args([format!("--toggle-collect={COUNTED}"), format!("--dump-before={END_OF_SUBJECT}")])
        .arg(own)
        .arg("--perform")
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("run valgrind")?;
    ensure!(output.status.success(), "valgrind: {}", output.status);
    let text = String::from_utf8(output.stdout).context("read the list of subjects")?;
    let subjects = text.lines().map(serde_json::from_str).collect::<Result<Vec<Subject>, _>>();
    let mut subjects = subjects.context("read the list of subjects")?.into_iter().zip(1..);
    let instructions = |number: u32| {
        let path = folder.path().join(format!("out.{number}"));
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        summary(&text).with_context(|| format!("{} has no summary", path.display()))
    };
    let (nothing, number) = subjects.next().context("no subject was run")?;
    let of_a_call = instructions(number)? / nothing.calls;
    ensure!(of_a_call > 0, "callgrind did not find {COUNTED}");
    let mut figures = BTreeMap::new();
    for (Subject { name, rounds, calls, allocations }, number) in subjects {
        let counted = instructions(number)?.saturating_sub(of_a_call * calls);
        // Events that are rare among many rounds, such as the growth of a table, are not part of a
        // single round.
        let a_round = |count: u64| (count + rounds / 2) / rounds;
        figures.insert(name, Figures { instructions: a_round(counted), allocations: a_round(allocations) });
    }
    Ok(figures)
}

/// Returns the total in a file of callgrind.
fn summary(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("summary: "))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_summary_is_one_number() {
        assert_eq!(super::summary("events: Ir\nsummary: 79000\n\nob=(2)\n"), Some(79_000));
        assert_eq!(super::summary("events: Ir\n"), None);
    }
}
