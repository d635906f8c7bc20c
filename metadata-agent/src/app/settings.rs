//! What the configuration means to each component: none of them knows it.

use std::time::Duration;

use anyhow::Result;

use crate::config::{self, Config};
use crate::datapath::{AttachMode, Limits, PortalLink};
use crate::net::portal::Portal;
use crate::proxy::{
    self, Endpoint, EndpointError, NetworkHeader, ProxyConfig, RateLimit, RateWindow, Scheme, Signer,
    TlsConfig, UpstreamAuth, UpstreamConfig,
};

pub(super) fn attach_mode(config: &Config) -> AttachMode {
    match config.attach_mode {
        config::AttachMode::Auto => AttachMode::Auto,
        config::AttachMode::Tcx => AttachMode::Tcx,
        config::AttachMode::Clsact => AttachMode::Clsact,
    }
}

pub(super) fn portal_link(portal: &Portal) -> PortalLink {
    PortalLink { ifindex: portal.host_ifindex, nsid: portal.nsid, mac: portal.mac }
}

pub(super) fn limits(config: &Config) -> Limits {
    Limits {
        heartbeat_stale_after: config.heartbeat_stale_after,
        syn_rate: config.syn_rate_limit.map_or(0, std::num::NonZero::get),
        syn_burst: config.syn_burst,
    }
}

pub(super) fn proxy_config(config: &Config) -> ProxyConfig {
    ProxyConfig {
        request_head_limit: config.request_head_limit,
        request_body_limit: config.request_body_limit,
        request_head_timeout: config.request_head_timeout,
        request_body_timeout: config.request_head_timeout,
        keep_alive_timeout: config.keep_alive_timeout,
        write_timeout: config.guest_write_timeout,
        identity_hold: config.identity_hold,
        identity_grace: config.identity_grace,
        drain_timeout: config.drain_timeout,
        connections_per_attachment: config.connections_per_port,
        connections: config.connections,
        rate_limit: rate_limit(config),
    }
}

pub(super) fn introduction(config: &Config, signer: Signer) -> UpstreamAuth {
    match config.upstream {
        config::Upstream::Nova => UpstreamAuth::Signed(signer),
        config::Upstream::NeutronAgent => UpstreamAuth::ByNetwork(NetworkHeader::Neutron),
        config::Upstream::OvnAgent => UpstreamAuth::ByNetwork(NetworkHeader::Ovn),
    }
}

fn rate_limit(config: &Config) -> Option<RateLimit> {
    let window = |requests, seconds| RateWindow { requests, length: Duration::from_secs(u64::from(seconds)) };
    let names = |version| config.rate_limit_ip_versions.contains(&version);
    config.rate_limit_enabled.then(|| RateLimit {
        windows: [
            window(config.rate_limit_base_requests, config.rate_limit_base_window),
            window(config.rate_limit_burst_requests, config.rate_limit_burst_window),
        ],
        ipv4: names(config::IpVersion::V4),
        ipv6: names(config::IpVersion::V6),
    })
}

/// The way to whoever answers guests, as the configuration has it.
pub(super) fn upstream_config(config: &Config) -> Result<UpstreamConfig> {
    let base = match config.upstream {
        config::Upstream::Nova => nova_config(config)?,
        config::Upstream::NeutronAgent | config::Upstream::OvnAgent => {
            UpstreamConfig::neutron_agent(&config.neutron_agent_socket, config.neutron_agent_requests)
        }
    };
    Ok(UpstreamConfig {
        connect_timeout: config.nova_connect_timeout,
        answer_timeout: config.nova_response_timeout,
        ..base
    })
}

/// The address of one Nova.
///
/// # Errors
/// It does not make a URL.
pub(crate) fn endpoint(nova: &config::NovaEndpoint) -> Result<Endpoint, EndpointError> {
    let scheme = match nova.scheme {
        config::Scheme::Http => Scheme::Http,
        config::Scheme::Https => Scheme::Https,
    };
    Endpoint::new(scheme, &nova.host.to_string(), nova.port)
}

/// The way to Nova as the configuration has it.
///
/// # Errors
/// An address does not make a URL.
pub(crate) fn nova_config(config: &Config) -> Result<UpstreamConfig> {
    let endpoints = config.nova_endpoints().map(|nova| endpoint(&nova)).collect::<Result<_, _>>()?;
    let client = config.client_certificate();
    Ok(UpstreamConfig {
        tls: TlsConfig {
            authorities: config.auth_ca_cert.clone(),
            identity: client.map(|client| proxy::ClientCertificate {
                certificate: client.certificate.to_owned(),
                key: client.private_key.to_owned(),
            }),
            insecure: config.nova_metadata_insecure,
        },
        ..UpstreamConfig::new(endpoints)
    })
}
