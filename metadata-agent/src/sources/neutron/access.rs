//! Endpoint, credentials and trust settings for Neutron's API.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use hyper::Uri;
use secrecy::SecretString;

/// Endpoint, credentials and trust settings for Neutron's API.
#[derive(Clone, Debug)]
pub(crate) struct NeutronAccess {
    pub auth: NeutronAuth,
    /// Neutron's URL. Without it, Keystone's catalog names it.
    pub endpoint: Option<HttpUrl>,
    /// Region in the catalog. Without it, the catalog must have exactly one.
    pub region: Option<String>,
    pub interface: NeutronInterface,
    /// PEM file of trusted ca_certificates. Without it, the host's own are trusted.
    pub ca_certificates: Option<PathBuf>,
    /// Accepts any server certificate.
    pub insecure: bool,
    /// Limit for each response and for obtaining a token.
    pub timeout: Duration,
}

/// Authentication to Neutron.
#[derive(Clone, Debug)]
pub(crate) enum NeutronAuth {
    /// Neutron runs without Keystone.
    NoAuth {
        endpoint: HttpUrl,
    },
    Keystone {
        url: HttpUrl,
        credentials: Credentials,
    },
}

/// Credentials for Keystone.
#[derive(Clone, Debug)]
pub(crate) enum Credentials {
    /// A user in a project.
    Password {
        user: String,
        user_domain: Domain,
        password: SecretString,
        project: String,
        project_domain: Domain,
    },
    /// An application credential, which stands for a user in a project.
    Application { id: String, secret: SecretString },
}

/// A Keystone domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Domain {
    Id(String),
    Name(String),
}

/// The interface of a service in Keystone's catalog.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NeutronInterface {
    Public,
    Internal,
    Admin,
}

impl fmt::Display for NeutronInterface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Public => "public",
            Self::Internal => "internal",
            Self::Admin => "admin",
        })
    }
}

/// An absolute `http` or `https` URL without user, query, fragment and trailing slash.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct HttpUrl(String);

impl HttpUrl {
    #[must_use]
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let text = text.trim().trim_end_matches('/');
        let uri: Uri = text.parse().ok()?;
        let known = matches!(uri.scheme_str(), Some("http" | "https"));
        let authority = uri.authority()?;
        let plain = !authority.as_str().contains('@') && !authority.host().is_empty();
        let bare = uri.query().is_none() && !text.contains('#');
        (known && plain && bare).then(|| Self(text.to_owned()))
    }

    #[must_use]
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for HttpUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_absolute_and_says_no_more_than_where() {
        for (text, want) in [
            ("http://controller:5000/v3/", "http://controller:5000/v3"),
            ("https://[fd00::1]:9696", "https://[fd00::1]:9696"),
            ("https://api.example/networking", "https://api.example/networking"),
        ] {
            assert_eq!(HttpUrl::parse(text).unwrap().as_str(), want);
        }
        for bad in
            ["", "controller:5000", "ftp://a", "http://", "http://u:p@a", "http://a/?b", "http://a/#b", "/v3"]
        {
            assert_eq!(HttpUrl::parse(bad), None, "{bad}");
        }
    }
}
