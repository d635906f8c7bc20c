//! The valid [`Config`] as a whole: the meaning of options together, and combinations that are not
//! allowed.

use std::fmt;

use nix::sys::utsname::uname;
use oslo_config::{Origin, Resolver, Setting};
use ovsdb_client::Remote;
use secrecy::ExposeSecret;

use super::error::{ConfigError, ConfigErrors};
use super::neutron::access;
use super::notices::{Notice, notices};
use super::options::{Config, spec};
use super::value::{NovaEndpoint, UpstreamKind};
use crate::proxy::Scheme;
use crate::sources::neutron::NeutronAccess;

impl Config {
    /// Reads every option and checks combinations of options.
    pub(super) fn resolve(mut resolver: Resolver<'_>) -> Result<Self, ConfigErrors> {
        let Some(mut config) = Self::read(&mut resolver) else { return Err(resolver.into_errors().into()) };
        config.notices = notices(&mut resolver, &config);
        let mut errors = ConfigErrors::from(resolver.into_errors());
        errors.0.extend(unpaired(&config).into_iter().chain(same_socket(&config)));
        match access(&config) {
            Ok(access) => config.neutron = access,
            Err(error) => errors.0.push(error),
        }
        if errors.0.is_empty() { Ok(config) } else { Err(errors) }
    }

    /// Returns the endpoints of Nova's metadata API. The first reachable one is to be used.
    pub(crate) fn nova_endpoints(&self) -> impl Iterator<Item = NovaEndpoint> {
        let (scheme, port) = (self.nova_metadata_protocol, self.nova_metadata_port);
        self.nova_metadata_host.iter().cloned().map(move |host| NovaEndpoint { scheme, host, port })
    }

    /// Returns the servers of OVN's Southbound database if they are set. Neutron's default address
    /// does not mean that there is an OVN: another service may listen there.
    #[must_use]
    pub(crate) fn ovn_southbound(&self) -> Option<&[Remote]> {
        let is_set =
            self.origin(spec::ovn_sb_connection.key).is_some_and(|origin| *origin != Origin::Default);
        is_set.then_some(&*self.ovn_sb_connection)
    }

    /// Returns the name of this host in Neutron.
    #[must_use]
    pub(crate) fn host_name(&self) -> String {
        let own = || uname().map(|name| name.nodename().to_string_lossy().into_owned()).unwrap_or_default();
        self.host.clone().unwrap_or_else(own)
    }

    /// Returns how to reach Neutron's API, if it is configured.
    #[must_use]
    pub(crate) fn neutron(&self) -> Option<&NeutronAccess> {
        self.neutron.as_ref()
    }

    /// Returns every option with its value and origin, in the order of the documentation.
    #[must_use]
    pub fn settings(&self) -> &[Setting] {
        &self.settings
    }

    /// Returns notices about options that are set without their effect in Neutron.
    #[must_use]
    pub(crate) fn notices(&self) -> &[Notice] {
        &self.notices
    }

    /// Returns the origin of an option's value, by the option's key.
    #[must_use]
    pub(crate) fn origin(&self, key: &str) -> Option<&Origin> {
        self.settings.iter().find(|setting| setting.key == key).map(|setting| &setting.origin)
    }

    /// Returns warnings about settings that are allowed but probably a mistake.
    #[must_use]
    pub(crate) fn warnings(&self) -> Vec<ConfigWarning> {
        let https = self.nova_metadata_protocol == Scheme::Https;
        let tls = self.auth_ca_cert.is_some() || self.nova_client_cert.is_some();
        let mut warnings = Vec::new();
        if self.serve_metadata_proxy_socket && self.neutron.is_none() {
            warnings.push(ConfigWarning::HaproxyWithoutNeutron);
        }
        if self.upstream != UpstreamKind::Nova {
            return warnings;
        }
        if self.metadata_proxy_shared_secret.expose_secret().is_empty() && self.shared_secret_files.is_empty()
        {
            warnings.push(ConfigWarning::EmptySecret);
        }
        if https && self.nova_metadata_insecure {
            warnings.push(ConfigWarning::CertificateNotChecked);
        }
        if !https && tls {
            warnings.push(ConfigWarning::TlsUnused);
        }
        if self.neutron.is_some() && self.neutron_insecure {
            warnings.push(ConfigWarning::NeutronNotChecked);
        }
        warnings
    }
}

/// Settings that are allowed but probably a mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ConfigWarning {
    /// The key that signs instance ids is empty.
    EmptySecret,
    /// TLS to Nova without authentication.
    CertificateNotChecked,
    /// Certificates for Nova without TLS.
    TlsUnused,
    /// TLS to Keystone and Neutron without authentication.
    NeutronNotChecked,
    /// Nothing reports that an address behind a haproxy moved to another port.
    HaproxyWithoutNeutron,
}

impl fmt::Display for ConfigWarning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::EmptySecret => {
                "metadata_proxy_shared_secret is empty: any client that reaches Nova can sign for any instance"
            }
            Self::CertificateNotChecked => "nova_metadata_insecure is on: Nova's certificate is not checked",
            Self::TlsUnused => {
                "auth_ca_cert and nova_client_cert have no effect while nova_metadata_protocol is http"
            }
            Self::NeutronNotChecked => {
                "neutron_insecure is on: Keystone's and Neutron's certificates are not checked"
            }
            Self::HaproxyWithoutNeutron => {
                "serve_metadata_proxy_socket is on without access to Neutron's API (neutron_auth_url, or \
                 neutron_auth_type = none): IPv4 clients of haproxies get 404, unless OVN reports their ports"
            }
        })
    }
}

/// Requires a client certificate and its key together.
fn unpaired(config: &Config) -> Option<ConfigError> {
    let (cert, key) = ("nova_client_cert", "nova_client_priv_key");
    let (present, missing) = match (&config.nova_client_cert, &config.nova_client_priv_key) {
        (Some(_), None) => (cert, key),
        (None, Some(_)) => (key, cert),
        (Some(_), Some(_)) | (None, None) => return None,
    };
    let origin = config.origin(present).cloned().unwrap_or(Origin::Default);
    Some(ConfigError::Unpaired { present, missing, origin })
}

/// Rejects one socket for both serving and sending requests.
fn same_socket(config: &Config) -> Option<ConfigError> {
    let asks = config.upstream != UpstreamKind::Nova;
    let same = config.neutron_agent_socket == config.metadata_proxy_socket;
    (config.serve_metadata_proxy_socket && asks && same).then(|| {
        let origin = config.origin("neutron_agent_socket").cloned().unwrap_or(Origin::Default);
        ConfigError::SameSocket { path: config.neutron_agent_socket.clone(), origin }
    })
}
