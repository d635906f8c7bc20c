//! Inspects this machine. Decisions about installing go through the trait, so that tests can fake
//! the machine.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::command::lint_tool;

/// A machine that may or may not meet the requirements.
pub trait Probe {
    /// Returns true if a Debian package is installed.
    fn has_package(&self, name: &str) -> bool;
    /// Returns true if there is a file or a folder at this path.
    fn has_file(&self, path: &Path) -> bool;
    /// Returns true if there is a program of this name that root could start.
    fn has_program(&self, name: &str) -> bool;
    /// Returns the standard output of a command, or `None` if it fails.
    fn output(&self, words: &[&str]) -> Option<String>;
    fn is_debian_12(&self) -> bool;
    fn is_root(&self) -> bool;
}

/// The machine that this tool runs on.
pub struct Host;

impl Probe for Host {
    fn has_package(&self, name: &str) -> bool {
        self.output(&["dpkg-query", "--show", "--showformat=${db:Status-Status}", name])
            .is_some_and(|status| status == "installed")
    }

    fn has_file(&self, path: &Path) -> bool {
        path.exists()
    }

    fn has_program(&self, name: &str) -> bool {
        let own = std::env::var_os("PATH").unwrap_or_default();
        // A user's PATH has no folders for system programs.
        let system = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
        std::env::split_paths(&own).chain(system).any(|folder| folder.join(name).is_file())
    }

    fn output(&self, words: &[&str]) -> Option<String> {
        let [program, arguments @ ..] = words else { return None };
        let program = lint_tool(program).unwrap_or_else(|| PathBuf::from(program));
        let output =
            Command::new(program).args(arguments).stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    fn is_debian_12(&self) -> bool {
        std::fs::read_to_string("/etc/os-release").is_ok_and(|text| names_debian_12(&text))
    }

    fn is_root(&self) -> bool {
        self.output(&["id", "-u"]).is_some_and(|uid| uid == "0")
    }
}

/// Parses the text of `os-release(5)`.
fn names_debian_12(text: &str) -> bool {
    let value = |key: &str| {
        text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('=').map(|v| v.trim_matches('"')))
    };
    value("ID") == Some("debian") && value("VERSION_ID") == Some("12")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debian_12_is_not_confused_with_its_relatives() {
        assert!(names_debian_12("NAME=\"Debian GNU/Linux\"\nVERSION_ID=\"12\"\nID=debian\n"));
        assert!(!names_debian_12("VERSION_ID=\"13\"\nID=debian\n"));
        assert!(!names_debian_12("VERSION_ID=\"12\"\nID=devuan\nID_LIKE=debian\n"));
        assert!(!names_debian_12(""));
    }

    #[test]
    fn the_host_has_a_shell_and_no_unknown_program() {
        assert!(Host.has_program("sh"));
        assert!(!Host.has_program("no-such-program-here"));
        assert_eq!(Host.output(&["printf", "yes\n"]).as_deref(), Some("yes"));
        assert_eq!(Host.output(&["false"]), None);
    }
}
