//! Replaces `$name`, `${name}` and `${group.name}` in values of files, as oslo.config does
//! (`_substitute` in oslo_config/cfg.py).
//!
//! A bare name is looked up in the option's own group and then in `DEFAULT`. A name with a group is
//! looked up in that group only. The value found is expanded in turn, and the result is not parsed
//! again. `$$` and `\$` stand for a dollar sign, and so does a `$` that no name follows. Names
//! consist of ASCII letters, digits, `_` and `.`.
//!
//! An error names the reference that stands in the option itself, never one in an option on the
//! way: that text is part of a value that may be a secret.

use super::file::{DEFAULT, fold};

/// The value behind an option's name.
pub(crate) enum Lookup<'a> {
    /// Text that may refer to more options.
    Template(&'a str),
    /// Text to insert unchanged.
    Literal(&'a str),
    /// A secret, which must not become part of another option.
    Secret,
    Unknown,
}

/// Finds options by folded group and name.
pub(crate) trait Scope {
    fn find(&self, group: &str, name: &str) -> Lookup<'_>;
}

/// A reference that cannot be replaced. `name` is the name as written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InterpolationError {
    #[error("`${name}` names no option; a dollar sign itself is written `$$`")]
    Unknown { name: String },
    #[error("`${name}` leads back to itself")]
    Loop { name: String },
    #[error("`${name}` is or holds a secret, which may not become part of another option")]
    Secret { name: String },
    #[error("`${name}` leads to more than {MAX_REFERENCES} references")]
    TooMany { name: String },
    /// Another option on the way has a reference that cannot be replaced.
    #[error("the value of `${name}` holds a reference that names no option")]
    Broken { name: String },
}

/// Limits both the depth and the work of one expansion.
const MAX_REFERENCES: usize = 256;

/// Expands the value of an option in `group`.
///
/// # Errors
/// Names the first reference that cannot be replaced.
pub(crate) fn expand(
    group: &str,
    option: &str,
    text: &str,
    scope: &dyn Scope,
) -> Result<String, InterpolationError> {
    let mut walk = Walk { scope, path: vec![(fold(group), option.to_owned())], left: MAX_REFERENCES };
    let outcome = walk.expand(group, text);
    outcome.map_err(|(name, dead_end)| match dead_end {
        DeadEnd::Unknown => InterpolationError::Unknown { name },
        DeadEnd::Loop => InterpolationError::Loop { name },
        DeadEnd::Secret => InterpolationError::Secret { name },
        DeadEnd::TooMany => InterpolationError::TooMany { name },
        DeadEnd::Broken => InterpolationError::Broken { name },
    })
}

enum DeadEnd {
    Unknown,
    Loop,
    Secret,
    TooMany,
    Broken,
}

struct Walk<'a> {
    scope: &'a dyn Scope,
    /// The options whose values are being expanded, outermost first.
    path: Vec<(String, String)>,
    left: usize,
}

impl Walk<'_> {
    /// The error carries the reference in this text that led to it.
    fn expand(&mut self, group: &str, text: &str) -> Result<String, (String, DeadEnd)> {
        let text = text.replace("\\$", "$$");
        let mut out = String::with_capacity(text.len());
        let mut rest = text.as_str();
        while let Some((before, after)) = rest.split_once('$') {
            out.push_str(before);
            rest = after;
            if let Some(after) = rest.strip_prefix('$') {
                out.push('$');
                rest = after;
            } else if let Some((name, after)) = reference(rest) {
                let value = self.resolve(group, name).map_err(|dead_end| (name.to_owned(), dead_end))?;
                out.push_str(&value);
                rest = after;
            } else {
                out.push('$');
            }
        }
        out.push_str(rest);
        Ok(out)
    }

    fn resolve(&mut self, group: &str, name: &str) -> Result<String, DeadEnd> {
        self.left = self.left.checked_sub(1).ok_or(DeadEnd::TooMany)?;
        let (group, name) = self.locate(group, name).ok_or(DeadEnd::Unknown)?;
        if self.path.contains(&(group.clone(), name.clone())) {
            return Err(DeadEnd::Loop);
        }
        let scope = self.scope;
        match scope.find(&group, &name) {
            Lookup::Literal(text) => Ok(text.to_owned()),
            Lookup::Template(text) => {
                self.path.push((group.clone(), name));
                let value = self.expand(&group, text).map_err(|(_, dead_end)| match dead_end {
                    DeadEnd::Unknown => DeadEnd::Broken,
                    other @ (DeadEnd::Loop | DeadEnd::Secret | DeadEnd::TooMany | DeadEnd::Broken) => other,
                })?;
                self.path.pop();
                Ok(value)
            }
            Lookup::Secret => Err(DeadEnd::Secret),
            Lookup::Unknown => Err(DeadEnd::Unknown),
        }
    }

    /// Returns the group and name of the option that a reference means.
    fn locate(&self, group: &str, name: &str) -> Option<(String, String)> {
        let known = |group: &str, name: &str| !matches!(self.scope.find(group, name), Lookup::Unknown);
        if let Some((other, option)) = name.split_once('.') {
            // oslo.config does not find options of DEFAULT by that name.
            let other = fold(other);
            return (other != DEFAULT && known(&other, option)).then(|| (other, option.to_owned()));
        }
        let groups = [fold(group), DEFAULT.to_owned()];
        groups.into_iter().find(|group| known(group, name)).map(|group| (group, name.to_owned()))
    }
}

/// Splits the text after a `$` into the name and the rest.
fn reference(text: &str) -> Option<(&str, &str)> {
    if let Some(braced) = text.strip_prefix('{') {
        let (name, after) = split_name(braced)?;
        return after.strip_prefix('}').map(|after| (name, after));
    }
    split_name(text)
}

fn split_name(text: &str) -> Option<(&str, &str)> {
    if !text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') {
        return None;
    }
    let end = text.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == '.')).unwrap_or(text.len());
    text.split_at_checked(end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    struct Table(HashMap<(String, String), String>);

    impl Scope for Table {
        fn find(&self, group: &str, name: &str) -> Lookup<'_> {
            match self.0.get(&(group.to_owned(), name.to_owned())) {
                _ if name == "secret" => Lookup::Secret,
                Some(text) => Lookup::Template(text),
                None => Lookup::Unknown,
            }
        }
    }

    fn table(rows: &[(&str, &str, &str)]) -> Table {
        Table(rows.iter().map(|(g, n, t)| (((*g).to_owned(), (*n).to_owned()), (*t).to_owned())).collect())
    }

    fn scope() -> Table {
        table(&[
            (DEFAULT, "b", "B"),
            (DEFAULT, "_c", "2"),
            (DEFAULT, "dollar", "$$b"),
            (DEFAULT, "password", "pa$word"),
            (DEFAULT, "leak", "x$secret"),
            (DEFAULT, "l1", "$l2"),
            (DEFAULT, "l2", "$l1"),
            (DEFAULT, "only_default", "$in_g"),
            ("g", "b", "G"),
            ("g", "in_g", "g!"),
        ])
    }

    /// Each row was compared with oslo.config 10.
    #[test]
    fn references_are_replaced_as_oslo_config_does() {
        for (group, text, want) in [
            (DEFAULT, "$b ${b}x ${g.b} $g.b", "B Bx G G"),
            ("g", "$b $_c", "G 2"),
            (DEFAULT, "$$b \\$b \\\\$b", "$b $b \\$b"),
            (DEFAULT, "$ $1 $\u{e9} ${b ${} ${\u{e9}} $-b $", "$ $1 $\u{e9} ${b ${} ${\u{e9}} $-b $"),
            (DEFAULT, "$b\u{e9}", "B\u{e9}"),
            (DEFAULT, "$dollar", "$b"),
            (DEFAULT, "${G.b}", "G"),
        ] {
            assert_eq!(expand(group, "a", text, &scope()).as_deref(), Ok(want), "{text:?}");
        }
    }

    #[test]
    fn references_without_a_usable_option_are_errors() {
        use InterpolationError::*;
        let name = str::to_owned;
        for (text, want) in [
            ("$B", Unknown { name: name("B") }),
            ("x${nope}y", Unknown { name: name("nope") }),
            ("$b.", Unknown { name: name("b.") }),
            ("$g.nope", Unknown { name: name("g.nope") }),
            ("${DEFAULT.b}", Unknown { name: name("DEFAULT.b") }),
            ("$a", Loop { name: name("a") }),
            ("$l1", Loop { name: name("l1") }),
            ("$secret", Secret { name: name("secret") }),
            ("$leak", Secret { name: name("leak") }),
            ("$only_default", Broken { name: name("only_default") }),
        ] {
            let scope = table(&[(DEFAULT, "a", text)].into_iter().chain([]).collect::<Vec<_>>());
            let scope = Table(scope.0.into_iter().chain(self::scope().0).collect());
            assert_eq!(expand(DEFAULT, "a", text, &scope), Err(want), "{text:?}");
        }
    }

    #[test]
    fn an_error_does_not_quote_the_value_of_another_option() {
        let error = expand(DEFAULT, "a", "$password", &scope()).unwrap_err();
        assert_eq!(error, InterpolationError::Broken { name: "password".to_owned() });
        assert!(!error.to_string().contains("$word"), "{error}");
    }

    #[test]
    fn references_that_multiply_are_limited() {
        let names: Vec<String> = (0..40).map(|n| format!("n{n}")).collect();
        let rows: Vec<(String, String)> =
            names.windows(2).map(|pair| (pair[0].clone(), format!("${0}${0}", pair[1]))).collect();
        let mut rows: Vec<_> = rows.iter().map(|(n, t)| (DEFAULT, n.as_str(), t.as_str())).collect();
        rows.push((DEFAULT, "n39", ""));
        let error = expand(DEFAULT, "a", "$n0", &table(&rows)).unwrap_err();
        assert_eq!(error, InterpolationError::TooMany { name: "n0".to_owned() });
    }

    proptest! {
        #[test]
        fn escaped_text_expands_to_itself(text in "[ -~\u{e9}]{0,40}") {
            prop_assume!(!text.contains('\\'));
            prop_assert_eq!(expand(DEFAULT, "a", &text.replace('$', "$$"), &table(&[])), Ok(text));
        }

        #[test]
        fn no_text_causes_a_panic(text in "[$\\\\{}ab.\u{e9}]{0,40}") {
            let _ = expand("g", "a", &text, &scope());
        }
    }
}
