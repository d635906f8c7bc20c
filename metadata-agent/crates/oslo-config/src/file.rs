//! Parses oslo.config's file format and merges files as oslo.config does (oslo_config/iniparser.py
//! and cfg.py).
//!
//! Input: the bytes of files, in the order of the command line. Output: every assignment in that
//! order, with its file and line. Only the syntax is interpreted here. Any value may be a secret,
//! also that of an unknown option, so neither an error nor `Debug` output shows one.
//!
//! The rules:
//! - Lines end with LF, CRLF or CR. Trailing white space is ignored. The text is UTF-8.
//! - `[section]`, then `key = value` or `key: value`. The first separator counts.
//! - One pair of equal quotes around the first line of the value is removed.
//! - A line that starts with a space or a tab continues the value, after a line feed.
//! - A blank line or a comment ends the value. `#` and `;` start a comment only at the start of a
//!   line.
//! - Section names are case-insensitive, except `DEFAULT`. Keys are case-sensitive.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::error::{SyntaxError, SyntaxErrorKind};

/// The section of options that have no group.
pub const DEFAULT: &str = "DEFAULT";

/// The assignments of all files.
#[derive(Debug, Default)]
pub struct Files {
    sections: HashMap<String, HashMap<String, Vec<Assignment>>>,
}

/// One `key = value`.
#[derive(Clone, PartialEq, Eq)]
pub struct Assignment {
    /// The value before references are replaced. Its lines are joined by line feeds.
    pub text: String,
    pub location: Location,
}

impl fmt::Debug for Assignment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Assignment({})", self.location)
    }
}

/// A line of a file. Lines are counted from 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    pub file: Arc<Path>,
    pub line: usize,
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file.display(), self.line)
    }
}

impl Files {
    /// Adds a file. Its assignments override those of earlier files.
    ///
    /// # Errors
    /// Every invalid line. Valid lines are added all the same, so that errors of their values can
    /// be reported too.
    pub(crate) fn merge(&mut self, file: &Path, bytes: &[u8]) -> Result<(), Vec<SyntaxError>> {
        let mut reader = Reader::new(self, file);
        let text = match std::str::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) => {
                let sound = bytes.get(..error.valid_up_to()).unwrap_or_default();
                let sound = String::from_utf8_lossy(sound);
                reader.line = lines(&sound).count().max(1);
                reader.error(SyntaxErrorKind::NotUtf8);
                return Err(reader.errors);
            }
        };
        for line in lines(text) {
            reader.read(line);
        }
        reader.flush();
        if reader.errors.is_empty() { Ok(()) } else { Err(reader.errors) }
    }

    /// Returns every assignment to an option. The last one wins.
    #[must_use]
    pub(crate) fn all(&self, section: &str, key: &str) -> &[Assignment] {
        let section = self.sections.get(&fold(section));
        section.and_then(|keys| keys.get(key)).map_or(&[], Vec::as_slice)
    }

    /// Returns the first assignment in a section.
    #[must_use]
    pub fn any(&self, section: &str) -> Option<&Assignment> {
        let keys = self.sections.get(&fold(section))?;
        let place = |one: &&Assignment| (one.location.file.to_path_buf(), one.location.line);
        keys.values().flatten().min_by_key(place)
    }

    /// Returns the assignment that wins.
    #[must_use]
    pub fn last(&self, section: &str, key: &str) -> Option<&Assignment> {
        self.all(section, key).last()
    }
}

/// Folds a section name for comparison.
#[must_use]
pub(crate) fn fold(section: &str) -> String {
    if section == DEFAULT { section.to_owned() } else { section.to_lowercase() }
}

/// Splits as Python's universal newlines do: at LF, CRLF and CR.
fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.split('\n').flat_map(|line| line.strip_suffix('\r').unwrap_or(line).split('\r'))
}

/// Matches what Python's `str.strip` removes: Unicode white space and the four ASCII separators.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// The value that an indented line continues.
enum Open {
    Nothing,
    Value {
        key: String,
        text: String,
        line: usize,
    },
    /// An invalid line. Its continuation needs no second error.
    Invalid,
}

enum Section {
    Missing,
    Named(String),
    /// A section with an invalid heading. The section of its options is not known.
    Invalid,
}

struct Reader<'a> {
    into: &'a mut Files,
    file: Arc<Path>,
    line: usize,
    section: Section,
    open: Open,
    errors: Vec<SyntaxError>,
}

impl<'a> Reader<'a> {
    fn new(into: &'a mut Files, file: &Path) -> Self {
        let file = PathBuf::from(file).into();
        Self { into, file, line: 0, section: Section::Missing, open: Open::Nothing, errors: Vec::new() }
    }

    fn read(&mut self, line: &str) {
        self.line += 1;
        let line = line.trim_end_matches(is_space);
        if line.starts_with([' ', '\t']) {
            self.continue_value(line.trim_start_matches(is_space));
            return;
        }
        self.flush();
        if let Some(heading) = line.strip_prefix('[') {
            self.begin_section(heading);
        } else if !line.is_empty() && !line.starts_with(['#', ';']) {
            self.begin_value(line);
        }
    }

    fn continue_value(&mut self, more: &str) {
        match &mut self.open {
            Open::Value { text, .. } => {
                text.push('\n');
                text.push_str(more);
            }
            Open::Nothing => {
                self.error(SyntaxErrorKind::StrayContinuation);
                self.open = Open::Invalid;
            }
            Open::Invalid => {}
        }
    }

    fn begin_section(&mut self, heading: &str) {
        let kind = match heading.strip_suffix(']') {
            None => SyntaxErrorKind::SectionNotClosed,
            Some("") => SyntaxErrorKind::SectionUnnamed,
            Some(name) => {
                self.section = Section::Named(fold(name));
                return;
            }
        };
        self.error(kind);
        self.section = Section::Invalid;
    }

    fn begin_value(&mut self, line: &str) {
        let kind = match line.split_once(['=', ':']) {
            None => SyntaxErrorKind::NoSeparator,
            Some((key, value)) => match key.trim_matches(is_space) {
                "" => SyntaxErrorKind::KeyEmpty,
                key => {
                    let text = unquote(value.trim_matches(is_space)).to_owned();
                    self.open = Open::Value { key: key.to_owned(), text, line: self.line };
                    return;
                }
            },
        };
        self.error(kind);
        self.open = Open::Invalid;
    }

    /// Ends the value that was being read.
    fn flush(&mut self) {
        let Open::Value { key, text, line } = std::mem::replace(&mut self.open, Open::Nothing) else {
            return;
        };
        let location = Location { file: Arc::clone(&self.file), line };
        match &self.section {
            Section::Named(section) => {
                let keys = self.into.sections.entry(section.clone()).or_default();
                keys.entry(key).or_default().push(Assignment { text, location });
            }
            Section::Missing => {
                self.errors.push(SyntaxError { location, kind: SyntaxErrorKind::OutsideSection });
            }
            Section::Invalid => {}
        }
    }

    fn error(&mut self, kind: SyntaxErrorKind) {
        let location = Location { file: Arc::clone(&self.file), line: self.line };
        self.errors.push(SyntaxError { location, kind });
    }
}

/// Removes one pair of equal quotes. A single quote character counts as a pair, as in oslo.config.
fn unquote(value: &str) -> &str {
    for quote in ['"', '\''] {
        if let Some(rest) = value.strip_prefix(quote) {
            return match rest.strip_suffix(quote) {
                Some(inner) => inner,
                None if rest.is_empty() => rest,
                None => value,
            };
        }
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fmt::Write as _;

    fn parse(text: &str) -> Files {
        let mut raw = Files::default();
        raw.merge(Path::new("a.conf"), text.as_bytes()).unwrap();
        raw
    }

    fn faults(bytes: &[u8]) -> Vec<(usize, SyntaxErrorKind)> {
        let faults = Files::default().merge(Path::new("a.conf"), bytes).unwrap_err();
        faults.into_iter().map(|fault| (fault.location.line, fault.kind)).collect()
    }

    fn texts(raw: &Files, section: &str, key: &str) -> Vec<String> {
        raw.all(section, key).iter().map(|assignment| assignment.text.clone()).collect()
    }

    /// Each row was compared with oslo.config 10.
    #[test]
    fn values_read_as_oslo_config_reads_them() {
        for (line, value) in [
            ("a=1", "1"),
            ("a = x = y : z", "x = y : z"),
            ("a: x = y", "x = y"),
            ("a =", ""),
            ("a = \"quoted \"", "quoted "),
            ("a = 'q'", "q"),
            ("a = \"x\" y \"z\"", "x\" y \"z"),
            ("a = 'x\"", "'x\""),
            ("a = \"", ""),
            ("a = \"\"", ""),
            ("a = x # no comment", "x # no comment"),
            ("a = x\n  # nor this\n\ty", "x\n# nor this\ny"),
            ("a =\n  y", "\ny"),
            ("a = \"x\"\n  y", "x\ny"),
            ("a = x\r\n  y\r\n", "x\ny"),
            ("a = \u{a0}1\u{a0}\x1c", "1"),
            ("a = 1\x0b2", "1\x0b2"),
            ("a = x\u{85}y\u{2028}z", "x\u{85}y\u{2028}z"),
        ] {
            assert_eq!(texts(&parse(&format!("[DEFAULT]\n{line}\n")), DEFAULT, "a"), [value], "{line:?}");
        }
        let raw = parse("[DEFAULT]\ra=1\rb=2\r");
        assert_eq!(texts(&raw, DEFAULT, "b"), ["2"], "a carriage return alone ends a line");
    }

    #[test]
    fn only_section_names_other_than_default_fold_case() {
        let raw = parse(
            "[Agent]\na=1\n[AGENT]\na=2\nA=3\n[default]\nb=4\n[DEFAULT]\nb=5\n[ x ]\nc=6\n[y]z]\nd=7\n",
        );
        assert_eq!(texts(&raw, "agent", "a"), ["1", "2"]);
        assert_eq!(texts(&raw, "aGent", "A"), ["3"]);
        assert_eq!(texts(&raw, DEFAULT, "b"), ["5"]);
        assert_eq!(
            texts(&raw, "x", "c"),
            Vec::<String>::new(),
            "white space in brackets is part of the name"
        );
        assert_eq!(texts(&raw, " x ", "c"), ["6"]);
        assert_eq!(texts(&raw, "y]z", "d"), ["7"]);
    }

    #[test]
    fn later_files_win_and_every_value_knows_its_place() {
        let mut raw = parse("[DEFAULT]\na=1\n\na=2\n");
        raw.merge(Path::new("b.conf"), b"# c\n[DEFAULT]\na = 3\n   4\n").unwrap();
        assert_eq!(texts(&raw, DEFAULT, "a"), ["1", "2", "3\n4"]);
        assert_eq!(raw.last(DEFAULT, "a").unwrap().location.to_string(), "b.conf:3");
        assert_eq!(raw.all(DEFAULT, "a")[1].location.to_string(), "a.conf:4");
        assert_eq!(raw.last(DEFAULT, "b"), None);
    }

    #[test]
    fn every_invalid_line_is_reported() {
        use SyntaxErrorKind::*;
        for (text, want) in [
            (
                "[DEFAULT]\na\n=1\n  more\n[x\nb=1\n[]\n  c\n",
                vec![
                    (2, NoSeparator),
                    (3, KeyEmpty),
                    (5, SectionNotClosed),
                    (7, SectionUnnamed),
                    (8, StrayContinuation),
                ],
            ),
            ("a=1\n", vec![(1, OutsideSection)]),
            ("[DEFAULT] # no comment here\n", vec![(1, SectionNotClosed)]),
            ("[DEFAULT]\n  a=1\n  b\n", vec![(2, StrayContinuation)]),
            ("[DEFAULT]\na=1\n\n  b\n", vec![(4, StrayContinuation)]),
            ("[DEFAULT]\na=1\n# c\n  b\n", vec![(4, StrayContinuation)]),
            ("\u{feff}[DEFAULT]\n", vec![(1, NoSeparator)]),
        ] {
            assert_eq!(faults(text.as_bytes()), want, "{text:?}");
        }
        assert_eq!(faults(b"[DEFAULT]\nb=1\na=\xff\n"), [(3, NotUtf8)]);
    }

    #[test]
    fn valid_lines_survive_invalid_ones() {
        let mut raw = Files::default();
        raw.merge(Path::new("a.conf"), b"[DEFAULT]\noops\na=1\n").unwrap_err();
        assert_eq!(texts(&raw, DEFAULT, "a"), ["1"]);
    }

    #[test]
    fn neither_debug_nor_errors_show_the_text() {
        let mut raw = parse("[DEFAULT]\nmetadata_proxy_shared_secret = hunter2\n");
        let faults = raw.merge(Path::new("b.conf"), b"[DEFAULT]\nsecret hunter2\n").unwrap_err();
        let shown = format!("{raw:?} {faults:?} {}", faults[0]);
        assert!(!shown.contains("hunter2"), "{shown}");
        assert!(shown.contains("b.conf:2"), "{shown}");
    }

    /// A value that the format can represent: no line has surrounding white space, and no later
    /// line is blank.
    fn value() -> impl Strategy<Value = String> {
        let line = "[!-~&&[^'\"]]([ -~]{0,12}[!-~&&[^'\"]])?";
        (proptest::option::of(line), proptest::collection::vec(line, 0..3)).prop_map(|(first, rest)| {
            std::iter::once(first.unwrap_or_default()).chain(rest).collect::<Vec<_>>().join("\n")
        })
    }

    fn assignments() -> impl Strategy<Value = Vec<(String, String, String)>> {
        let section = prop_oneof![Just(DEFAULT.to_owned()), "[a-z_]{1,6}"];
        proptest::collection::vec((section, "[A-Za-z_][A-Za-z0-9_-]{0,6}", value()), 0..12)
    }

    fn render(assignments: &[(String, String, String)], style: usize) -> String {
        let (separator, indent, quote) =
            [("=", "\t", ""), (" = ", "  ", ""), (": ", " ", "\""), ("=", " ", "'")][style];
        let mut text = String::new();
        for (section, key, value) in assignments {
            let (first, rest) = value.split_once('\n').map_or((value.as_str(), None), |(f, r)| (f, Some(r)));
            writeln!(text, "# comment\n[{section}]\n{key}{separator}{quote}{first}{quote}").unwrap();
            for line in rest.into_iter().flat_map(|rest| rest.split('\n')) {
                writeln!(text, "{indent}{line}").unwrap();
            }
        }
        text
    }

    proptest! {
        #[test]
        fn rendered_assignments_read_back(assignments in assignments(), style in 0usize..4) {
            let raw = parse(&render(&assignments, style));
            for (section, key, _) in &assignments {
                let want: Vec<_> = assignments.iter().filter(|(s, k, _)| s == section && k == key)
                    .map(|(_, _, value)| value.clone()).collect();
                prop_assert_eq!(texts(&raw, section, key), want);
            }
        }

        #[test]
        fn no_bytes_cause_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Files::default().merge(Path::new("a"), &bytes);
        }

        #[test]
        fn error_locations_lie_inside_the_file(text in "([\\[\\]=:#; \ta'\"é\r]{0,6}\n){0,20}") {
            let count = lines(&text).count();
            if let Err(faults) = Files::default().merge(Path::new("a"), text.as_bytes()) {
                for fault in faults {
                    prop_assert!((1..=count).contains(&fault.location.line), "{}", fault);
                }
            }
        }
    }
}
