//! The types that options have once they are read. Each is valid by construction.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

use serde::Serialize;

/// An enumeration whose values have names in the configuration.
pub trait Words: Copy + Sized + 'static {
    /// Every value with its name.
    const WORDS: &'static [(&'static str, Self)];
}

macro_rules! words {
    ($($(#[$doc:meta])+ $name:ident { $($(#[$value_doc:meta])+ $value:ident = $word:literal,)+ })+) => {$(
        $(#[$doc])+
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
        #[serde(rename_all = "kebab-case")]
        pub enum $name {
            $($(#[$value_doc])+ $value,)+
        }

        impl Words for $name {
            const WORDS: &'static [(&'static str, Self)] = &[$(($word, Self::$value),)+];
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$value => $word,)+ })
            }
        }
    )+};
}

words! {
    /// How Nova is spoken to.
    Scheme {
        /// In the clear.
        Http = "http",
        /// Over TLS.
        Https = "https",
    }

    /// Who is asked for metadata.
    Upstream {
        /// Nova's metadata API.
        Nova = "nova",
        /// The metadata agent beside Neutron's L3 and DHCP agents.
        NeutronAgent = "neutron-agent",
        /// OVN's metadata agent.
        OvnAgent = "ovn-agent",
    }

    /// What Keystone is shown to let us ask Neutron, as keystoneauth names it.
    NeutronAuthType {
        /// A user's name and password.
        Password = "password",
        /// An application credential.
        ApplicationCredential = "v3applicationcredential",
        /// Nothing: Neutron runs without Keystone.
        Nobody = "none",
    }

    /// The catalogue's interface.
    NeutronInterface {
        /// For everybody.
        Public = "public",
        /// For services.
        Internal = "internal",
        /// For administrators.
        Admin = "admin",
    }

    /// How strictly the source of a guest's packets is compared with its port.
    SourceCheck {
        /// MAC address and IPv4 addresses.
        Strict = "strict",
        /// MAC address alone.
        Mac = "mac",
        /// Not at all.
        Off = "off",
    }

    /// How the programs are attached to guest interfaces.
    AttachMode {
        /// TCX where the kernel has it, clsact otherwise.
        Auto = "auto",
        /// TCX or not at all.
        Tcx = "tcx",
        /// A filter on a clsact qdisc.
        Clsact = "clsact",
    }

    /// Kinds of network interface, by what `ip -details link` calls them.
    LinkKind {
        /// A tap of a virtual machine.
        Tun = "tun",
        /// One end of a pair, as containers have it.
        Veth = "veth",
    }

    /// Who may use a unix socket.
    SocketMode {
        /// Whoever has to, by the users that are configured.
        Deduce = "deduce",
        /// Its owner.
        User = "user",
        /// Its owner and its group.
        Group = "group",
        /// Everybody.
        All = "all",
    }

    /// A version of IP.
    IpVersion {
        /// IPv4.
        V4 = "4",
        /// IPv6.
        V6 = "6",
    }

    /// What log lines look like.
    LogFormat {
        /// For people.
        Text = "text",
        /// One JSON object a line.
        Json = "json",
    }
}

/// The host of a URL.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Host {
    /// An address.
    Address(IpAddr),
    /// A name that is still to be resolved.
    Name(String),
}

impl Host {
    /// Reads an address, an IPv6 address in brackets, or a host name (RFC 1123, and `_` as in RFC 2782).
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
        // What ends in a number is an address with an error in it (URL standard, "ends in a number").
        let numeric = name.rsplit('.').next().is_some_and(|last| last.bytes().all(|b| b.is_ascii_digit()));
        (name.len() <= 253 && !numeric && name.split('.').all(label)).then(|| Self::Name(text.to_owned()))
    }
}

impl fmt::Display for Host {
    /// As in a URL: IPv6 addresses stand in brackets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(IpAddr::V6(address)) => write!(f, "[{address}]"),
            Self::Address(address @ IpAddr::V4(_)) => address.fmt(f),
            Self::Name(name) => name.fmt(f),
        }
    }
}

/// Where Nova's metadata service listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NovaEndpoint {
    /// With or without TLS.
    pub scheme: Scheme,
    /// The host.
    pub host: Host,
    /// The TCP port.
    pub port: u16,
}

impl NovaEndpoint {
    /// Host and port as they stand in a URL and in `Host:`, an IPv6 address in brackets.
    #[must_use]
    pub fn authority(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }
}

impl fmt::Display for NovaEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}:{}", self.scheme, self.host, self.port)
    }
}

/// A pattern for interface names: `*` stands for any characters, `?` for one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NamePattern(String);

impl NamePattern {
    /// Reads a pattern. Brackets are refused rather than taken literally: elsewhere they are character classes.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let fits = !text.is_empty()
            && text.chars().all(|c| !c.is_whitespace() && !c.is_control() && !matches!(c, '/' | '[' | ']'));
        fits.then(|| Self(text.to_owned()))
    }

    /// Whether the whole name fits the pattern.
    #[must_use]
    pub fn matches(&self, name: &str) -> bool {
        let (pattern, name): (Vec<char>, Vec<char>) = (self.0.chars().collect(), name.chars().collect());
        let (mut p, mut n) = (0, 0);
        // The last `*`, and where what it stands for ends so far.
        let mut star = None;
        while let Some(&c) = name.get(n) {
            match pattern.get(p) {
                Some('*') => {
                    star = Some((p, n));
                    p += 1;
                }
                Some(&want) if want == '?' || want == c => (p, n) = (p + 1, n + 1),
                _ => {
                    let Some((at, end)) = star else { return false };
                    star = Some((at, end + 1));
                    (p, n) = (at + 1, end + 1);
                }
            }
        }
        pattern.iter().skip(p).all(|&c| c == '*')
    }
}

impl fmt::Display for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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

    #[test]
    fn an_ipv6_endpoint_has_brackets() {
        let endpoint = NovaEndpoint { scheme: Scheme::Https, host: Host::parse("::1").unwrap(), port: 8775 };
        assert_eq!(endpoint.authority(), "[::1]:8775");
        assert_eq!(endpoint.to_string(), "https://[::1]:8775");
    }

    #[test]
    fn patterns_match_whole_names() {
        for (pattern, name, want) in [
            ("tap*", "tap3f2a9d10-77", true),
            ("tap*", "tap", true),
            ("tap*", "qtap1", false),
            ("*", "", true),
            ("t?p*1", "tap01", true),
            ("t?p*1", "tp1", false),
            ("*ab*ab", "abxab", true),
            ("*ab*ab", "ab", false),
            ("**a", "ba", true),
            ("eth0", "eth01", false),
        ] {
            assert_eq!(NamePattern::parse(pattern).unwrap().matches(name), want, "{pattern} {name}");
        }
        for bad in ["", "a b", "tap[0-9]", "a/b", "a\n"] {
            assert_eq!(NamePattern::parse(bad), None, "{bad:?}");
        }
    }

    /// The obvious, exponential matcher.
    fn slow(pattern: &[u8], name: &[u8]) -> bool {
        match (pattern, name) {
            ([], []) => true,
            ([b'*', p @ ..], _) => (0..=name.len()).any(|skip| slow(p, &name[skip..])),
            ([b'?', p @ ..], [_, n @ ..]) => slow(p, n),
            ([c, p @ ..], [d, n @ ..]) => c == d && slow(p, n),
            _ => false,
        }
    }

    proptest! {
        #[test]
        fn the_matcher_agrees_with_the_obvious_one(pattern in "[ab*?]{1,7}", name in "[ab]{0,8}") {
            let want = slow(pattern.as_bytes(), name.as_bytes());
            prop_assert_eq!(NamePattern::parse(&pattern).unwrap().matches(&name), want);
        }
    }
}
