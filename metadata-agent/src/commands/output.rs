//! Output of the commands. The macros of the standard library panic if it cannot be written.

use std::io::{self, ErrorKind, Write};

use anyhow::{Context as _, Result};

/// Writes to standard output. A reader that has left, as in `status | head`, is not an error: it
/// has what it wanted.
///
/// # Errors
/// Standard output cannot be written, for example because a disk is full.
pub(super) fn print(write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
    let mut out = io::stdout().lock();
    let written = write(&mut out).and_then(|()| out.flush());
    unless_reader_left(written).context("write to standard output")
}

/// Turns the error of a pipe without a reader into success.
pub(super) fn unless_reader_left(written: io::Result<()>) -> io::Result<()> {
    match written {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

/// Writes an error message. If that fails, the exit code still reports the error.
pub(super) fn print_error(message: &str) {
    let _ = writeln!(io::stderr(), "metadata-agent: {message}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_reader_that_left_is_no_error() {
        assert!(unless_reader_left(Ok(())).is_ok());
        assert!(unless_reader_left(Err(ErrorKind::BrokenPipe.into())).is_ok());
        let full = unless_reader_left(Err(ErrorKind::StorageFull.into())).unwrap_err();
        assert_eq!(full.kind(), ErrorKind::StorageFull);
    }
}
