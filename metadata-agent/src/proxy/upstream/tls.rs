//! TLS towards Nova. Files are read once, when the upstream is built.

use std::path::PathBuf;

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

pub(super) fn client_config(config: &TlsConfig) -> Result<ClientConfig, TlsSetupError> {
    let trust = match &config.authorities {
        _ if config.insecure => {
            tracing::warn!("Nova's certificate is not verified (nova_metadata_insecure)");
            ServerTrust::Unverified
        }
        Some(path) => ServerTrust::Ca(path),
        None => ServerTrust::SystemCa,
    };
    tls_files::client_config(trust, config.identity.as_ref())
}
