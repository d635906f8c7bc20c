//! Checks the width of line comments and the first word of doc comments.

use super::Finding;
use crate::tokens::line_comments;

/// Columns that a line with a comment may fill. rustfmt on stable Rust does not wrap comments.
const WIDTH: usize = 100;

/// First words that start a question or a clause. A doc comment starts with a third-person verb or
/// a noun phrase.
const CLAUSE_STARTS: [&str; 10] =
    ["Who", "Whom", "Whose", "What", "Which", "Whether", "When", "By which", "By whom", "By what"];

/// Returns the comments of a source file that break a rule.
pub fn findings(source: &str) -> Vec<Finding> {
    let lines: Vec<&str> = source.lines().collect();
    let mut findings = Vec::new();
    let mut previous: Option<(usize, &str)> = None;
    for comment in line_comments(source) {
        let (marker, text) = split_marker(comment.text);
        let line = lines.get(comment.line - 1).copied().unwrap_or_default();

        let width = line.chars().count();
        if width > WIDTH && can_be_wrapped(text) {
            findings.push(Finding {
                line: comment.line,
                problem: format!("the comment ends in column {width}; wrap it at {WIDTH}"),
            });
        }

        let continues = previous == Some((comment.line - 1, marker));
        if marker != "//"
            && !continues
            && let Some(word) = clause_start(text)
        {
            findings.push(Finding {
                line: comment.line,
                problem: format!("the doc comment starts with `{word}`; start with a verb or a noun phrase"),
            });
        }
        previous = Some((comment.line, marker));
    }
    findings
}

/// Splits a comment into `//`, `///` or `//!` and its text. Four slashes are an ordinary comment.
fn split_marker(comment: &str) -> (&str, &str) {
    let length = match comment.as_bytes() {
        [b'/', b'/', b'/', b'/', ..] => 2,
        [b'/', b'/', b'/' | b'!', ..] => 3,
        _ => 2,
    };
    comment.split_at(length)
}

/// Returns false for a single word, such as a URL, and for a row of a Markdown table.
fn can_be_wrapped(text: &str) -> bool {
    let text = text.trim();
    text.contains(char::is_whitespace) && !text.starts_with('|')
}

fn clause_start(text: &str) -> Option<&'static str> {
    CLAUSE_STARTS.into_iter().find(|words| {
        let rest = text.trim_start().strip_prefix(words);
        rest.is_some_and(|rest| !rest.starts_with(|c: char| c.is_alphanumeric() || c == '_'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(source: &str) -> Vec<usize> {
        findings(source).iter().map(|finding| finding.line).collect()
    }

    #[test]
    fn comments_may_fill_100_columns() {
        for (prefix, marker) in [("", "//"), ("    ", "///"), ("", "//!"), ("let x = 1; ", "//")] {
            let start = format!("{prefix}{marker} a ");
            let fits = format!("\n{start}{}\n", "b".repeat(WIDTH - start.len()));
            assert_eq!(lines(&fits), [0; 0], "{fits}");
            assert_eq!(lines(&fits.replace(" a ", " a b")), [2], "{fits}");
        }
    }

    #[test]
    fn width_is_counted_in_characters() {
        assert_eq!(lines(&format!("// a {}", "\u{fc}".repeat(WIDTH - 5))), [0; 0]);
    }

    #[test]
    fn code_urls_and_tables_may_be_wider() {
        let long = "x".repeat(WIDTH);
        for source in [
            format!("let y = {long};"),
            format!("let y = \"// {long} {long}\";"),
            format!("// https://example.com/{long}"),
            format!("/// | a | {long} |"),
        ] {
            assert_eq!(lines(&source), [0; 0], "{source}");
        }
    }

    #[test]
    fn doc_comments_do_not_start_with_a_clause() {
        for words in CLAUSE_STARTS {
            assert_eq!(lines(&format!("/// {words} it is.\nfn f() {{}}")), [1], "{words}");
            assert_eq!(lines(&format!("//! {words}: a thing.")), [1], "{words}");
        }
    }

    #[test]
    fn only_the_first_word_of_a_doc_comment_counts() {
        for source in [
            "/// Returns it.\n/// When it is there.\nfn f() {}",
            "/// Returns it.\n///\n/// # Errors\n/// When it is not there.\nfn f() {}",
            "/// Whatever comes first.\nfn f() {}",
            "// When the kernel is old, this fails.",
            "//// What a line.",
        ] {
            assert_eq!(lines(source), [0; 0], "{source}");
        }
        assert_eq!(lines("//! Module.\n/// What it is.\nfn f() {}"), [2]);
    }
}
