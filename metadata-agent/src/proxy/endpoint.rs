//! Where the metadata API is, as the place to connect to and as `Host` header: Nova's over TCP, that of Neutron's metadata
//! agent on a unix socket.

use std::fmt;
use std::net::Ipv6Addr;
use std::path::Path;
use std::sync::Arc;

use hyper::Uri;
use hyper::header::HeaderValue;
use hyper::http::uri;

/// How Nova is spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    /// Plain.
    Http,
    /// TLS.
    Https,
}

/// Why a host and port are no endpoint.
#[derive(Debug, thiserror::Error)]
#[error("`{host}` port {port} is no address of a metadata API")]
pub struct EndpointError {
    host: String,
    port: u16,
}

/// One address of the metadata API.
#[derive(Debug, Clone)]
pub struct Endpoint {
    pub(super) place: Place,
    pub(super) host: HeaderValue,
}

/// What to connect to.
#[derive(Debug, Clone)]
pub(super) enum Place {
    Url(Uri),
    Socket(Arc<Path>),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Url(url) => url.fmt(f),
            Self::Socket(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl Endpoint {
    /// Takes a name, an IPv4 or an IPv6 address, the latter with or without brackets.
    ///
    /// # Errors
    /// [`EndpointError`] if it does not make a URL.
    pub fn new(scheme: Scheme, host: &str, port: u16) -> Result<Self, EndpointError> {
        let fault = || EndpointError { host: host.to_owned(), port };
        let address = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
        let authority = match address.parse::<Ipv6Addr>() {
            Ok(address) => format!("[{address}]:{port}"),
            Err(_) => format!("{host}:{port}"),
        };
        let scheme = match scheme {
            Scheme::Http => "http",
            Scheme::Https => "https",
        };
        let host = HeaderValue::from_str(&authority).map_err(|_| fault())?;
        let url = Uri::builder().scheme(scheme).authority(authority).path_and_query("/").build();
        let url = url.map_err(|_| fault())?;
        if url.host().is_none_or(str::is_empty) {
            Err(fault())
        } else {
            Ok(Self { place: Place::Url(url), host })
        }
    }

    /// A unix socket on which HTTP is spoken.
    #[must_use]
    pub fn socket(path: &Path) -> Self {
        // What haproxy passes on: guests ask for this host.
        Self { place: Place::Socket(path.into()), host: HeaderValue::from_static("169.254.169.254") }
    }

    pub(super) fn is_https(&self) -> bool {
        matches!(&self.place, Place::Url(url) if url.scheme() == Some(&uri::Scheme::HTTPS))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_of_all_kinds_make_a_host_header() {
        for (host, want) in [
            ("nova.example", "nova.example:8775"),
            ("192.0.2.1", "192.0.2.1:8775"),
            ("2001:db8::1", "[2001:db8::1]:8775"),
            ("[2001:db8::1]", "[2001:db8::1]:8775"),
        ] {
            let endpoint = Endpoint::new(Scheme::Http, host, 8775).unwrap();
            assert_eq!(endpoint.host, want);
            assert_eq!(endpoint.place.to_string(), format!("http://{want}/"));
        }
        for bad in ["", "a b", "a/b", "a\r\nx: y"] {
            assert!(Endpoint::new(Scheme::Http, bad, 8775).is_err(), "{bad:?}");
        }
    }
}
