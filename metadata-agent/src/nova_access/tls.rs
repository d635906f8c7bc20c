//! The TLS files for Nova, and what is done when one is replaced.
//!
//! A look at the files shows whether one was replaced. They are looked at every [`PERIOD`], and at
//! once if a certificate is refused. This works on any file system and with any number of symlinks.
//! Files that cannot be used, as while they are being replaced, leave the last ones in force.

use std::convert::Infallible;
use std::error::Error;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tls_files::{ClientCertificate, ServerTrust, TlsMaterial, TlsSetupError};
use tokio::time::{MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::process::blocking::blocking;
use crate::proxy::TlsFeed;

/// The interval between two looks at the files.
const PERIOD: Duration = Duration::from_secs(1);
/// The shortest pause between two looks, however often certificates are refused.
const PAUSE: Duration = Duration::from_millis(100);

/// The options for TLS towards Nova.
#[derive(Debug, Clone, Default)]
pub struct NovaTls {
    /// Certificates of the trusted authorities (`auth_ca_cert`). `None` means the host's.
    pub authorities: Option<PathBuf>,
    /// The agent's own certificate, if Nova requires one.
    pub identity: Option<ClientCertificate>,
    /// Accepts any certificate (`nova_metadata_insecure`).
    pub insecure: bool,
}

impl NovaTls {
    pub(crate) fn read(&self) -> Result<TlsMaterial, TlsSetupError> {
        let trust = match &self.authorities {
            _ if self.insecure => ServerTrust::Unverified,
            Some(path) => ServerTrust::Ca(path),
            None => ServerTrust::SystemCa,
        };
        TlsMaterial::read(trust, self.identity.as_ref())
    }

    /// Returns what changes if a file is replaced. The host's own store is read once.
    pub(crate) fn versions(&self) -> Vec<Option<FileVersion>> {
        let identity = self.identity.iter().flat_map(|own| [&own.certificate, &own.key]);
        self.authorities.iter().chain(identity).map(|path| FileVersion::of(path)).collect()
    }
}

/// A file's device, inode, size, and time of change (seconds and nanoseconds).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FileVersion(u64, u64, u64, i64, i64);

impl FileVersion {
    fn of(path: &Path) -> Option<Self> {
        let found = fs::metadata(path).ok()?;
        Some(Self(found.dev(), found.ino(), found.size(), found.ctime(), found.ctime_nsec()))
    }
}

/// Uses the content of TLS files, in this process or in another one.
pub trait TlsUser: Send + 'static {
    /// Waits until a certificate was refused, and returns the number of the refusal. Cancelling the
    /// wait loses nothing.
    fn refused(&mut self) -> impl Future<Output = u64> + Send;

    /// Puts other material in force for connections that begin from now on.
    ///
    /// # Errors
    /// The material cannot be used. The former one stays in force.
    fn replace(&self, material: TlsMaterial) -> Result<(), TlsSetupError>;

    /// Reports the end of a check that began after this refusal and those before it.
    fn checked(&self, refusal: u64);
}

impl TlsUser for TlsFeed {
    fn refused(&mut self) -> impl Future<Output = u64> + Send {
        Self::refused(self)
    }

    fn replace(&self, material: TlsMaterial) -> Result<(), TlsSetupError> {
        Self::replace(self, material)
    }

    fn checked(&self, refusal: u64) {
        Self::checked(self, refusal);
    }
}

/// The TLS files, as they were read last.
#[derive(Debug)]
pub struct TlsFileWatch<U> {
    files: NovaTls,
    versions: Vec<Option<FileVersion>>,
    user: U,
}

impl<U: TlsUser> TlsFileWatch<U> {
    pub(crate) fn new(files: NovaTls, versions: Vec<Option<FileVersion>>, user: U) -> Self {
        if files.insecure {
            warn!("Nova's certificate is not verified (nova_metadata_insecure)");
        }
        Self { files, versions, user }
    }

    /// Puts replaced files in force, until cancelled.
    pub async fn keep(self, stop: CancellationToken) {
        // A file that cannot be read to its end must not delay the stop.
        let _stopped = stop.run_until_cancelled(self.follow()).await;
    }

    async fn follow(mut self) -> Option<Infallible> {
        let mut period = interval(PERIOD);
        period.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let refusal = tokio::select! {
                _ = period.tick() => None,
                refusal = self.user.refused() => Some(refusal),
            };
            let check = move || {
                self.check();
                self
            };
            self = blocking(check).await?;
            if let Some(refusal) = refusal {
                self.user.checked(refusal);
            }
            sleep(PAUSE).await;
        }
    }

    /// Looks at the files, and reads them again if one has changed.
    fn check(&mut self) {
        let versions = self.files.versions();
        if versions != self.versions {
            self.versions = versions;
            match self.files.read().and_then(|material| self.user.replace(material)) {
                Ok(()) => info!("TLS files for Nova read again"),
                Err(error) => error!(
                    error = &error as &dyn Error,
                    "cannot read the replaced TLS files for Nova; keeping the last ones"
                ),
            }
        }
    }
}
