//! The checked [`Config`] as a whole: what its options mean, and forbid, together.

use std::fmt;

use nix::sys::utsname::uname;
use ovsdb_client::Remote;
use secrecy::ExposeSecret;

use super::fault::{ConfigFaults, Fault};
use super::neutron::access;
use super::notice::Notice;
use super::notices;
use super::options::{Config, spec};
use super::resolver::Resolver;
use super::setting::{Origin, Setting};
use super::value::{NovaEndpoint, Upstream};
use crate::proxy::Scheme;
use crate::sources::neutron::NeutronAccess;

impl Config {
    /// The configuration, unless there was a fault anywhere.
    pub(super) fn of(mut resolver: Resolver<'_>) -> Result<Self, ConfigFaults> {
        let Some(mut config) = Self::read(&mut resolver) else { return Err(resolver.into_faults()) };
        resolver.note(notices::of(resolver.files(), &config));
        for fault in unpaired(&config).into_iter().chain(same_socket(&config)) {
            resolver.fault(fault);
        }
        match access(&config) {
            Ok(access) => config.neutron = access,
            Err(fault) => resolver.fault(fault),
        }
        config.notices = resolver.finish()?;
        Ok(config)
    }

    /// Where Nova's metadata service listens: the first that can be reached is to be used.
    pub fn nova_endpoints(&self) -> impl Iterator<Item = NovaEndpoint> {
        let (scheme, port) = (self.nova_metadata_protocol, self.nova_metadata_port);
        self.nova_metadata_host.iter().cloned().map(move |host| NovaEndpoint { scheme, host, port })
    }

    /// The servers of OVN's Southbound database, where somebody set them. Neutron's default is no sign of an OVN: without
    /// one nothing would be at that address, and something else may be.
    #[must_use]
    pub fn ovn_southbound(&self) -> Option<&[Remote]> {
        let is_set =
            self.origin(spec::ovn_sb_connection.key).is_some_and(|origin| *origin != Origin::Default);
        is_set.then_some(&*self.ovn_sb_connection)
    }

    /// The name under which Neutron knows this host.
    #[must_use]
    pub fn host_name(&self) -> String {
        let own = || uname().map(|name| name.nodename().to_string_lossy().into_owned()).unwrap_or_default();
        self.host.clone().unwrap_or_else(own)
    }

    /// How to reach Neutron's API, if it is to be asked.
    #[must_use]
    pub fn neutron(&self) -> Option<&NeutronAccess> {
        self.neutron.as_ref()
    }

    /// Every option with its value and origin, in the order of the documentation.
    #[must_use]
    pub fn settings(&self) -> &[Setting] {
        &self.settings
    }

    /// What somebody set that has not the effect it has in Neutron.
    #[must_use]
    pub fn notices(&self) -> &[Notice] {
        &self.notices
    }

    /// Where the value of an option comes from, by its key. `None` for a key that is no option's.
    #[must_use]
    pub fn origin(&self, key: &str) -> Option<&Origin> {
        self.settings.iter().find(|setting| setting.key == key).map(|setting| &setting.origin)
    }

    /// What is allowed but hardly meant.
    #[must_use]
    pub fn warnings(&self) -> Vec<ConfigWarning> {
        let https = self.nova_metadata_protocol == Scheme::Https;
        let tls = self.auth_ca_cert.is_some() || self.nova_client_cert.is_some();
        let mut warnings = Vec::new();
        if self.upstream != Upstream::Nova {
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

/// What is allowed but hardly meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfigWarning {
    /// Instance ids are signed with an empty key.
    EmptySecret,
    /// TLS without authentication.
    CertificateNotChecked,
    /// Certificates without TLS.
    TlsUnused,
    /// Keystone and Neutron without authentication.
    NeutronNotChecked,
}

impl fmt::Display for ConfigWarning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::EmptySecret => {
                "metadata_proxy_shared_secret is empty: whoever reaches Nova can sign for any instance"
            }
            Self::CertificateNotChecked => "nova_metadata_insecure is on: Nova's certificate is not checked",
            Self::TlsUnused => {
                "auth_ca_cert and nova_client_cert have no effect while nova_metadata_protocol is http"
            }
            Self::NeutronNotChecked => {
                "neutron_insecure is on: Keystone's and Neutron's certificates are not checked"
            }
        })
    }
}

/// The certificate and its key stand or fall together.
fn unpaired(config: &Config) -> Option<Fault> {
    let (cert, key) = ("nova_client_cert", "nova_client_priv_key");
    let (present, missing) = match (&config.nova_client_cert, &config.nova_client_priv_key) {
        (Some(_), None) => (cert, key),
        (None, Some(_)) => (key, cert),
        (Some(_), Some(_)) | (None, None) => return None,
    };
    let origin = config.origin(present).cloned().unwrap_or(Origin::Default);
    Some(Fault::Unpaired { present, missing, origin })
}

/// One socket cannot have us at both its ends.
fn same_socket(config: &Config) -> Option<Fault> {
    let asks = config.upstream != Upstream::Nova;
    let same = config.neutron_agent_socket == config.metadata_proxy_socket;
    (config.serve_metadata_proxy_socket && asks && same).then(|| {
        let origin = config.origin("neutron_agent_socket").cloned().unwrap_or(Origin::Default);
        Fault::SameSocket { path: config.neutron_agent_socket.clone(), origin }
    })
}
