//! Where an OVSDB server is, as Neutron's options and Open vSwitch's tools write it.

use std::fmt;
use std::path::PathBuf;

use super::rule::{Rejected, Rule, SocketPath};
use super::value::Host;

/// The port that IANA gave to OVSDB.
const PORT: u16 = 6640;

/// An OVSDB server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OvsdbRemote {
    /// On a unix socket.
    Unix(PathBuf),
    /// Over TCP, in the clear.
    Tcp(Host, u16),
    /// Over TLS.
    Ssl(Host, u16),
}

impl OvsdbRemote {
    /// Reads `unix:/path`, `tcp:host:port` or `ssl:host:port`; an IPv6 address stands in brackets.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (method, place) = text.trim().split_once(':')?;
        let endpoint = || -> Option<(Host, u16)> {
            // The last colon ends the host, unless it is one of an address in brackets.
            match place.rsplit_once(':') {
                Some((host, port)) if !port.ends_with(']') => Some((Host::parse(host)?, port.parse().ok()?)),
                _ => Some((Host::parse(place)?, PORT)),
            }
        };
        match method {
            "unix" => SocketPath.read(place).ok().map(Self::Unix),
            "tcp" => endpoint().map(|(host, port)| Self::Tcp(host, port)),
            "ssl" => endpoint().map(|(host, port)| Self::Ssl(host, port)),
            _ => None,
        }
    }
}

impl fmt::Display for OvsdbRemote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(host, port) => write!(f, "tcp:{host}:{port}"),
            Self::Ssl(host, port) => write!(f, "ssl:{host}:{port}"),
        }
    }
}

/// An OVSDB server.
pub struct Remote;

impl Rule<OvsdbRemote> for Remote {
    fn read(&self, text: &str) -> Result<OvsdbRemote, Rejected> {
        OvsdbRemote::parse(text).ok_or(Rejected::NotAccepted)
    }

    fn accepts(&self) -> String {
        "unix:/path, tcp:host:port or ssl:host:port".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remotes_read_as_they_are_shown() {
        for text in
            ["unix:/run/openvswitch/db.sock", "tcp:127.0.0.1:6640", "tcp:[::1]:6641", "ssl:ovs-1:6640"]
        {
            assert_eq!(OvsdbRemote::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(OvsdbRemote::parse("tcp:[fd00::1]").unwrap().to_string(), "tcp:[fd00::1]:6640");
        assert_eq!(OvsdbRemote::parse("tcp:localhost").unwrap().to_string(), "tcp:localhost:6640");
        let bad = [
            "",
            "unix:",
            "unix:db.sock",
            "/run/db.sock",
            "tcp:",
            "tcp:a:b",
            "tcp::6640",
            "punix:/a",
            "tcp:a:65536",
        ];
        for text in bad {
            assert!(OvsdbRemote::parse(text).is_none(), "{text}");
        }
    }
}
