//! Reads the configuration files of OpenStack services as oslo.config does, with environment
//! variables and flags on top.
//!
//! A program describes its options as a table of [`OptionSpec`]s. A [`Resolver`] merges the files,
//! and reads one option after the other: it picks the assignment that wins, replaces references,
//! and applies the option's [`Rule`]. It collects every error, so that one run reports them all. No
//! secret appears in an error, in `Debug` output or in a [`Setting`].
//!
//! ```text
//! file          bytes -> assignments with their lines
//! interpolate   `$name` -> the value of another option
//! resolver      flag > environment > file > default
//! rule          text -> typed value
//! setting       the value as text and its origin, for people
//! ```

#![warn(unreachable_pub)]

mod error;
mod file;
mod interpolate;
mod option;
mod resolver;
pub mod rule;
mod setting;

pub use error::{OptionError, SyntaxError, SyntaxErrorKind};
pub use file::{Assignment, DEFAULT, Files, Location};
pub use interpolate::InterpolationError;
pub use option::{Access, OptionSpec, Table, find, is_secret};
pub use resolver::{ConfigSource, Fitted, Flags, Resolver};
pub use rule::{Rejected, Rule, Words};
pub use setting::{Origin, Setting};
