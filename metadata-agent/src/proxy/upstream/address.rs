//! Addresses of the metadata API: Nova's over TCP, Neutron's metadata agent's on a unix socket.

use std::fmt;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hyper::Uri;
use hyper::header::HeaderValue;
use hyper::http::uri;
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
pub enum Scheme {
    Http,
    Https,
}

/// A host and port that do not form a URL.
#[derive(Debug, thiserror::Error)]
#[error("host `{host}` and port {port} do not form a URL")]
pub struct EndpointError {
    host: String,
    port: u16,
}

/// One address of the metadata API, and its `Host` header.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(try_from = "EndpointRecord", into = "EndpointRecord")]
pub struct Endpoint {
    pub(super) address: UpstreamAddress,
    pub(super) host: HeaderValue,
}

#[derive(Debug, Clone)]
pub(crate) enum UpstreamAddress {
    Tcp(Uri),
    Unix(Arc<Path>),
}

impl fmt::Display for UpstreamAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(url) => url.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl Endpoint {
    /// Accepts a name, an IPv4 address, or an IPv6 address with or without brackets.
    ///
    /// # Errors
    /// [`EndpointError`] if host and port do not form a URL.
    pub fn new(scheme: Scheme, host: &str, port: u16) -> Result<Self, EndpointError> {
        let error = || EndpointError { host: host.to_owned(), port };
        let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
        let authority = match bare.parse::<Ipv6Addr>() {
            Ok(address) => format!("[{address}]:{port}"),
            Err(_) => format!("{host}:{port}"),
        };
        let scheme = match scheme {
            Scheme::Http => "http",
            Scheme::Https => "https",
        };
        let host = HeaderValue::from_str(&authority).map_err(|_| error())?;
        let url = Uri::builder().scheme(scheme).authority(authority).path_and_query("/").build();
        let url = url.map_err(|_| error())?;
        if url.host().is_none_or(str::is_empty) {
            Err(error())
        } else {
            Ok(Self { address: UpstreamAddress::Tcp(url), host })
        }
    }

    /// Returns the endpoint of an HTTP server on a unix socket.
    #[must_use]
    pub(crate) fn socket(path: &Path) -> Self {
        // As haproxy forwards it: guests send this host.
        Self {
            address: UpstreamAddress::Unix(path.into()),
            host: HeaderValue::from_static("169.254.169.254"),
        }
    }

    /// Returns whether connections go to this host and port.
    pub(crate) fn is_at(&self, host: &str, port: u16) -> bool {
        match &self.address {
            UpstreamAddress::Tcp(url) => url.host() == Some(host) && url.port_u16() == Some(port),
            UpstreamAddress::Unix(_) => false,
        }
    }

    /// Returns whether connections go to this unix socket.
    pub(crate) fn is_socket(&self, path: &Path) -> bool {
        matches!(&self.address, UpstreamAddress::Unix(own) if **own == *path)
    }

    pub(super) fn is_https(&self) -> bool {
        matches!(&self.address, UpstreamAddress::Tcp(url) if url.scheme() == Some(&uri::Scheme::HTTPS))
    }
}

/// An [`Endpoint`] in a message.
#[derive(Deserialize, Serialize)]
enum EndpointRecord {
    Tcp { scheme: Scheme, host: String, port: u16 },
    Unix(PathBuf),
}

impl From<Endpoint> for EndpointRecord {
    fn from(endpoint: Endpoint) -> Self {
        let scheme = if endpoint.is_https() { Scheme::Https } else { Scheme::Http };
        match endpoint.address {
            UpstreamAddress::Tcp(url) => Self::Tcp {
                scheme,
                host: url.host().unwrap_or_default().to_owned(),
                port: url.port_u16().unwrap_or_default(),
            },
            UpstreamAddress::Unix(path) => Self::Unix(path.to_path_buf()),
        }
    }
}

impl TryFrom<EndpointRecord> for Endpoint {
    type Error = EndpointError;

    fn try_from(record: EndpointRecord) -> Result<Self, EndpointError> {
        match record {
            EndpointRecord::Tcp { scheme, host, port } => Self::new(scheme, &host, port),
            EndpointRecord::Unix(path) => Ok(Self::socket(&path)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_host_makes_a_host_header() {
        for (host, want) in [
            ("nova.example", "nova.example:8775"),
            ("192.0.2.1", "192.0.2.1:8775"),
            ("2001:db8::1", "[2001:db8::1]:8775"),
            ("[2001:db8::1]", "[2001:db8::1]:8775"),
        ] {
            let endpoint = Endpoint::new(Scheme::Http, host, 8775).unwrap();
            assert_eq!(endpoint.host, want);
            assert_eq!(endpoint.address.to_string(), format!("http://{want}/"));
        }
        for bad in ["", "a b", "a/b", "a\r\nx: y"] {
            assert!(Endpoint::new(Scheme::Http, bad, 8775).is_err(), "{bad:?}");
        }
    }
}
