//! TLS towards Nova: whom to believe and who we are. Files are read once, when the upstream is built.

use std::path::PathBuf;

use rustls::{ClientConfig, RootCertStore};

use crate::tls::{self, Trust};
pub use crate::tls::{ClientCertificate, TlsSetupError};

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
            Trust::Anybody
        }
        Some(path) => Trust::Authorities(path),
        None => Trust::HostAuthorities,
    };
    let builder = tls::believing(trust)?;
    tls::with_identity(builder, config.identity.as_ref())
}

/// Believes nobody and reads no file: for a Nova without TLS, on a host that may have no certificates at all.
pub(super) fn unused() -> Result<ClientConfig, TlsSetupError> {
    let builder = tls::builder(&tls::provider())?;
    Ok(builder.with_root_certificates(RootCertStore::empty()).with_no_client_auth())
}
