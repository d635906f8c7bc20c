//! Checks the length of function names. Tests are functions, and their names tend to grow.

use super::Finding;
use crate::tokens::{is_word, read};

/// Characters of the longest allowed name. Detail belongs into the assertion's message.
const LENGTH: usize = 60;

/// Returns the functions of a source file whose names are too long.
pub fn findings(source: &str) -> Vec<Finding> {
    let tokens = read(source);
    let named = tokens.array_windows().filter(|[keyword, name]| keyword.text == "fn" && is_word(name.text));
    named
        .filter_map(|[_, name]| {
            let length = name.text.chars().count();
            (length > LENGTH).then(|| Finding {
                line: name.line,
                problem: format!("`{}` has {length} characters; {LENGTH} are allowed", name.text),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_may_have_60_characters() {
        let source = |length| format!("#[test]\nfn {}() {{}}", "n".repeat(length));
        assert_eq!(findings(&source(LENGTH)), []);
        let long = findings(&source(LENGTH + 1));
        assert_eq!(long.len(), 1);
        assert_eq!(long[0].line, 2);
        assert!(long[0].problem.contains("61 characters"), "{}", long[0].problem);
    }

    #[test]
    fn only_declared_functions_count() {
        let name = "n".repeat(LENGTH + 1);
        for source in [format!("{name}();"), format!("let f: fn() = {name};"), format!("// fn {name}()")] {
            assert_eq!(findings(&source), [], "{source}");
        }
    }
}
