//! Splits Rust source text into words, punctuation and line comments.
//!
//! It is a lexer without a parser: literals, lifetimes and block comments are dropped. Text that is
//! not valid Rust yields arbitrary tokens, but never a panic.

/// A word, `::`, another single character, or a line comment, with its line number from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token<'a> {
    pub text: &'a str,
    pub line: usize,
}

/// Returns the words and punctuation of a source file.
pub fn read(source: &str) -> Vec<Token<'_>> {
    lex(source).into_iter().filter(|(kind, _)| *kind == Kind::Code).map(|(_, token)| token).collect()
}

/// Returns the line comments of a source file, from their `//` to the end of the line.
pub fn line_comments(source: &str) -> Vec<Token<'_>> {
    lex(source).into_iter().filter(|(kind, _)| *kind == Kind::LineComment).map(|(_, token)| token).collect()
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Code,
    LineComment,
    Dropped,
}

fn lex(source: &str) -> Vec<(Kind, Token<'_>)> {
    let mut tokens = Vec::new();
    let mut line = 1;
    let mut rest = source;
    while let Some(first) = rest.chars().next() {
        let (kind, length) = if rest.starts_with("//") {
            (Kind::LineComment, rest.find('\n').unwrap_or(rest.len()))
        } else if let Some(length) = dropped(rest) {
            (Kind::Dropped, length)
        } else if rest.starts_with("::") {
            (Kind::Code, 2)
        } else if is_word_part(first) {
            (Kind::Code, rest.find(|c| !is_word_part(c)).unwrap_or(rest.len()))
        } else {
            (Kind::Code, first.len_utf8())
        };
        let (text, tail) = rest.split_at(length);
        tokens.push((kind, Token { text, line }));
        line += text.matches('\n').count();
        rest = tail;
    }
    tokens
}

/// Returns true for an identifier, a keyword or a number.
pub fn is_word(text: &str) -> bool {
    text.chars().all(is_word_part)
}

fn is_word_part(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Length of the white space, block comment, literal or lifetime at the start of `text`.
fn dropped(text: &str) -> Option<usize> {
    let spaces = text.len() - text.trim_start().len();
    if spaces > 0 {
        return Some(spaces);
    }
    if text.starts_with("/*") {
        return Some(block_comment(text));
    }
    raw_string(text).or_else(|| quoted(text)).or_else(|| character(text))
}

fn block_comment(text: &str) -> usize {
    let mut depth = 0usize;
    let mut at = 0;
    while let Some(rest) = text.get(at..).filter(|rest| !rest.is_empty()) {
        if rest.starts_with("/*") {
            depth += 1;
            at += 2;
        } else if rest.starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += rest.chars().next().map_or(1, char::len_utf8);
        }
    }
    text.len()
}

/// `r"..."`, `r#"..."#`, and both with a prefix `b` or `c`.
fn raw_string(text: &str) -> Option<usize> {
    let body = text.strip_prefix(['b', 'c']).unwrap_or(text).strip_prefix('r')?;
    let hashes = body.len() - body.trim_start_matches('#').len();
    let body = body.get(hashes..)?.strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(hashes));
    let start = text.len() - body.len();
    Some(body.find(&end).map_or(text.len(), |at| start + at + end.len()))
}

/// `"..."`. A prefix `b` or `c` remains as a separate word, which does no harm.
fn quoted(text: &str) -> Option<usize> {
    let body = text.strip_prefix('"')?;
    let mut escaped = false;
    for (at, c) in body.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return Some(1 + at + 1),
            _ => {}
        }
    }
    Some(text.len())
}

/// `'x'`, `'\n'`, `'\u{fc}'`, or the lifetime `'x`.
fn character(text: &str) -> Option<usize> {
    let body = text.strip_prefix('\'')?;
    let mut characters = body.chars();
    let first = characters.next()?;
    if first == '\\' {
        let escaped = characters.next().map_or(0, char::len_utf8);
        let start = 1 + escaped;
        return Some(body.get(start..)?.find('\'').map_or(text.len(), |at| 1 + start + at + 1));
    }
    if characters.next() == Some('\'') {
        return Some(1 + first.len_utf8() + 1);
    }
    Some(1 + body.find(|c| !is_word_part(c)).unwrap_or(body.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(source: &str) -> Vec<&str> {
        read(source).into_iter().map(|token| token.text).collect()
    }

    #[test]
    fn paths_split_into_words_and_colons() {
        assert_eq!(words("use crate::{a, b};"), ["use", "crate", "::", "{", "a", ",", "b", "}", ";"]);
    }

    #[test]
    fn comments_and_literals_are_dropped() {
        let cases = [
            "x // y\n z",
            "x /* y /* y */ y */ z",
            r#"x "y \" y" z"#,
            r##"x r#"y " y"# z"##,
            "x 'y' z",
            r"x '\'' z",
            r"x '\u{fc}' z",
            "x 'y z",
        ];
        for case in cases {
            assert_eq!(words(case), ["x", "z"], "{case}");
        }
    }

    #[test]
    fn dropped_text_counts_its_lines() {
        let tokens = read("/* a\n b */ \"c\n\" x");
        assert_eq!(tokens, [Token { text: "x", line: 3 }]);
    }

    #[test]
    fn line_comments_are_not_found_in_literals() {
        let source = "let x = \"http://a\"; // one\n/* // no */ //! two\n";
        let comments: Vec<_> = line_comments(source).into_iter().map(|c| (c.line, c.text)).collect();
        assert_eq!(comments, [(1, "// one"), (2, "//! two")]);
    }

    #[test]
    fn unterminated_text_ends_with_the_file() {
        for text in ["/* a", "\"a", "r#\"a\"", "'\\", "'", "\u{fc}'\u{fc}"] {
            assert!(read(text).len() <= 2, "{text}");
        }
    }
}
