//! Values as text, and their origins.

use std::fmt;
use std::path::PathBuf;

use secrecy::{ExposeSecret as _, SecretString};
use serde::{Serialize, Serializer};

use super::file::Assignment;

/// The origin of a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A command-line flag, without its dashes.
    Flag {
        flag: String,
    },
    /// An environment variable.
    Env {
        var: String,
    },
    /// A line of a file, counted from 1.
    File {
        path: PathBuf,
        line: usize,
    },
    /// Several lines of files, all of which count.
    Files {
        lines: Vec<(PathBuf, usize)>,
    },
    /// A line of a file that sets another option, which stands in for this one.
    Fallback {
        group: &'static str,
        name: &'static str,
        path: PathBuf,
        line: usize,
    },
    Default,
}

impl Origin {
    /// Returns the origin of an assignment in a file.
    #[must_use]
    pub fn from_assignment(assignment: &Assignment) -> Self {
        Self::File { path: assignment.location.file.to_path_buf(), line: assignment.location.line }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag { flag } => write!(f, "--{flag}"),
            Self::Env { var } => write!(f, "environment {var}"),
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Files { lines } => lines.iter().enumerate().try_for_each(|(number, (path, line))| {
                write!(f, "{}{}:{line}", if number == 0 { "" } else { ", " }, path.display())
            }),
            Self::Fallback { group, name, path, line } => {
                write!(f, "{}:{line}, [{group}] {name}", path.display())
            }
            Self::Default => f.write_str("default"),
        }
    }
}

impl Serialize for Origin {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The value of an option as text, and its origin.
#[derive(Clone, Debug, Serialize)]
pub struct Setting {
    pub group: &'static str,
    pub name: &'static str,
    /// Name among the options of all sections.
    #[serde(skip)]
    pub key: &'static str,
    /// The value after references are replaced. For a secret: `(set)` or `(empty)`.
    pub value: String,
    pub origin: Origin,
    /// The value of a secret, for comparisons only.
    #[serde(skip)]
    pub(crate) secret: Option<SecretString>,
}

impl Setting {
    /// Reports whether both have the same value, wherever it is set.
    #[must_use]
    pub fn has_value_of(&self, other: &Self) -> bool {
        let secret = |setting: &Self| setting.secret.as_ref().map(|secret| secret.expose_secret().to_owned());
        self.value == other.value && secret(self) == secret(other)
    }
}
