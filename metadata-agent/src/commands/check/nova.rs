//! Checks of Nova's metadata API, or of the agent of Neutron that stands in for it. Each failure
//! names the option to change.

use std::error::Error;

use hyper::StatusCode;
use secrecy::ExposeSecret as _;
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::{Finding, finding};
use crate::config::{Config, NovaEndpoint, UpstreamKind};
use crate::error_chain::innermost_cause;
use crate::nova_access;
use crate::proxy::{self, ProbeError, Scheme, TlsErrorKind, UpstreamAccess, UpstreamConfig};
use crate::secrets::{SecretFiles, Signer};

/// Subject of the findings about it.
const SECRET: &str = "shared secret";
/// A secret that no Nova has.
const WRONG_SECRET: &str = "metadata-agent check: not the shared secret";

/// Probes each endpoint of Nova, or the socket of Neutron's agent.
pub(super) async fn check(config: &Config) -> Vec<Finding> {
    match config.upstream {
        UpstreamKind::Nova => nova(config).await,
        UpstreamKind::NeutronAgent | UpstreamKind::OvnAgent => vec![neutron_agent(config).await],
    }
}

async fn neutron_agent(config: &Config) -> Finding {
    let (socket, limit) = (&config.neutron_agent_socket, config.nova_connect_timeout);
    let place = socket.display();
    let outcome = match timeout(limit, UnixStream::connect(socket)).await {
        Ok(Ok(_)) => Ok(format!("{place} takes connections")),
        Ok(Err(error)) => {
            Err(format!("{place}: {error}; start it, or correct neutron_agent_socket to where it listens"))
        }
        Err(_) => Err(format!("{place} takes no connection within {limit:?}; restart it")),
    };
    finding("Neutron's metadata agent", outcome)
}

async fn nova(config: &Config) -> Vec<Finding> {
    let mut findings = Vec::new();
    let secrets = config.metadata_proxy_shared_secret.clone();
    let signer = SecretFiles::open(secrets, &config.shared_secret_files).map(|secrets| secrets.signer());
    if let Err(error) = &signer {
        let error = error as &(dyn Error + 'static);
        findings.push(finding(SECRET, Err(format!("{error}: {}", innermost_cause(error)))));
    }
    for endpoint in config.nova_endpoints() {
        let found = probe(config, &endpoint).await;
        let is_nova = found.is_ok();
        let outcome = match found {
            Ok(()) => Ok(format!("{endpoint} lists its versions")),
            Err(fault) => Err(format!("{endpoint}: {fault}")),
        };
        findings.push(finding("Nova's metadata service", outcome));
        if let Ok(signer) = &signer {
            let outcome = if is_nova {
                check_secrets(config, &endpoint, signer).await
            } else {
                Ok(format!("could not be verified, because {endpoint} does not answer as Nova"))
            };
            findings.push(finding(SECRET, outcome));
        }
    }
    findings
}

async fn probe(config: &Config, endpoint: &NovaEndpoint) -> Result<(), String> {
    let (upstream, access) = upstream(config, endpoint)?;
    proxy::probe(upstream, access).await.map_err(|error| described(&error, endpoint))
}

/// Checks that Nova accepts the secrets, and refuses a wrong one: a Nova that accepts any secret
/// ignores the headers that identify the guest.
async fn check_secrets(config: &Config, endpoint: &NovaEndpoint, signer: &Signer) -> Result<String, String> {
    match probe_secrets(config, endpoint, signer).await? {
        StatusCode::FORBIDDEN => {
            return Err(format!(
                "{endpoint} refuses it; set metadata_proxy_shared_secret to the one of section [neutron] in \
                 nova.conf"
            ));
        }
        StatusCode::OK | StatusCode::NOT_FOUND => {}
        other => return Ok(format!("{endpoint} answers {other}, so it could not be verified")),
    }
    match probe_secrets(config, endpoint, &Signer::new(WRONG_SECRET.into())).await? {
        StatusCode::FORBIDDEN if is_empty(config) => Err(format!(
            "{endpoint} accepts an empty one, so any host can read any instance's metadata; set \
             metadata_proxy_shared_secret here and in section [neutron] of nova.conf"
        )),
        StatusCode::FORBIDDEN => Ok(format!("{endpoint} accepts it")),
        other => Err(format!(
            "{endpoint} answers {other} to a wrong one too, so it could not be verified; set \
             service_metadata_proxy = true in section [neutron] of nova.conf"
        )),
    }
}

/// Returns true if there is no secret.
fn is_empty(config: &Config) -> bool {
    config.metadata_proxy_shared_secret.expose_secret().is_empty() && config.shared_secret_files.is_empty()
}

/// Nova refuses a wrong secret before it looks for the instance.
async fn probe_secrets(
    config: &Config,
    endpoint: &NovaEndpoint,
    signer: &Signer,
) -> Result<StatusCode, String> {
    let (upstream, access) = upstream(config, endpoint)?;
    let status = proxy::probe_secrets(upstream, access, |instance| signer.sign(instance)).await;
    status.map_err(|error| format!("{endpoint}: {}", described(&error, endpoint)))
}

/// Reads the TLS files if the endpoint uses https.
fn upstream(config: &Config, endpoint: &NovaEndpoint) -> Result<(UpstreamConfig, UpstreamAccess), String> {
    let upstream = Config::nova_config([endpoint.clone()]).map_err(|error| error.to_string())?;
    let upstream = UpstreamConfig { answer_timeout: config.nova_connect_timeout, ..upstream };
    // A probe makes one connection, so no file is replaced meanwhile.
    let (access, _) = nova_access::open(&upstream, config.nova_tls()).map_err(|error| error.to_string())?;
    Ok((upstream, access))
}

fn described(error: &ProbeError, endpoint: &NovaEndpoint) -> String {
    match remedy(error, endpoint.scheme) {
        Some(remedy) => format!("{error}; {remedy}"),
        None => error.to_string(),
    }
}

fn remedy(error: &ProbeError, scheme: Scheme) -> Option<&'static str> {
    match error {
        ProbeError::Setup(_) => None,
        ProbeError::Resolve(_) => Some("correct nova_metadata_host, or make the name resolvable"),
        ProbeError::Connect(_) => Some("start it, or correct nova_metadata_host and nova_metadata_port"),
        ProbeError::Silent(_) => {
            Some("allow it in the firewall, or correct nova_metadata_host and nova_metadata_port")
        }
        ProbeError::NotHttp(_) if scheme == Scheme::Http => {
            Some("if it speaks TLS, set nova_metadata_protocol = https")
        }
        ProbeError::NotHttp(_) | ProbeError::NotNova(_) => {
            Some("it is not a metadata API of Nova; correct nova_metadata_host and nova_metadata_port")
        }
        ProbeError::Tls { kind, .. } => Some(match kind {
            TlsErrorKind::NotTls => "if it does not speak TLS, set nova_metadata_protocol = http",
            TlsErrorKind::UnknownAuthority => {
                "name the authority that signed its certificate in auth_ca_cert"
            }
            TlsErrorKind::OtherName => {
                "set nova_metadata_host to a name in its certificate's subjectAltName (OpenSSL may also \
                 accept its common name)"
            }
            TlsErrorKind::Form => {
                "OpenSSL may accept this certificate, but this agent needs X.509 version 3, and CA:TRUE \
                 only if auth_ca_cert lists the certificate itself"
            }
            TlsErrorKind::OutOfDate => "renew its certificate, or set this host's clock",
            TlsErrorKind::ClientCertificate => {
                "give nova_client_cert and nova_client_priv_key a certificate that it accepts"
            }
            TlsErrorKind::Other => "look at its certificate and at auth_ca_cert",
        }),
    }
}
