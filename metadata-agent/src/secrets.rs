//! The shared secrets: the configuration's own, then those in files, each file one secret.
//!
//! In: the paths. Out: a [`Signer`] that has the secrets in force, also after a file changed. The files are small and
//! few, so they are simply read again every [`PERIOD`], and at once when Nova refuses all secrets: that works on any file
//! system and with however many symlinks, where a watch would miss changes (a Kubernetes secret changes by a symlink in
//! the middle of its path). A file that cannot be read, or is empty as while somebody writes it, leaves its last secret in
//! force. No secret is ever logged.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use tokio::time::{MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::proxy::Signer;

/// How often the files are read again.
const PERIOD: Duration = Duration::from_secs(2);
/// The least time between two readings, however often Nova refuses.
const PAUSE: Duration = Duration::from_millis(100);
/// Far longer than any sane secret.
const MAX_BYTES: u64 = 4096;

/// Reads the secret of a file: its text without the line end behind it.
///
/// # Errors
/// The file cannot be read, is none, is empty, too long or not UTF-8.
pub fn read(path: &Path) -> io::Result<SecretString> {
    let refuse = |kind, problem: &'static str| Err(io::Error::new(kind, problem));
    // Opening a FIFO would wait for its writer.
    if !path.metadata()?.is_file() {
        return refuse(io::ErrorKind::InvalidInput, "it is not a regular file");
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_BYTES {
        return refuse(io::ErrorKind::InvalidData, "it is longer than 4096 bytes");
    }
    let Ok(text) = String::from_utf8(bytes) else {
        return refuse(io::ErrorKind::InvalidData, "it is not UTF-8");
    };
    let line = text.strip_suffix('\n').unwrap_or(&text);
    match line.strip_suffix('\r').unwrap_or(line) {
        "" => refuse(io::ErrorKind::InvalidData, "it is empty"),
        secret => Ok(SecretString::from(secret)),
    }
}

/// A file of [`SecretFiles`] cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the shared secret in {}: {source}", path.display())]
pub struct SecretFileError {
    path: PathBuf,
    source: io::Error,
}

/// The secrets, and the files that they come from.
#[derive(Debug)]
pub struct SecretFiles {
    /// The configuration's own.
    own: SecretString,
    files: Vec<SecretFile>,
}

#[derive(Debug)]
struct SecretFile {
    path: PathBuf,
    secret: SecretString,
    /// What was wrong with it the last time.
    problem: Option<String>,
}

impl SecretFiles {
    /// Reads all files.
    ///
    /// # Errors
    /// The first that cannot be read.
    pub fn open(own: SecretString, paths: &[PathBuf]) -> Result<Self, SecretFileError> {
        let open = |path: &PathBuf| match read(path) {
            Ok(secret) => Ok(SecretFile { path: path.clone(), secret, problem: None }),
            Err(source) => Err(SecretFileError { path: path.clone(), source }),
        };
        Ok(Self { own, files: paths.iter().map(open).collect::<Result<_, _>>()? })
    }

    /// Signs with all of them, the configuration's own first.
    #[must_use]
    pub fn signer(&self) -> Signer {
        let signer = Signer::new(self.own.clone());
        signer.replace(self.secrets());
        signer
    }

    /// An empty secret of the configuration is none where there are others.
    fn secrets(&self) -> Vec<SecretString> {
        let own = (self.files.is_empty() || !self.own.expose_secret().is_empty()).then(|| self.own.clone());
        own.into_iter().chain(self.files.iter().map(|file| file.secret.clone())).collect()
    }

    /// Keeps the signer in step with the files until cancelled.
    pub async fn keep(mut self, signer: Signer, stop: CancellationToken) {
        if self.files.is_empty() {
            return;
        }
        let mut period = interval(PERIOD);
        period.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = period.tick() => {}
                () = signer.refused() => {}
            }
            if self.read_again() {
                signer.replace(self.secrets());
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = sleep(PAUSE) => {}
            }
        }
    }

    /// Whether any secret changed.
    fn read_again(&mut self) -> bool {
        let mut changed = false;
        for file in &mut self.files {
            changed |= file.read_again();
        }
        changed
    }
}

impl SecretFile {
    fn read_again(&mut self) -> bool {
        let file = self.path.display();
        match read(&self.path) {
            Ok(secret) => {
                self.problem = None;
                if secret.expose_secret() == self.secret.expose_secret() {
                    return false;
                }
                info!(%file, "a shared secret changed");
                self.secret = secret;
                true
            }
            Err(error) => {
                let problem = error.to_string();
                if self.problem.as_ref() != Some(&problem) {
                    warn!(%file, problem, "a shared secret cannot be read again; the last one stays in force");
                }
                self.problem = Some(problem);
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn secrets(files: &SecretFiles) -> Vec<String> {
        files.secrets().iter().map(|secret| secret.expose_secret().to_owned()).collect()
    }

    #[test]
    fn a_file_holds_one_secret_and_its_line_end_is_not_part_of_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("secret");
        let longest = "x".repeat(4096);
        for (text, want) in
            [("a", "a"), ("a\n", "a"), ("a\r\n", "a"), ("a$b \n\n", "a$b \n"), (&longest, &longest)]
        {
            fs::write(&path, text).unwrap();
            assert_eq!(read(&path).unwrap().expose_secret(), want, "{text:?}");
        }
        for (bytes, problem) in [
            (&b""[..], "it is empty"),
            (b"\n", "it is empty"),
            (&[b'x'; 4097], "it is longer than 4096 bytes"),
            (b"a\xff", "it is not UTF-8"),
        ] {
            fs::write(&path, bytes).unwrap();
            assert_eq!(read(&path).unwrap_err().to_string(), problem);
        }
        assert_eq!(read(folder.path()).unwrap_err().to_string(), "it is not a regular file");
        let fifo = folder.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(read(&fifo).unwrap_err().to_string(), "it is not a regular file");
    }

    #[test]
    fn the_configurations_own_secret_is_first_unless_it_is_empty() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("secret");
        fs::write(&path, "new").unwrap();
        let open = |own: &str, paths: &[PathBuf]| SecretFiles::open(own.into(), paths).unwrap();
        assert_eq!(secrets(&open("old", std::slice::from_ref(&path))), ["old", "new"]);
        assert_eq!(secrets(&open("", std::slice::from_ref(&path))), ["new"]);
        assert_eq!(secrets(&open("", &[])), [""]);
        let gone = folder.path().join("gone");
        let error = SecretFiles::open("".into(), &[path, gone]).unwrap_err().to_string();
        assert!(error.contains("/gone: No such file or directory"), "{error}");
    }

    #[test]
    fn a_file_that_is_gone_or_half_written_leaves_its_secret_in_force() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("secret");
        fs::write(&path, "one").unwrap();
        let mut files = SecretFiles::open("".into(), std::slice::from_ref(&path)).unwrap();
        assert!(!files.read_again());
        fs::write(&path, "").unwrap();
        assert!(!files.read_again());
        fs::remove_file(&path).unwrap();
        assert!(!files.read_again());
        assert_eq!(secrets(&files), ["one"]);
        fs::write(&path, "two\n").unwrap();
        assert!(files.read_again());
        assert_eq!(secrets(&files), ["two"]);
        assert!(!format!("{files:?}").contains("two"));
    }
}
