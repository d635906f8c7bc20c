//! An option's value as text, and where it was set.

use std::fmt;
use std::path::PathBuf;

use serde::{Serialize, Serializer};

use super::raw::Assignment;

/// Where a value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The command line.
    Flag {
        /// The flag, without its dashes.
        flag: String,
    },
    /// The environment.
    Env {
        /// The variable.
        var: String,
    },
    /// A configuration file.
    File {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
    },
    /// Several lines of configuration files, which all count.
    Files {
        /// Each file and line.
        places: Vec<(PathBuf, usize)>,
    },
    /// Another option, in whose stead ours is, in a configuration file.
    Fallback {
        /// The other option's section.
        group: &'static str,
        /// The other option.
        name: &'static str,
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
    },
    /// Nobody set it.
    Default,
}

impl Origin {
    /// Where an assignment stands.
    pub(super) fn of(assignment: &Assignment) -> Self {
        Self::File { path: assignment.place.file.to_path_buf(), line: assignment.place.line }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag { flag } => write!(f, "--{flag}"),
            Self::Env { var } => write!(f, "environment {var}"),
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Files { places } => places.iter().enumerate().try_for_each(|(number, (path, line))| {
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

/// An option's value as text, and where it comes from.
#[derive(Clone, Debug, Serialize)]
pub struct Setting {
    /// The section.
    pub group: &'static str,
    /// The option.
    pub name: &'static str,
    /// Its name among the options of all sections.
    #[serde(skip)]
    pub key: &'static str,
    /// The value after references were replaced. Of a secret: whether there is one.
    pub value: String,
    /// Its origin.
    pub origin: Origin,
}
