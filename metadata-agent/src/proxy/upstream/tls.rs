//! TLS towards Nova. A file that was replaced counts for the next connection.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustls::ClientConfig;
use tls_files::ServerTrust;
pub use tls_files::{ClientCertificate, TlsSetupError};

#[derive(Debug, Clone, Default)]
pub struct TlsConfig {
    /// Certificates of the trusted authorities (`auth_ca_cert`). `None` means the host's.
    pub authorities: Option<PathBuf>,
    /// The agent's own certificate, if Nova requires one.
    pub identity: Option<ClientCertificate>,
    /// Accepts any certificate (`nova_metadata_insecure`).
    pub insecure: bool,
}

impl TlsConfig {
    fn read(&self) -> Result<ClientConfig, TlsSetupError> {
        let trust = match &self.authorities {
            _ if self.insecure => ServerTrust::Unverified,
            Some(path) => ServerTrust::Ca(path),
            None => ServerTrust::SystemCa,
        };
        tls_files::client_config(trust, self.identity.as_ref())
    }

    /// Returns what changes if a file is replaced. The host's own store is read once.
    fn versions(&self) -> Vec<Option<FileVersion>> {
        let identity = self.identity.iter().flat_map(|own| [&own.certificate, &own.key]);
        self.authorities.iter().chain(identity).map(|path| FileVersion::of(path)).collect()
    }
}

/// A file's device, inode, size, and time of change (seconds and nanoseconds).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FileVersion(u64, u64, u64, i64, i64);

impl FileVersion {
    fn of(path: &Path) -> Option<Self> {
        let found = fs::metadata(path).ok()?;
        Some(Self(found.dev(), found.ino(), found.size(), found.ctime(), found.ctime_nsec()))
    }
}

/// The TLS files, as they were read last.
#[derive(Debug)]
pub(super) struct TlsFiles {
    config: TlsConfig,
    current: Mutex<Current>,
}

#[derive(Debug)]
struct Current {
    client: Arc<ClientConfig>,
    versions: Vec<Option<FileVersion>>,
}

impl TlsFiles {
    pub(super) fn read(config: TlsConfig) -> Result<Self, TlsSetupError> {
        if config.insecure {
            tracing::warn!("Nova's certificate is not verified (nova_metadata_insecure)");
        }
        // Files that are replaced meanwhile are read once more.
        let versions = config.versions();
        let client = Arc::new(config.read()?);
        Ok(Self { config, current: Mutex::new(Current { client, versions }) })
    }

    /// Returns the configuration for a new connection. A look at the files takes microseconds, and
    /// the handshake that follows a millisecond. Files that cannot be used, as while they are
    /// being replaced, leave the last one in force.
    pub(super) fn client(&self) -> Arc<ClientConfig> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let versions = self.config.versions();
        if versions != current.versions {
            current.versions = versions;
            match self.config.read() {
                Ok(client) => {
                    current.client = Arc::new(client);
                    tracing::info!("TLS files for Nova read again");
                }
                Err(error) => tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "cannot read the replaced TLS files for Nova; keeping the last ones"
                ),
            }
        }
        Arc::clone(&current.client)
    }
}
