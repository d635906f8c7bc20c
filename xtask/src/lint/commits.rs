//! Checks the length of commit subjects.

use anyhow::{Result, bail};

use crate::command::Invocation;
use crate::terminal::note;

/// Characters of the longest allowed subject.
const LENGTH: usize = 72;

/// Older commits were written before this check existed. A date works in a fresh clone as well as
/// in a shallow one, which may lack any given commit.
const SINCE: &str = "2026-11-28T00:00:00Z";

/// Checks the commits since [`SINCE`] that HEAD contains. Outside a Git checkout there are none.
///
/// # Errors
/// Lists every subject that is too long.
pub fn check() -> Result<()> {
    note("+ check commit subjects");
    if Invocation::new(["git", "rev-parse", "--is-inside-work-tree"]).output().is_err() {
        note("not a Git checkout: commit subjects are not checked");
        return Ok(());
    }
    let since = format!("--since={SINCE}");
    let log = Invocation::new(["git", "log", "--no-merges", &since, "--format=%h %s"]).output()?;
    let findings = too_long(&log);
    if !findings.is_empty() {
        bail!("commit subjects may have {LENGTH} characters:\n{}", findings.join("\n"));
    }
    Ok(())
}

/// Returns the lines of a log, `<hash> <subject>` each, with a subject that is too long.
fn too_long(log: &str) -> Vec<String> {
    let commits = log.lines().filter_map(|line| line.split_once(' '));
    commits
        .map(|(hash, subject)| (hash, subject, subject.chars().count()))
        .filter(|(_, _, length)| *length > LENGTH)
        .map(|(hash, subject, length)| format!("{hash} has {length}: {subject}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subjects_may_have_72_characters() {
        let fits = "s".repeat(LENGTH);
        assert_eq!(too_long(&format!("abc1234 {fits}\nabc1235 proxy: do\n")), [""; 0]);
        let long = too_long(&format!("abc1235 proxy: do\nabc1234 {fits}s\n"));
        assert_eq!(long, [format!("abc1234 has 73: {fits}s")]);
    }

    #[test]
    fn an_empty_log_has_no_findings() {
        assert_eq!(too_long(""), [""; 0]);
    }
}
