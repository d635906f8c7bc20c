//! Addresses of OVSDB servers, as Neutron's options and Open vSwitch's tools write them.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::path::{Path, PathBuf};

/// The port that IANA assigned to OVSDB.
const PORT: u16 = 6640;

/// An OVSDB server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Remote {
    Unix(PathBuf),
    /// TCP without TLS.
    Tcp(Host, u16),
    /// TLS.
    Ssl(Host, u16),
}

impl Remote {
    /// Parses `unix:/path`, `tcp:host:port` or `ssl:host:port`. IPv6 addresses are in brackets.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (method, place) = text.trim().split_once(':')?;
        let endpoint = || -> Option<(Host, u16)> {
            // The last colon ends the host, unless it is part of an address in brackets.
            match place.rsplit_once(':') {
                Some((host, port)) if !port.ends_with(']') => Some((Host::parse(host)?, port.parse().ok()?)),
                _ => Some((Host::parse(place)?, PORT)),
            }
        };
        match method {
            "unix" => is_socket_path(place).then(|| Self::Unix(PathBuf::from(place))),
            "tcp" => endpoint().map(|(host, port)| Self::Tcp(host, port)),
            "ssl" => endpoint().map(|(host, port)| Self::Ssl(host, port)),
            _ => None,
        }
    }
}

impl fmt::Display for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(host, port) => write!(f, "tcp:{host}:{port}"),
            Self::Ssl(host, port) => write!(f, "ssl:{host}:{port}"),
        }
    }
}

/// A host: an address, or a name that is resolved at each connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Host {
    Address(IpAddr),
    Name(String),
}

impl Host {
    /// Parses an address, an IPv6 address in brackets, or a host name (RFC 1123, and `_` as in RFC
    /// 2782).
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        if let Some(bracketed) = text.strip_prefix('[') {
            let address: Ipv6Addr = bracketed.strip_suffix(']')?.parse().ok()?;
            return Some(Self::Address(IpAddr::V6(address)));
        }
        if let Ok(address) = text.parse() {
            return Some(Self::Address(address));
        }
        let name = text.strip_suffix('.').unwrap_or(text);
        let label = |label: &str| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        // A name that ends in a number is a mistyped address (URL standard, "ends in a number").
        let numeric = name.rsplit('.').next().is_some_and(|last| last.bytes().all(|b| b.is_ascii_digit()));
        (name.len() <= 253 && !numeric && name.split('.').all(label)).then(|| Self::Name(text.to_owned()))
    }
}

impl fmt::Display for Host {
    /// Writes IPv6 addresses in brackets, as in a URL.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(IpAddr::V6(address)) => write!(f, "[{address}]"),
            Self::Address(address @ IpAddr::V4(_)) => address.fmt(f),
            Self::Name(name) => name.fmt(f),
        }
    }
}

/// The kernel keeps a unix socket's path in 108 bytes, with the NUL at its end.
fn is_socket_path(text: &str) -> bool {
    Path::new(text).is_absolute() && text.len() < 108 && !text.contains(char::is_control)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remotes_read_as_they_are_shown() {
        for text in
            ["unix:/run/openvswitch/db.sock", "tcp:127.0.0.1:6640", "tcp:[::1]:6641", "ssl:ovs-1:6640"]
        {
            assert_eq!(Remote::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(Remote::parse("tcp:[fd00::1]").unwrap().to_string(), "tcp:[fd00::1]:6640");
        assert_eq!(Remote::parse("tcp:localhost").unwrap().to_string(), "tcp:localhost:6640");
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
            assert!(Remote::parse(text).is_none(), "{text}");
        }
    }

    #[test]
    fn hosts_are_addresses_or_names() {
        for (text, shown) in [
            ("127.0.0.1", "127.0.0.1"),
            ("::1", "[::1]"),
            ("[2001:db8::1]", "[2001:db8::1]"),
            ("nova.example.", "nova.example."),
            ("nova_metadata", "nova_metadata"),
            ("3com", "3com"),
        ] {
            assert_eq!(Host::parse(text).map(|host| host.to_string()).as_deref(), Some(shown), "{text:?}");
        }
        let long = format!("{}.example", "a".repeat(64));
        for text in [
            "",
            ".",
            "a..b",
            "10.0.0",
            "256.1.1.1",
            "1",
            "[::1",
            "::1]",
            "[127.0.0.1]",
            "fe80::1%eth0",
            "a b",
            "-a",
            "a-",
        ]
        .into_iter()
        .chain(["http://nova", "nova:80", "n\u{f6}va", "nova\n", long.as_str()])
        {
            assert_eq!(Host::parse(text), None, "{text:?}");
        }
    }
}
