//! Patterns for names of interfaces and network namespaces.

use std::fmt;

/// A pattern for names of interfaces and network namespaces: `*` matches any characters, `?`
/// matches one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct NamePattern(String);

impl NamePattern {
    /// Parses a pattern. Brackets are rejected, because shells read them as character classes.
    #[must_use]
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let fits = !text.is_empty()
            && text.chars().all(|c| !c.is_whitespace() && !c.is_control() && !matches!(c, '/' | '[' | ']'));
        fits.then(|| Self(text.to_owned()))
    }

    /// Reports whether the pattern matches the whole name.
    #[must_use]
    pub(crate) fn matches(&self, name: &str) -> bool {
        let (pattern, name): (Vec<char>, Vec<char>) = (self.0.chars().collect(), name.chars().collect());
        let (mut p, mut n) = (0, 0);
        // The last `*`, and the end of the text that it matches so far.
        let mut star = None;
        while let Some(&c) = name.get(n) {
            match pattern.get(p) {
                Some('*') => {
                    star = Some((p, n));
                    p += 1;
                }
                Some(&want) if want == '?' || want == c => (p, n) = (p + 1, n + 1),
                _ => {
                    let Some((at, end)) = star else { return false };
                    star = Some((at, end + 1));
                    (p, n) = (at + 1, end + 1);
                }
            }
        }
        pattern.iter().skip(p).all(|&c| c == '*')
    }
}

impl fmt::Display for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn patterns_match_whole_names() {
        for (pattern, name, want) in [
            ("tap*", "tap3f2a9d10-77", true),
            ("tap*", "tap", true),
            ("tap*", "qtap1", false),
            ("*", "", true),
            ("t?p*1", "tap01", true),
            ("t?p*1", "tp1", false),
            ("*ab*ab", "abxab", true),
            ("*ab*ab", "ab", false),
            ("**a", "ba", true),
            ("eth0", "eth01", false),
        ] {
            assert_eq!(NamePattern::parse(pattern).unwrap().matches(name), want, "{pattern} {name}");
        }
        for bad in ["", "a b", "tap[0-9]", "a/b", "a\n"] {
            assert_eq!(NamePattern::parse(bad), None, "{bad:?}");
        }
    }

    /// The obvious, exponential matcher.
    fn slow(pattern: &[u8], name: &[u8]) -> bool {
        match (pattern, name) {
            ([], []) => true,
            ([b'*', p @ ..], _) => (0..=name.len()).any(|skip| slow(p, &name[skip..])),
            ([b'?', p @ ..], [_, n @ ..]) => slow(p, n),
            ([c, p @ ..], [d, n @ ..]) => c == d && slow(p, n),
            _ => false,
        }
    }

    proptest! {
        #[test]
        fn the_matcher_agrees_with_the_obvious_one(pattern in "[ab*?]{1,7}", name in "[ab]{0,8}") {
            let want = slow(pattern.as_bytes(), name.as_bytes());
            prop_assert_eq!(NamePattern::parse(&pattern).unwrap().matches(&name), want);
        }
    }
}
