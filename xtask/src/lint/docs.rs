//! Checks the documents: links lead somewhere, front pages stay short, the operations page is
//! complete, and the tests that the security page names exist.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::Finding;
use crate::command::workspace_root;

/// Documents at the top of the repository. Those in `docs/` are found.
const TOP: &[&str] = &["README.md", "ARCHITECTURE.md", "SECURITY.md", "CHANGELOG.md", "CONTRIBUTING.md"];
/// Pages that a reader should finish in one go.
const SHORT: &[&str] = &["README.md", "ARCHITECTURE.md"];
const SHORT_LINES: usize = 150;

const OPERATIONS: &str = "docs/operations.md";
const REASONS: &str = "metadata-ebpf/src/reason.rs";
const LOG_LINES: &str = "\n## Log lines\n";
const AGENT: &str = "metadata-agent/src";
const SECURITY: &str = "SECURITY.md";
/// The agent with its crates and their tests.
const AGENT_PACKAGES: &str = "metadata-agent";
const TESTS: &str = "tests/tests";
/// Options have fewer underscores than the names of tests.
const UNDERSCORES_OF_A_TEST: usize = 4;

/// Checks every document of the repository.
///
/// # Errors
/// Fails if a document cannot be read.
pub fn check() -> Result<Vec<(PathBuf, Finding)>> {
    let root = workspace_root();
    let mut pages: Vec<PathBuf> = TOP.iter().map(PathBuf::from).collect();
    collect(&root, Path::new("docs"), "md", &mut pages)?;
    pages.sort();
    let mut all = Vec::new();
    for page in pages {
        let text = read(&root.join(&page))?;
        let mut findings = broken_links(&root, &page, &text);
        if SHORT.iter().any(|name| page == Path::new(name)) {
            findings.extend(excess_lines(&text));
        }
        if page == Path::new(OPERATIONS) {
            findings.extend(missing_reasons(&read(&root.join(REASONS))?, &text));
            findings.extend(unknown_log_lines(&source_text(&root.join(AGENT))?, &text));
        }
        if page == Path::new(SECURITY) {
            let sources = source_text(&root.join(AGENT_PACKAGES))? + &source_text(&root.join(TESTS))?;
            findings.extend(missing_tests(&sources, &text));
        }
        all.extend(findings.into_iter().map(|finding| (page.clone(), finding)));
    }
    Ok(all)
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("read {}", path.display()))
}

/// Adds the files in `folder` and below that end in `extension`, relative to `root`.
fn collect(root: &Path, folder: &Path, extension: &str, files: &mut Vec<PathBuf>) -> Result<()> {
    let absolute = root.join(folder);
    for entry in fs::read_dir(&absolute).with_context(|| format!("list {}", absolute.display()))? {
        let entry = entry?;
        let path = folder.join(entry.file_name());
        if entry.path().is_dir() {
            collect(root, &path, extension, files)?;
        } else if path.extension().is_some_and(|found| found == extension) {
            files.push(path);
        }
    }
    Ok(())
}

/// Returns the text of all Rust files below `folder`, with string literals on one line each.
fn source_text(folder: &Path) -> Result<String> {
    let mut files = Vec::new();
    collect(folder, Path::new(""), "rs", &mut files)?;
    let texts = files.iter().map(|file| read(&folder.join(file)));
    Ok(join_literals(&texts.collect::<Result<String>>()?))
}

/// Removes line breaks that a backslash continues, and the indentation behind them.
fn join_literals(source: &str) -> String {
    let mut pieces = source.split("\\\n");
    let first = pieces.next().unwrap_or_default().to_owned();
    pieces.fold(first, |text, piece| text + piece.trim_start())
}

/// Returns the links to files or headings that do not exist. Links to other sites are not followed.
fn broken_links(root: &Path, page: &Path, text: &str) -> Vec<Finding> {
    let folder = page.parent().unwrap_or(Path::new(""));
    let mut findings = Vec::new();
    for (line, link) in links(text).filter(|(_, link)| !link.contains("://")) {
        let (path, heading) = link.split_once('#').unwrap_or((link, ""));
        let target = if path.is_empty() { root.join(page) } else { root.join(folder).join(path) };
        let problem = if !target.exists() {
            format!("link to {path}, which does not exist")
        } else if !heading.is_empty() && !has_heading(&target, heading) {
            format!("link to a heading `{heading}`, which does not exist in {}", target.display())
        } else {
            continue;
        };
        findings.push(Finding { line, problem });
    }
    findings
}

/// Returns the targets of links such as `[text](target)`, each with its line.
fn links(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().flat_map(|(index, line)| {
        line.split("](").skip(1).filter_map(move |rest| Some((index + 1, rest.split_once(')')?.0)))
    })
}

fn has_heading(page: &Path, anchor: &str) -> bool {
    let text = fs::read_to_string(page).unwrap_or_default();
    text.lines().filter_map(|line| line.strip_prefix('#')).any(|line| slug(line) == anchor)
}

/// Returns the anchor that code forges give a heading.
fn slug(heading: &str) -> String {
    let words = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = words.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

fn excess_lines(text: &str) -> Option<Finding> {
    let lines = text.lines().count();
    (lines > SHORT_LINES).then(|| Finding {
        line: SHORT_LINES + 1,
        problem: format!("the page has {lines} lines; {SHORT_LINES} are allowed"),
    })
}

/// Returns the packet reasons that have no row in the operations page.
fn missing_reasons(source: &str, page: &str) -> Vec<Finding> {
    labels(source)
        .filter(|label| !page.contains(&format!("\n| `{label}` |")))
        .map(|label| Finding { line: 1, problem: format!("no row for the packet reason `{label}`") })
        .collect()
}

/// Returns the log lines in the operations page that the agent does not write.
fn unknown_log_lines(source: &str, page: &str) -> Vec<Finding> {
    let (before, section) = page.split_once(LOG_LINES).unwrap_or((page, ""));
    let heading = before.matches('\n').count() + 2;
    let section = section.split("\n## ").next().unwrap_or_default();
    let rows = section.lines().zip(heading + 1..).filter_map(|(row, line)| {
        let cell = row.strip_prefix("| `")?.split(" | ").next()?;
        Some((cell, line))
    });
    // Every second piece between backquotes is code. The first backquote is stripped already.
    let documented = rows.flat_map(|(cell, line)| cell.split('`').step_by(2).map(move |text| (text, line)));
    documented
        .filter(|(text, _)| !text.is_empty() && !source.contains(text))
        .map(|(text, line)| Finding { line, problem: format!("the agent does not log `{text}`") })
        .collect()
}

/// Returns the tests that a page names and no source has.
fn missing_tests(source: &str, page: &str) -> Vec<Finding> {
    let is_test = |word: &&str| {
        word.matches('_').count() >= UNDERSCORES_OF_A_TEST
            && word.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
    };
    let lines = page.lines().zip(1..);
    // Every second piece between backquotes is code.
    let named = lines.flat_map(|(text, line)| {
        text.split('`').skip(1).step_by(2).filter(is_test).map(move |name| (name, line))
    });
    named
        .filter(|(name, _)| !source.contains(&format!("fn {name}(")))
        .map(|(name, line)| Finding { line, problem: format!("there is no test `{name}`") })
        .collect()
}

/// Returns the labels of rows such as `Reply = "reply" => ToGuest,`.
fn labels(source: &str) -> impl Iterator<Item = &str> {
    source.lines().filter_map(|line| {
        let (label, verdict) = line.split_once(" = \"")?.1.split_once("\" => ")?;
        verdict.ends_with(',').then_some(label)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_found_with_their_lines() {
        let text = "[a](b.md) and ![c](d.png)\n[e](https://f)\n";
        assert_eq!(links(text).collect::<Vec<_>>(), [(1, "b.md"), (1, "d.png"), (2, "https://f")]);
    }

    #[test]
    fn links_to_missing_files_and_headings_are_found() {
        let text = "[a](ARCHITECTURE.md#glossary) [b](none.md) [c](ARCHITECTURE.md#none) [d](https://e)";
        let findings = broken_links(&workspace_root(), Path::new("README.md"), text);
        assert_eq!(findings.len(), 2, "{findings:?}");
    }

    #[test]
    fn headings_become_anchors() {
        assert_eq!(slug("## What it does not promise today"), "what-it-does-not-promise-today");
    }

    #[test]
    fn a_reason_without_a_row_is_found() {
        let source = "    Segment = \"segment\" => ToPortal,\n    Reply = \"reply\" => ToGuest,\n";
        let findings = missing_reasons(source, "\n| `segment` | portal | |");
        assert_eq!(findings.len(), 1);
        assert!(findings[0].problem.contains("`reply`"), "{findings:?}");
    }

    #[test]
    fn a_log_line_that_is_not_written_is_found() {
        let source = join_literals("warn!(\"cannot \\\n        attach\"); info!(\"serving\");");
        let page = "\n## Log lines\n\n| line | meaning |\n| `serving`, `stopping` | |\n| `cannot attach` | |\n\n## Next\n";
        let findings = unknown_log_lines(&source, page);
        assert_eq!(findings.len(), 1, "{findings:?}");
        assert!(findings[0].line == 5 && findings[0].problem.contains("`stopping`"), "{findings:?}");
    }

    #[test]
    fn a_claim_without_its_test_is_found() {
        let source = "async fn a_guest_is_never_its_neighbour() {}";
        let page =
            "\n| `a_guest_is_never_its_neighbour`, `no_byte_of_it_is_lost` |\n`serve_metadata_proxy_socket`";
        let findings = missing_tests(source, page);
        assert_eq!(findings.len(), 1, "{findings:?}");
        assert!(findings[0].line == 2 && findings[0].problem.contains("`no_byte_of_it_is_lost`"));
    }

    #[test]
    fn a_long_front_page_is_found() {
        assert!(excess_lines(&"line\n".repeat(SHORT_LINES)).is_none());
        assert!(excess_lines(&"line\n".repeat(SHORT_LINES + 1)).is_some());
    }
}
