//! What this machine has. All that decides what to install asks here, so that its tests can answer instead.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The questions that a requirement may ask.
pub trait Probe {
    /// Is this Debian package installed?
    fn package(&self, name: &str) -> bool;
    /// Is there a file, or a folder, at this path?
    fn file(&self, path: &Path) -> bool;
    /// Is there a program of this name that root could start?
    fn program(&self, name: &str) -> bool;
    /// What a command prints when it succeeds.
    fn answer(&self, words: &[&str]) -> Option<String>;
    /// Is this Debian 12?
    fn is_debian_12(&self) -> bool;
    /// May this process install packages?
    fn is_root(&self) -> bool;
}

/// The machine itself.
pub struct Host;

impl Probe for Host {
    fn package(&self, name: &str) -> bool {
        self.answer(&["dpkg-query", "--show", "--showformat=${db:Status-Status}", name])
            .is_some_and(|status| status == "installed")
    }

    fn file(&self, path: &Path) -> bool {
        path.exists()
    }

    fn program(&self, name: &str) -> bool {
        let own = std::env::var_os("PATH").unwrap_or_default();
        // A user's PATH leaves out the system's half.
        let system = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
        std::env::split_paths(&own).chain(system).any(|folder| folder.join(name).is_file())
    }

    fn answer(&self, words: &[&str]) -> Option<String> {
        let [program, arguments @ ..] = words else { return None };
        let output =
            Command::new(program).args(arguments).stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    fn is_debian_12(&self) -> bool {
        std::fs::read_to_string("/etc/os-release").is_ok_and(|text| names_debian_12(&text))
    }

    fn is_root(&self) -> bool {
        self.answer(&["id", "-u"]).is_some_and(|uid| uid == "0")
    }
}

/// Reads `os-release(5)`.
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
    fn debian_12_is_told_from_its_kin() {
        assert!(names_debian_12("NAME=\"Debian GNU/Linux\"\nVERSION_ID=\"12\"\nID=debian\n"));
        assert!(!names_debian_12("VERSION_ID=\"13\"\nID=debian\n"));
        assert!(!names_debian_12("VERSION_ID=\"12\"\nID=devuan\nID_LIKE=debian\n"));
        assert!(!names_debian_12(""));
    }

    #[test]
    fn the_host_knows_a_shell_and_no_nonsense() {
        assert!(Host.program("sh"));
        assert!(!Host.program("no-such-program-here"));
        assert_eq!(Host.answer(&["printf", "yes\n"]).as_deref(), Some("yes"));
        assert_eq!(Host.answer(&["false"]), None);
    }
}
