//! Keeps the shared secrets in force: those in files, which are read again and again, and the one
//! in the configuration.
//!
//! The files are small and few, so they are read again every [`PERIOD`], and at once if Nova
//! refuses all secrets. This works on any file system and with any number of symlinks. A watch
//! would miss changes: a Kubernetes secret changes by a symlink in the middle of its path.
//!
//! A file that cannot be read, or is empty because it is being written, keeps its last secret in
//! force.

use std::convert::Infallible;
use std::fs::OpenOptions;
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::OFlag;
use secrecy::{ExposeSecret, SecretString};
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::Signer;
use crate::process::blocking::blocking;

/// The interval between two readings of the files.
const PERIOD: Duration = Duration::from_secs(2);
/// The shortest pause between two readings, however often Nova refuses.
const PAUSE: Duration = Duration::from_millis(100);
/// Far longer than any reasonable secret.
const MAX_BYTES: u64 = 4096;

/// Reads the secret in a file: its text without the line end.
///
/// # Errors
/// The file cannot be read, is not a regular file, is empty, too long or not UTF-8.
pub(crate) fn read(path: &Path) -> io::Result<SecretString> {
    let fail = |kind, problem: &'static str| Err(io::Error::new(kind, problem));
    // Without O_NONBLOCK, opening a FIFO would wait for a writer.
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let file = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path)?;
    if !file.metadata()?.is_file() {
        return fail(io::ErrorKind::InvalidInput, "it is not a regular file");
    }
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_BYTES {
        return fail(io::ErrorKind::InvalidData, "it is longer than 4096 bytes");
    }
    let Ok(text) = String::from_utf8(bytes) else {
        return fail(io::ErrorKind::InvalidData, "it is not UTF-8");
    };
    let line = text.strip_suffix('\n').unwrap_or(&text);
    match line.strip_suffix('\r').unwrap_or(line) {
        "" => fail(io::ErrorKind::InvalidData, "it is empty"),
        secret => Ok(SecretString::from(secret)),
    }
}

#[derive(Debug, thiserror::Error)]
#[error("cannot read the shared secret in {}: {source}", path.display())]
pub struct SecretFileError {
    path: PathBuf,
    source: io::Error,
}

/// The shared secrets and their files.
#[derive(Debug)]
pub struct SecretFiles {
    /// The secret in the configuration.
    own: SecretString,
    files: Vec<TrackedFile>,
}

#[derive(Debug)]
struct TrackedFile {
    path: PathBuf,
    secret: SecretString,
    /// The last error, which is logged once.
    problem: Option<String>,
}

impl SecretFiles {
    /// Reads all files.
    ///
    /// # Errors
    /// The first file that cannot be read.
    pub fn open(own: SecretString, paths: &[PathBuf]) -> Result<Self, SecretFileError> {
        let open = |path: &PathBuf| match read(path) {
            Ok(secret) => Ok(TrackedFile { path: path.clone(), secret, problem: None }),
            Err(source) => Err(SecretFileError { path: path.clone(), source }),
        };
        Ok(Self { own, files: paths.iter().map(open).collect::<Result<_, _>>()? })
    }

    /// Returns a signer with all secrets, the one in the configuration first.
    #[must_use]
    pub fn signer(&self) -> Signer {
        let signer = Signer::new(self.own.clone());
        signer.replace(self.secrets());
        signer
    }

    /// Leaves out an empty secret in the configuration if there are files.
    fn secrets(&self) -> Vec<SecretString> {
        let own = (self.files.is_empty() || !self.own.expose_secret().is_empty()).then(|| self.own.clone());
        own.into_iter().chain(self.files.iter().map(|file| file.secret.clone())).collect()
    }

    /// Updates the signer whenever a file or the secret in the configuration (`own`) changes, until
    /// cancelled.
    pub async fn keep(self, own: watch::Receiver<SecretString>, signer: Signer, stop: CancellationToken) {
        // A file that cannot be read to its end must not delay the stop.
        let _stopped = stop.run_until_cancelled(self.follow(own, signer)).await;
    }

    async fn follow(mut self, mut own: watch::Receiver<SecretString>, signer: Signer) -> Option<Infallible> {
        // It may have changed since the files were opened.
        own.mark_changed();
        let mut period = interval(PERIOD);
        period.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                Ok(()) = own.changed() => {
                    let secret = own.borrow_and_update().clone();
                    if let Some(secrets) = self.replace_own(secret) {
                        signer.replace(secrets);
                    }
                    continue;
                }
                _ = period.tick(), if !self.files.is_empty() => {}
                () = signer.refused(), if !self.files.is_empty() => {}
                else => return None,
            }
            let reload = move || {
                let secrets = self.reload();
                (self, secrets)
            };
            let secrets;
            (self, secrets) = blocking(reload).await?;
            if let Some(secrets) = secrets {
                signer.replace(secrets);
            }
            sleep(PAUSE).await;
        }
    }

    /// Replaces the secret in the configuration, and returns all secrets if it has changed.
    fn replace_own(&mut self, own: SecretString) -> Option<Vec<SecretString>> {
        let is_changed = own.expose_secret() != self.own.expose_secret();
        self.own = own;
        is_changed.then(|| self.secrets())
    }

    /// Reads the files again, and returns all secrets if one has changed.
    fn reload(&mut self) -> Option<Vec<SecretString>> {
        let mut changed = false;
        for file in &mut self.files {
            if let Some(secret) = file.reload() {
                file.secret = secret;
                changed = true;
            }
        }
        changed.then(|| self.secrets())
    }
}

impl TrackedFile {
    /// Reads the file again, and returns its secret if it has changed.
    fn reload(&mut self) -> Option<SecretString> {
        let file = self.path.display();
        match read(&self.path) {
            Ok(secret) => {
                self.problem = None;
                if secret.expose_secret() == self.secret.expose_secret() {
                    return None;
                }
                info!(%file, "shared secret changed");
                Some(secret)
            }
            Err(error) => {
                let problem = error.to_string();
                if self.problem.as_ref() != Some(&problem) {
                    warn!(%file, error = problem, "cannot reload shared secret; keeping the last one");
                }
                self.problem = Some(problem);
                None
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
    fn a_file_has_one_secret_without_its_line_end() {
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
    fn the_configured_secret_is_first_unless_it_is_empty() {
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

    #[tokio::test]
    async fn a_changed_secret_in_the_configuration_is_put_in_force() {
        let files = SecretFiles::open("old".into(), &[]).unwrap();
        let signer = files.signer();
        let generation = signer.generation();
        let own = watch::Sender::new(SecretString::from("old"));
        let stop = CancellationToken::new();
        let kept = tokio::spawn(files.keep(own.subscribe(), signer.clone(), stop.clone()));
        own.send_replace("new".into());
        signer.replaced(generation).await;
        let instance = "e2c9b3a0-5c2e-4b1c-8f52-1d7a0a1f6b11".parse().unwrap();
        let expected = Signer::new("new".into()).sign(&instance);
        let status = signer.status();
        assert_eq!(signer.sign(&instance).first(&status), expected.first(&status));
        stop.cancel();
        kept.await.unwrap();
    }

    #[test]
    fn a_missing_or_empty_file_keeps_its_last_secret() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("secret");
        fs::write(&path, "one").unwrap();
        let mut files = SecretFiles::open("".into(), std::slice::from_ref(&path)).unwrap();
        assert!(files.reload().is_none());
        fs::write(&path, "").unwrap();
        assert!(files.reload().is_none());
        fs::remove_file(&path).unwrap();
        assert!(files.reload().is_none());
        assert_eq!(secrets(&files), ["one"]);
        fs::write(&path, "two\n").unwrap();
        assert!(files.reload().is_some());
        assert_eq!(secrets(&files), ["two"]);
        assert!(!format!("{files:?}").contains("two"));
    }
}
