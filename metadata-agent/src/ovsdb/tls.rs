//! TLS as Open vSwitch and OVN speak it: both sides have certificates of authorities of their own making.
//!
//! A server is believed if one of the authorities signed its certificate and the certificate is valid now. Its name is not
//! looked at: a certificate for OVSDB need not carry one that would match (ovs-pki(8) makes it for a word of the caller's
//! choice), and Open vSwitch's own clients do not look either (lib/stream-ssl.c). Whoever holds a certificate of that
//! authority can therefore pose as the server, and the authority should sign for nobody else.
//!
//! The files are read at each connection, so that new ones need no restart.

use std::net::{IpAddr, Ipv6Addr};
use std::path::PathBuf;
use std::sync::Arc;

use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::task::spawn_blocking;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::SessionError;
use super::remote::Host;
use crate::tls::{self, ClientCertificate, Trust};

/// Where our own certificate and those of the authorities are, PEM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsFiles {
    /// Our private key.
    pub private_key: Option<PathBuf>,
    /// Our certificate.
    pub certificate: Option<PathBuf>,
    /// Certificates of the authorities to believe.
    pub authorities: Option<PathBuf>,
}

/// Makes a connection a TLS one.
pub(super) async fn handshake(
    stream: TcpStream,
    host: &Host,
    files: &TlsFiles,
) -> Result<TlsStream<TcpStream>, SessionError> {
    let files = files.clone();
    let config = spawn_blocking(move || client_config(files)).await;
    let config = config.map_err(|lost| SessionError::Connect(lost.into()))??;
    let name = match host {
        Host::Address(address) => ServerName::from(*address),
        // What is no name for a certificate is not told to the server either.
        Host::Name(name) => ServerName::try_from(name.as_str().to_owned())
            .unwrap_or_else(|_| IpAddr::V6(Ipv6Addr::UNSPECIFIED).into()),
    };
    TlsConnector::from(Arc::new(config)).connect(name, stream).await.map_err(SessionError::Handshake)
}

fn client_config(files: TlsFiles) -> Result<ClientConfig, SessionError> {
    let TlsFiles { private_key, certificate, authorities } = files;
    let authorities = authorities.ok_or(SessionError::NoAuthorities)?;
    let identity = match (certificate, private_key) {
        (Some(certificate), Some(key)) => Some(ClientCertificate { certificate, key }),
        (None, None) => None,
        (Some(_), None) | (None, Some(_)) => return Err(SessionError::HalfIdentity),
    };
    tls::believing(Trust::AnybodyOf(&authorities))
        .and_then(|builder| tls::with_identity(builder, identity.as_ref()))
        .map_err(SessionError::TlsSetup)
}
