//! Rules that turn the text of an option into its value. A rule also describes in words what it
//! accepts, so that errors and help always agree with the check.

use std::fmt::{Debug, Display};
use std::fs::File;
use std::io;
use std::num::NonZero;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use secrecy::SecretString;

/// An enumeration whose values have names in configuration files.
pub trait Words: Copy + Sized + 'static {
    /// Every value with its name.
    const WORDS: &'static [(&'static str, Self)];

    /// Returns the value's name.
    fn word(self) -> &'static str;
}

/// Turns text into a `T`.
pub trait Rule<T> {
    /// Parses the text.
    ///
    /// # Errors
    /// The rule does not accept the text.
    fn read(&self, text: &str) -> Result<T, Rejected>;

    /// Describes what it accepts, as the end of the sentence "accepted is ...".
    fn accepts(&self) -> String;

    /// Returns the accepted text nearest to one that was written for another program with other
    /// limits.
    fn fit(&self, _text: &str) -> Option<String> {
        None
    }

    /// Reports whether every assignment to the option counts, as with oslo.config's `MultiOpt`.
    /// Their texts are then joined by commas. Otherwise only the last assignment counts, also if it
    /// is a list.
    fn adds_up(&self) -> bool {
        false
    }
}

/// A text that a rule does not accept.
#[derive(Debug)]
pub enum Rejected {
    /// The text is not what [`Rule::accepts`] describes.
    NotAccepted,
    /// The text names a file that cannot be read.
    Unreadable(io::Error),
}

fn accepted<T>(value: Option<T>) -> Result<T, Rejected> {
    value.ok_or(Rejected::NotAccepted)
}

/// Any text of one line.
pub struct Line;

impl Rule<String> for Line {
    fn read(&self, text: &str) -> Result<String, Rejected> {
        let one_line = !text.contains(char::is_control);
        accepted(one_line.then(|| text.to_owned()))
    }

    fn accepts(&self) -> String {
        "a text of one line".to_owned()
    }
}

/// A whole number in a range.
pub struct Number<N>(pub RangeInclusive<N>);

impl<N: FromStr + PartialOrd + Display> Rule<N> for Number<N> {
    fn read(&self, text: &str) -> Result<N, Rejected> {
        accepted(text.trim().parse().ok().filter(|number| self.0.contains(number)))
    }

    fn accepts(&self) -> String {
        format!("a whole number from {} to {}", self.0.start(), self.0.end())
    }
}

/// A whole number for which 0 and an empty value have a special meaning.
pub struct NumberOr {
    pub max: u32,
    /// Description of the meaning of 0.
    pub zero: &'static str,
}

impl Rule<Option<NonZero<u32>>> for NumberOr {
    fn read(&self, text: &str) -> Result<Option<NonZero<u32>>, Rejected> {
        // oslo.config reads an empty number as None.
        let text = if text.trim().is_empty() { "0" } else { text };
        Number(0..=self.max).read(text).map(NonZero::new)
    }

    fn accepts(&self) -> String {
        format!("a whole number from 1 to {}, or 0 for {}", self.max, self.zero)
    }
}

/// A time in seconds.
pub struct Seconds(pub RangeInclusive<f64>);

impl Rule<Duration> for Seconds {
    fn read(&self, text: &str) -> Result<Duration, Rejected> {
        let seconds: Option<f64> = text.trim().parse().ok();
        let seconds = seconds.filter(|seconds| self.0.contains(seconds));
        accepted(seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()))
    }

    fn accepts(&self) -> String {
        format!("a time in seconds from {} to {}", self.0.start(), self.0.end())
    }

    fn fit(&self, text: &str) -> Option<String> {
        let seconds: f64 = text.trim().parse().ok().filter(|seconds: &f64| seconds.is_finite())?;
        Some(seconds.clamp(*self.0.start(), *self.0.end()).to_string())
    }
}

/// A boolean, in any of oslo.config's spellings.
pub struct Switch;

impl Rule<bool> for Switch {
    fn read(&self, text: &str) -> Result<bool, Rejected> {
        accepted(match text.trim().to_ascii_lowercase().as_str() {
            "true" | "1" | "on" | "yes" => Some(true),
            "false" | "0" | "off" | "no" => Some(false),
            _ => None,
        })
    }

    fn accepts(&self) -> String {
        "true, 1, on, yes or false, 0, off, no".to_owned()
    }
}

/// The name of an enumeration's value.
pub struct OneOf;

impl<T: Words> Rule<T> for OneOf {
    fn read(&self, text: &str) -> Result<T, Rejected> {
        let text = text.trim();
        accepted(T::WORDS.iter().find(|(word, _)| *word == text).map(|(_, value)| *value))
    }

    fn accepts(&self) -> String {
        let words: Vec<_> = T::WORDS.iter().map(|(word, _)| *word).collect();
        format!("one of {}", words.join(", "))
    }
}

/// A list with at least one item, separated by commas. As in oslo.config, a comma may end the list.
pub struct ListOf<R>(pub R);

impl<T, R: Rule<T>> Rule<Vec<T>> for ListOf<R> {
    fn read(&self, text: &str) -> Result<Vec<T>, Rejected> {
        text.trim().trim_end_matches(',').split(',').map(|item| self.0.read(item.trim())).collect()
    }

    fn accepts(&self) -> String {
        format!("a list separated by commas, each {}", self.0.accepts())
    }
}

/// A list that may be empty, separated by commas. All assignments to the option count.
pub struct Added<R>(pub R);

impl<T, R: Rule<T>> Rule<Vec<T>> for Added<R> {
    fn read(&self, text: &str) -> Result<Vec<T>, Rejected> {
        let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
        items.map(|item| self.0.read(item)).collect()
    }

    fn accepts(&self) -> String {
        format!("nothing, or a list separated by commas, each {}", self.0.accepts())
    }

    fn adds_up(&self) -> bool {
        true
    }
}

/// A packet mark: decimal, or hexadecimal with `0x`.
pub struct Mark;

impl Rule<u32> for Mark {
    fn read(&self, text: &str) -> Result<u32, Rejected> {
        let text = text.trim();
        accepted(match text.strip_prefix("0x") {
            Some(digits) if !digits.starts_with('+') => u32::from_str_radix(digits, 16).ok(),
            Some(_) => None,
            None => text.parse().ok(),
        })
    }

    fn accepts(&self) -> String {
        "a number of 32 bits, decimal or with 0x hexadecimal".to_owned()
    }
}

/// A path. Relative paths start at the working directory.
pub struct AnyPath;

impl Rule<PathBuf> for AnyPath {
    fn read(&self, text: &str) -> Result<PathBuf, Rejected> {
        accepted((!text.is_empty() && !text.contains(char::is_control)).then(|| PathBuf::from(text)))
    }

    fn accepts(&self) -> String {
        "a path".to_owned()
    }
}

/// A path that does not depend on the working directory.
pub struct AbsolutePath;

impl Rule<PathBuf> for AbsolutePath {
    fn read(&self, text: &str) -> Result<PathBuf, Rejected> {
        AnyPath.read(text).and_then(|path| accepted(path.is_absolute().then_some(path)))
    }

    fn accepts(&self) -> String {
        "an absolute path".to_owned()
    }
}

/// The path of a unix socket. The kernel keeps it in 108 bytes, with the NUL at its end.
pub struct SocketPath;

impl Rule<PathBuf> for SocketPath {
    fn read(&self, text: &str) -> Result<PathBuf, Rejected> {
        AbsolutePath.read(text).and_then(|path| accepted((text.len() < 108).then_some(path)))
    }

    fn accepts(&self) -> String {
        "an absolute path of at most 107 bytes".to_owned()
    }
}

/// The path of a file that can be read now.
pub struct ReadableFile;

impl Rule<PathBuf> for ReadableFile {
    fn read(&self, text: &str) -> Result<PathBuf, Rejected> {
        let path = AnyPath.read(text)?;
        check_readable(&path).map_err(Rejected::Unreadable)?;
        Ok(path)
    }

    fn accepts(&self) -> String {
        "the path of a readable file".to_owned()
    }
}

fn check_readable(path: &Path) -> io::Result<()> {
    let metadata = File::open(path)?.metadata()?;
    if metadata.is_dir() { Err(io::ErrorKind::IsADirectory.into()) } else { Ok(()) }
}

/// A file name without a directory.
pub struct FileName;

impl Rule<String> for FileName {
    fn read(&self, text: &str) -> Result<String, Rejected> {
        let plain = (1..=255).contains(&text.len())
            && !matches!(text, "." | "..")
            && !text.contains(|c: char| c == '/' || c.is_whitespace() || c.is_control());
        accepted(plain.then(|| text.to_owned()))
    }

    fn accepts(&self) -> String {
        "a plain file name, without `/` and white space".to_owned()
    }
}

/// A value, or an empty text for none.
pub struct Unset<R> {
    pub or: R,
    /// Description of the meaning of an empty text.
    pub meaning: &'static str,
}

impl<T, R: Rule<T>> Rule<Option<T>> for Unset<R> {
    fn read(&self, text: &str) -> Result<Option<T>, Rejected> {
        if text.is_empty() { Ok(None) } else { self.or.read(text).map(Some) }
    }

    fn accepts(&self) -> String {
        format!("{}, or nothing for {}", self.or.accepts(), self.meaning)
    }
}

/// Any text, protected from being shown.
pub struct Secret;

impl Rule<SecretString> for Secret {
    fn read(&self, text: &str) -> Result<SecretString, Rejected> {
        Ok(SecretString::from(text))
    }

    fn accepts(&self) -> String {
        "any text".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Copy, Debug, PartialEq)]
    enum LinkKind {
        Tun,
        Veth,
    }

    impl Words for LinkKind {
        const WORDS: &'static [(&'static str, Self)] = &[("tun", Self::Tun), ("veth", Self::Veth)];

        fn word(self) -> &'static str {
            unreachable!("unused")
        }
    }

    fn check<T: PartialEq + Debug>(rule: &impl Rule<T>, good: &[(&str, T)], bad: &[&str]) {
        for (text, want) in good {
            assert_eq!(rule.read(text).ok().as_ref(), Some(want), "{text:?} is {}", rule.accepts());
        }
        for text in bad {
            assert!(rule.read(text).is_err(), "{text:?} is not {}", rule.accepts());
        }
    }

    #[test]
    fn numbers_keep_to_their_ranges() {
        check(
            &Number(1280_u16..=65535),
            &[("1280", 1280), (" 65535\n", 65535)],
            &["1279", "65536", "", "-1", "1e4"],
        );
        let rule = NumberOr { max: 10, zero: "off" };
        check(&rule, &[("", None), ("0", None), ("10", NonZero::new(10))], &["11", "-1", "off"]);
    }

    #[test]
    fn seconds_may_have_fractions_but_are_finite() {
        let good = [("0.5", Duration::from_millis(500)), ("60", Duration::from_mins(1))];
        check(&Seconds(0.5..=60.0), &good, &["0.49", "60.01", "", "inf", "NaN", "-1", "5s"]);
    }

    #[test]
    fn a_time_for_another_program_is_fitted() {
        let rule = Seconds(32.0..=600.0);
        for (text, want) in [
            ("20", Some("32")),
            ("32.5", Some("32.5")),
            ("1000", Some("600")),
            ("-1", Some("32")),
            ("inf", None),
            ("x", None),
        ] {
            assert_eq!(rule.fit(text).as_deref(), want, "{text}");
        }
    }

    #[test]
    fn marks_read_as_neutron_writes_them() {
        check(
            &Mark,
            &[("0x1", 1), ("16", 16), ("0xffffffff", u32::MAX)],
            &["", "0x", "0x+1", "x1", "0x100000000"],
        );
    }

    #[test]
    fn switches_read_as_in_oslo_config() {
        let good = ["True", "1", "on", "YES"].map(|text| (text, true));
        check(&Switch, &good, &["", "y", "2", "enabled"]);
        check(&Switch, &["false", "0", "Off", "no"].map(|text| (text, false)), &[]);
    }

    #[test]
    fn lists_need_an_item_and_no_bad_one() {
        let good = [("tun", vec![LinkKind::Tun]), ("tun , veth,", vec![LinkKind::Tun, LinkKind::Veth])];
        check(&ListOf(OneOf), &good, &["", ",", "tun,,veth", "tun,bridge", "TUN"]);
    }

    #[test]
    fn paths_and_names_are_validated() {
        let path = |text: &str| PathBuf::from(text);
        check(&AbsolutePath, &[("/a b", path("/a b"))], &["", "a", "./a", "/a\n", "/a\0"]);
        let (longest, longer) = (format!("/{}", "a".repeat(106)), format!("/{}", "a".repeat(107)));
        check(&SocketPath, &[(longest.as_str(), path(&longest))], &[&longer, "a"]);
        check(
            &FileName,
            &[("metadata-portal", "metadata-portal".to_owned())],
            &["", ".", "..", "a/b", "a b", "a\n"],
        );
        check(&Unset { or: AnyPath, meaning: "off" }, &[("", None), ("a", Some(path("a")))], &["\n"]);
    }

    #[test]
    fn a_file_must_be_readable_now() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("ca.pem");
        let text = file.to_str().unwrap();
        assert!(matches!(ReadableFile.read(text), Err(Rejected::Unreadable(_))));
        std::fs::write(&file, "x").unwrap();
        assert_eq!(ReadableFile.read(text).unwrap(), file);
        assert!(matches!(ReadableFile.read(dir.path().to_str().unwrap()), Err(Rejected::Unreadable(_))));
    }
}
