//! TLS towards Nova: whom to believe and who we are. Files are read once, when the upstream is built.

use std::path::PathBuf;

use rustls::ClientConfig;

use tls_files::ServerTrust;
pub use tls_files::{ClientCertificate, TlsSetupError};

/// How to speak TLS to Nova.
#[derive(Debug, Clone, Default)]
pub struct TlsConfig {
    /// Certificates of the authorities to believe (`auth_ca_cert`); without it, the host's.
    pub authorities: Option<PathBuf>,
    /// Our own certificate, if Nova asks for one.
    pub identity: Option<ClientCertificate>,
    /// Believe anybody (`nova_metadata_insecure`).
    pub insecure: bool,
}

/// Reads the files and makes the client's configuration.
pub(super) fn client_config(config: &TlsConfig) -> Result<ClientConfig, TlsSetupError> {
    let trust = match &config.authorities {
        _ if config.insecure => {
            tracing::warn!("the certificate of Nova's metadata API is not verified (nova_metadata_insecure)");
            ServerTrust::Unverified
        }
        Some(path) => ServerTrust::Ca(path),
        None => ServerTrust::SystemCa,
    };
    tls_files::client_config(trust, config.identity.as_ref())
}

/// Believes nobody and reads no file: for a Nova without TLS, on a host that may have no certificates at all.
pub(super) fn unused() -> Result<ClientConfig, TlsSetupError> {
    tls_files::client_config_without_trust()
}
