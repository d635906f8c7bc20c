//! Rust source cut into words and marks; comments and literals are left out.

/// A word, `::`, or a single other character, and the line it stands in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token<'a> {
    /// Its text.
    pub text: &'a str,
    /// Counted from 1.
    pub line: usize,
}

/// Cuts a source file. What is not Rust gives some tokens or other, never a panic.
pub fn read(source: &str) -> Vec<Token<'_>> {
    let mut tokens = Vec::new();
    let mut line = 1;
    let mut rest = source;
    while let Some(first) = rest.chars().next() {
        let skipped = blank(rest);
        let (length, is_token) = match skipped {
            Some(length) => (length, false),
            None if rest.starts_with("::") => (2, true),
            None if is_word_part(first) => (rest.find(|c| !is_word_part(c)).unwrap_or(rest.len()), true),
            None => (first.len_utf8(), true),
        };
        let (text, tail) = rest.split_at(length);
        if is_token {
            tokens.push(Token { text, line });
        }
        line += text.matches('\n').count();
        rest = tail;
    }
    tokens
}

/// Whether a token is an identifier or a keyword.
pub fn is_word(text: &str) -> bool {
    text.chars().all(is_word_part)
}

fn is_word_part(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The length of what `text` begins with and nobody needs: white space, a comment, a literal, a lifetime.
fn blank(text: &str) -> Option<usize> {
    let spaces = text.len() - text.trim_start().len();
    if spaces > 0 {
        return Some(spaces);
    }
    if text.starts_with("//") {
        return Some(text.find('\n').unwrap_or(text.len()));
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

/// `r"..."`, `r#"..."#`, and the same with `b` or `c` before.
fn raw_string(text: &str) -> Option<usize> {
    let body = text.strip_prefix(['b', 'c']).unwrap_or(text).strip_prefix('r')?;
    let hashes = body.len() - body.trim_start_matches('#').len();
    let body = body.get(hashes..)?.strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(hashes));
    let start = text.len() - body.len();
    Some(body.find(&end).map_or(text.len(), |at| start + at + end.len()))
}

/// `"..."`; a `b` or `c` before it is a word of its own and does no harm.
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
    fn paths_fall_into_words_and_colons() {
        assert_eq!(words("use crate::{a, b};"), ["use", "crate", "::", "{", "a", ",", "b", "}", ";"]);
    }

    #[test]
    fn comments_and_literals_vanish() {
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
    fn lines_are_counted_through_everything() {
        let tokens = read("/* a\n b */ \"c\n\" x");
        assert_eq!(tokens, [Token { text: "x", line: 3 }]);
    }

    #[test]
    fn what_never_ends_ends_with_the_file() {
        for text in ["/* a", "\"a", "r#\"a\"", "'\\", "'", "\u{fc}'\u{fc}"] {
            assert!(read(text).len() <= 2, "{text}");
        }
    }
}
