//! Errors of files and options. Each names its option, its origin and the accepted values. None
//! shows a secret.

use std::io;
use std::path::PathBuf;

use super::file::Location;
use super::interpolate::InterpolationError;
use super::option::OptionSpec;
use super::setting::Origin;

/// An option or a file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OptionError {
    #[error(transparent)]
    Syntax(SyntaxError),
    /// A file or a directory of files cannot be read.
    #[error("cannot read configuration {}: {source}", path.display())]
    Source { path: PathBuf, source: io::Error },
    /// The rule of the option does not accept the value. `written` is the text before references
    /// are replaced.
    #[error("{}: {written:?} is not accepted ({origin}); accepted is {}", option.name, (option.accepts)())]
    Value { option: &'static OptionSpec, written: String, origin: Origin },
    /// The option names a file that cannot be read.
    #[error("{}: cannot read {written:?} ({origin}): {source}; accepted is {}", option.name, (option.accepts)())]
    Unreadable { option: &'static OptionSpec, written: String, origin: Origin, source: io::Error },
    /// A reference in the value cannot be replaced.
    #[error("{}: {error} ({origin})", option.name)]
    Reference { option: &'static OptionSpec, error: InterpolationError, origin: Origin },
    /// A reference in a secret cannot be replaced. The reference is not shown: it may be part of
    /// the secret.
    #[error(
        "{}: its value (hidden) has a `$` that refers to no usable option ({origin}); accepted is {}, \
         with each dollar sign written `$$`",
        option.name,
        (option.accepts)()
    )]
    ReferenceInSecret { option: &'static OptionSpec, origin: Origin },
    /// A value in the environment is not UTF-8.
    #[error("{}: the value (hidden) is not UTF-8 ({origin}); accepted is {}", option.name, (option.accepts)())]
    NotUtf8 { option: &'static OptionSpec, origin: Origin },
}

/// A line that is not valid syntax.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{location}: {kind}")]
pub struct SyntaxError {
    pub location: Location,
    pub kind: SyntaxErrorKind,
}

/// The reason why a line is not valid. The line itself is not shown: it may hold a secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SyntaxErrorKind {
    #[error("the file is not UTF-8 from here on")]
    NotUtf8,
    #[error("a section must end with `]`, and nothing may follow it")]
    SectionNotClosed,
    #[error("the section has no name")]
    SectionUnnamed,
    #[error("neither `=` nor `:` in what should be `option = value`")]
    NoSeparator,
    #[error("there is no option name before the separator")]
    KeyEmpty,
    /// An indented line that does not follow a value.
    #[error("a line that starts with white space continues a value, but there is none to continue")]
    StrayContinuation,
    #[error("an option before the first `[section]`")]
    OutsideSection,
}
