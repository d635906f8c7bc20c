//! Value types of options that no component has a type for, and the names of enumeration values in
//! files.

use std::fmt;

use oslo_config::Words;
use ovsdb_client::Host;

use crate::admin::logging::LogFormat;
use crate::attach::{LinkKind, SourceCheck};
use crate::datapath::AttachMode;
use crate::proxy::Scheme;
use crate::sources::neutron::NeutronInterface;

/// The service that answers metadata requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum UpstreamKind {
    /// Nova's metadata API.
    Nova,
    /// The metadata agent beside Neutron's L3 and DHCP agents.
    NeutronAgent,
    /// OVN's metadata agent.
    OvnAgent,
}

/// Type of Neutron credentials, as keystoneauth names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NeutronAuthType {
    Password,
    ApplicationCredential,
    /// Neutron runs without Keystone.
    NoAuth,
}

/// Access to a unix socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SocketMode {
    /// Deduced from the configured user and group.
    Deduce,
    User,
    Group,
    All,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IpVersion {
    V4,
    V6,
}

macro_rules! words {
    ($($name:ident { $($value:ident = $word:literal,)+ })+) => {$(
        impl Words for $name {
            const WORDS: &'static [(&'static str, Self)] = &[$(($word, Self::$value),)+];

            fn word(self) -> &'static str {
                match self { $(Self::$value => $word,)+ }
            }
        }
    )+};
}

words! {
    Scheme { Http = "http", Https = "https", }
    UpstreamKind { Nova = "nova", NeutronAgent = "neutron-agent", OvnAgent = "ovn-agent", }
    NeutronAuthType {
        Password = "password",
        ApplicationCredential = "v3applicationcredential",
        NoAuth = "none",
    }
    NeutronInterface { Public = "public", Internal = "internal", Admin = "admin", }
    SourceCheck { Strict = "strict", Mac = "mac", Off = "off", }
    AttachMode { Auto = "auto", Tcx = "tcx", Clsact = "clsact", }
    LinkKind { Tun = "tun", Veth = "veth", }
    SocketMode { Deduce = "deduce", User = "user", Group = "group", All = "all", }
    IpVersion { V4 = "4", V6 = "6", }
    LogFormat { Text = "text", Json = "json", }
}

/// Address of one Nova metadata service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NovaEndpoint {
    pub scheme: Scheme,
    pub host: Host,
    pub port: u16,
}

impl fmt::Display for NovaEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}:{}", self.scheme.word(), self.host, self.port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv6_endpoint_has_brackets() {
        let endpoint = NovaEndpoint { scheme: Scheme::Https, host: Host::parse("::1").unwrap(), port: 8775 };
        assert_eq!(endpoint.to_string(), "https://[::1]:8775");
    }
}
