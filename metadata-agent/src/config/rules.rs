//! Rules for options whose values are types of the agent's components.

use std::path::PathBuf;

use oslo_config::rule::AbsolutePath;
use oslo_config::{Rejected, Rule};
use ovsdb_client::{Host, Remote};

use crate::net::name_pattern::NamePattern;
use crate::secrets;
use crate::sources::neutron::HttpUrl;

/// A host name or address.
pub(crate) struct HostName;

impl Rule<Host> for HostName {
    fn read(&self, text: &str) -> Result<Host, Rejected> {
        Host::parse(text.trim()).ok_or(Rejected::NotAccepted)
    }

    fn accepts(&self) -> String {
        "a host name, an IPv4 address or an IPv6 address".to_owned()
    }
}

/// A name pattern.
pub(crate) struct Pattern;

impl Rule<NamePattern> for Pattern {
    fn read(&self, text: &str) -> Result<NamePattern, Rejected> {
        NamePattern::parse(text).ok_or(Rejected::NotAccepted)
    }

    fn accepts(&self) -> String {
        "a name in which * stands for any characters and ? for one".to_owned()
    }
}

/// The path of a file that holds a secret now.
pub(crate) struct SecretFile;

impl Rule<PathBuf> for SecretFile {
    fn read(&self, text: &str) -> Result<PathBuf, Rejected> {
        let path = AbsolutePath.read(text)?;
        secrets::read(&path).map_err(Rejected::Unreadable)?;
        Ok(path)
    }

    fn accepts(&self) -> String {
        "the absolute path of a readable file that is not empty".to_owned()
    }
}

/// An [`HttpUrl`].
pub(crate) struct Web;

impl Rule<HttpUrl> for Web {
    fn read(&self, text: &str) -> Result<HttpUrl, Rejected> {
        HttpUrl::parse(text).ok_or(Rejected::NotAccepted)
    }

    fn accepts(&self) -> String {
        "a URL that begins with http:// or https://, without user and query".to_owned()
    }
}

/// An OVSDB server.
pub(crate) struct OvsdbServer;

impl Rule<Remote> for OvsdbServer {
    fn read(&self, text: &str) -> Result<Remote, Rejected> {
        Remote::parse(text).ok_or(Rejected::NotAccepted)
    }

    fn accepts(&self) -> String {
        "unix:/path, tcp:host:port or ssl:host:port".to_owned()
    }
}
