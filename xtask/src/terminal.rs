//! Output of this tool. The macros of the standard library panic if it cannot be written.

use std::fmt::Display;
use std::io::{self, ErrorKind, Write};

use anyhow::{Context, Result};

/// Prints a line to standard output. A reader that has left, as in `cargo xtask build-ebpf | head`,
/// is not an error.
///
/// # Errors
/// Standard output cannot be written, for example because a disk is full.
pub fn print(line: impl Display) -> Result<()> {
    match writeln!(io::stdout(), "{line}") {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        printed => printed.context("write to standard output"),
    }
}

/// Prints a line about progress or an error to standard error. The work does not depend on it.
pub fn note(line: impl Display) {
    let _ = writeln!(io::stderr(), "{line}");
}
