//! Output of the tools of this crate. `println!` panics if its reader has left, as in `| head`.

use std::fmt::Display;
use std::io::{self, Write as _};

/// Prints a line, unless nothing reads it any more. Neither a lab nor a measurement depends on it.
pub fn print(line: impl Display) {
    let _ = writeln!(io::stdout(), "{line}");
}
