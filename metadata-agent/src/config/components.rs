//! Settings of each component, made from the options. The components do not know the configuration.

use std::num::NonZero;
use std::time::Duration;

use oslo_config::Origin;
use ovsdb_client::TlsFiles;
use tokio_util::task::TaskTracker;

use super::options::{Config, spec};
use super::value::{IpVersion, NovaEndpoint, UpstreamKind};
use crate::attach::GuestRules;
use crate::datapath::Limits;
use crate::directory::Credentials;
use crate::namespaces::NamespaceRules;
use crate::nova_access::{ClientCertificate, NovaTls};
use crate::proxy::{
    Endpoint, EndpointError, NetworkHeader, ProxyConfig, RateLimit, RateWindow, UpstreamConfig,
};
use crate::secrets::Signer;
use crate::sources::{libvirt, neutron, ovn, ovsdb};

impl Config {
    pub(crate) fn datapath_limits(&self) -> Limits {
        Limits {
            heartbeat_stale_after: self.heartbeat_stale_after,
            syn_rate: self.syn_rate_limit.map_or(0, NonZero::get),
            syn_burst: self.syn_burst,
        }
    }

    /// Returns the interval of requests to itself, if the agent sends any.
    pub(crate) fn probe_interval(&self) -> Option<Duration> {
        self.data_path_interval.map(|seconds| Duration::from_secs(seconds.get().into()))
    }

    pub(crate) fn guest_rules(&self) -> GuestRules {
        GuestRules {
            names: self.guest_interfaces.clone(),
            kinds: self.guest_link_kinds.clone(),
            source_check: self.source_check,
        }
    }

    /// Returns the rules for network namespaces, if any are to be served.
    pub(crate) fn namespace_rules(&self) -> Option<NamespaceRules> {
        Some(NamespaceRules {
            names: self.namespaces.clone()?,
            legacy_port: self.metadata_port,
            confine_routers: self.confine_routers,
        })
    }

    pub(crate) fn proxy(&self) -> ProxyConfig {
        ProxyConfig {
            request_head_limit: self.request_head_limit,
            request_body_limit: self.request_body_limit,
            request_head_timeout: self.request_head_timeout,
            request_body_timeout: self.request_head_timeout,
            keep_alive_timeout: self.keep_alive_timeout,
            write_timeout: self.guest_write_timeout,
            identity_hold: self.identity_hold,
            identity_grace: self.identity_grace,
            drain_timeout: self.drain_timeout,
            connections_per_guest: self.connections_per_guest,
            connections: self.connections,
            rate_limit: self.rate_limit(),
        }
    }

    fn rate_limit(&self) -> Option<RateLimit> {
        let window =
            |requests, seconds| RateWindow { requests, length: Duration::from_secs(u64::from(seconds)) };
        let names = |version| self.rate_limit_ip_versions.contains(&version);
        self.rate_limit_enabled.then(|| RateLimit {
            windows: [
                window(self.rate_limit_base_requests, self.rate_limit_base_window),
                window(self.rate_limit_burst_requests, self.rate_limit_burst_window),
            ],
            ipv4: names(IpVersion::V4),
            ipv6: names(IpVersion::V6),
        })
    }

    pub(crate) fn credentials(&self, signer: Signer) -> Credentials {
        match self.upstream {
            UpstreamKind::Nova => Credentials::Signed(signer),
            UpstreamKind::NeutronAgent => Credentials::ByNetwork(NetworkHeader::Neutron),
            UpstreamKind::OvnAgent => Credentials::ByNetwork(NetworkHeader::Ovn),
        }
    }

    /// Returns how the proxy reaches the service that answers guests.
    ///
    /// # Errors
    /// An address of Nova does not make a URL.
    pub(crate) fn upstream_config(&self) -> Result<UpstreamConfig, EndpointError> {
        let base = match self.upstream {
            UpstreamKind::Nova => Self::nova_config(self.nova_endpoints())?,
            UpstreamKind::NeutronAgent | UpstreamKind::OvnAgent => {
                UpstreamConfig::neutron_agent(&self.neutron_agent_socket, self.neutron_agent_requests)
            }
        };
        Ok(UpstreamConfig {
            connect_timeout: self.nova_connect_timeout,
            answer_timeout: self.nova_response_timeout,
            requests_per_guest: self.requests_per_guest,
            ..base
        })
    }

    /// Returns how to reach some of Nova's endpoints, with default timeouts.
    ///
    /// # Errors
    /// An address does not make a URL.
    pub(crate) fn nova_config(
        endpoints: impl IntoIterator<Item = NovaEndpoint>,
    ) -> Result<UpstreamConfig, EndpointError> {
        let endpoint = |nova: NovaEndpoint| Endpoint::new(nova.scheme, &nova.host.to_string(), nova.port);
        let endpoints = endpoints.into_iter().map(endpoint).collect::<Result<_, _>>()?;
        Ok(UpstreamConfig::new(endpoints))
    }

    pub(crate) fn nova_tls(&self) -> NovaTls {
        NovaTls {
            authorities: self.auth_ca_cert.clone(),
            identity: self.client_certificate(),
            insecure: self.nova_metadata_insecure,
        }
    }

    /// Returns the client certificate for Nova, if one is configured.
    #[must_use]
    pub(crate) fn client_certificate(&self) -> Option<ClientCertificate> {
        let (certificate, key) = (self.nova_client_cert.clone()?, self.nova_client_priv_key.clone()?);
        Some(ClientCertificate { certificate, key })
    }

    /// Returns the directory of libvirt's domains, if it is to be read.
    pub(crate) fn libvirt(&self) -> Option<libvirt::DomainDirectory> {
        let origin = self.origin(spec::libvirt_dir.key);
        let is_configured = origin.is_some_and(|origin| *origin != Origin::Default);
        Some(libvirt::DomainDirectory { path: self.libvirt_dir.clone()?, is_configured })
    }

    pub(crate) fn open_vswitch(&self) -> ovsdb::OvsdbAccess {
        ovsdb::OvsdbAccess {
            connection: self.ovsdb_connection.clone(),
            tls: TlsFiles {
                private_key: self.ovs_ssl_key_file.clone(),
                certificate: self.ovs_ssl_cert_file.clone(),
                ca_certificates: self.ovs_ssl_ca_cert_file.clone(),
            },
            timeout: self.ovsdb_connection_timeout,
        }
    }

    /// Returns how to reach OVN's Southbound database, if its servers are configured.
    pub(crate) fn ovn(&self) -> Option<ovn::OvnAccess> {
        let probe = Duration::from_millis(self.ovn_ovsdb_probe_interval.into());
        Some(ovn::OvnAccess {
            servers: self.ovn_southbound()?.to_vec(),
            tls: TlsFiles {
                private_key: self.ovn_sb_private_key.clone(),
                certificate: self.ovn_sb_certificate.clone(),
                ca_certificates: self.ovn_sb_ca_cert.clone(),
            },
            timeout: self.ovn_ovsdb_connection_timeout,
            longest_pause: self.ovn_ovsdb_retry_max_interval,
            probe_interval: (!probe.is_zero()).then_some(probe),
        })
    }

    /// Returns the settings of the Neutron source, if Neutron's API is configured. Its connections
    /// run as `tasks`.
    pub(crate) fn neutron_source(&self, tasks: TaskTracker) -> Option<neutron::NeutronSettings> {
        Some(neutron::NeutronSettings { access: self.neutron()?.clone(), host: self.host_name(), tasks })
    }
}
