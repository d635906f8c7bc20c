//! TLS as Open vSwitch and OVN use it: both sides present certificates of a private CA.
//!
//! A server is accepted if its certificate is valid now and signed by a configured CA. Its name is
//! not verified: an OVSDB certificate need not contain a matching name (ovs-pki(8) puts an
//! arbitrary word there), and Open vSwitch's own clients do not verify it either
//! (lib/stream-ssl.c). Any holder of a certificate of that CA can therefore impersonate the server,
//! so the CA should sign OVSDB certificates only.
//!
//! The files are read for each connection, so new certificates take effect without a restart.

use std::net::{IpAddr, Ipv6Addr};
use std::path::PathBuf;
use std::sync::Arc;

use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tls_files::{ClientCertificate, ServerTrust};
use tokio::net::TcpStream;
use tokio::task::spawn_blocking;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::SessionError;
use crate::remote::Host;

/// PEM files with the client's certificate and the accepted CAs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsFiles {
    pub private_key: Option<PathBuf>,
    pub certificate: Option<PathBuf>,
    pub ca_certificates: Option<PathBuf>,
}

pub(crate) async fn handshake(
    stream: TcpStream,
    host: &Host,
    files: &TlsFiles,
) -> Result<TlsStream<TcpStream>, SessionError> {
    let files = files.clone();
    let config = spawn_blocking(move || client_config(files)).await;
    let config = config.map_err(|lost| SessionError::Connect(lost.into()))??;
    let name = match host {
        Host::Address(address) => ServerName::from(*address),
        // A name that cannot be in a certificate is not sent to the server either.
        Host::Name(name) => ServerName::try_from(name.as_str().to_owned())
            .unwrap_or_else(|_| IpAddr::V6(Ipv6Addr::UNSPECIFIED).into()),
    };
    TlsConnector::from(Arc::new(config)).connect(name, stream).await.map_err(SessionError::TlsHandshake)
}

fn client_config(files: TlsFiles) -> Result<ClientConfig, SessionError> {
    let TlsFiles { private_key, certificate, ca_certificates } = files;
    let ca_certificates = ca_certificates.ok_or(SessionError::NoCaCertificates)?;
    let identity = match (certificate, private_key) {
        (Some(certificate), Some(key)) => Some(ClientCertificate { certificate, key }),
        (None, None) => None,
        (Some(_), None) | (None, Some(_)) => return Err(SessionError::IncompleteIdentity),
    };
    let trust = ServerTrust::AnyNameOfCa(&ca_certificates);
    tls_files::client_config(trust, identity.as_ref()).map_err(SessionError::TlsSetup)
}
