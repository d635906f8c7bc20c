//! Combines the options `neutron_*`, which follow keystoneauth's options, into one
//! [`NeutronAccess`].

use oslo_config::Origin;
use secrecy::{ExposeSecret, SecretString};

use super::error::ConfigError;
use super::options::Config;
use super::value::NeutronAuthType;
use crate::sources::neutron::{Credentials, Domain, NeutronAccess, NeutronAuth};

/// Returns how to reach Neutron's API, or `None` if it is not configured.
pub(super) fn access(config: &Config) -> Result<Option<NeutronAccess>, ConfigError> {
    let auth = match config.neutron_auth_type {
        NeutronAuthType::NoAuth => match config.neutron_endpoint_override.clone() {
            Some(endpoint) => NeutronAuth::NoAuth { endpoint },
            None => return Err(incomplete(config, AUTH_TYPE, ENDPOINT)),
        },
        NeutronAuthType::Password | NeutronAuthType::ApplicationCredential => {
            let Some(url) = &config.neutron_auth_url else {
                // Without the URL, no other option may be set either.
                let Some(set) = anything_set(config) else { return Ok(None) };
                let missing = if set == ENDPOINT { URL_OR_NO_AUTH } else { URL };
                return Err(incomplete(config, set, missing));
            };
            NeutronAuth::Keystone { url: url.clone(), credentials: credentials(config)? }
        }
    };
    Ok(Some(NeutronAccess {
        auth,
        endpoint: config.neutron_endpoint_override.clone(),
        region: config.neutron_region_name.clone(),
        interface: config.neutron_interface,
        ca_certificates: config.neutron_cafile.clone(),
        insecure: config.neutron_insecure,
        timeout: config.neutron_timeout,
    }))
}

const URL: &str = "neutron_auth_url";
const URL_OR_NO_AUTH: &str = "neutron_auth_url or neutron_auth_type = none";
const ENDPOINT: &str = "neutron_endpoint_override";
const AUTH_TYPE: &str = "neutron_auth_type";

fn credentials(config: &Config) -> Result<Credentials, ConfigError> {
    let text = |value: &Option<String>, option: &'static str| {
        value.clone().ok_or_else(|| incomplete(config, URL, option))
    };
    let secret = |value: &SecretString, option: &'static str| {
        let there = !value.expose_secret().is_empty();
        there.then(|| value.clone()).ok_or_else(|| incomplete(config, URL, option))
    };
    let domain = |id: &Option<String>, name: &Option<String>, option: &'static str| {
        let by_id = id.clone().map(Domain::Id);
        by_id.or_else(|| name.clone().map(Domain::Name)).ok_or_else(|| incomplete(config, URL, option))
    };
    if config.neutron_auth_type == NeutronAuthType::ApplicationCredential {
        return Ok(Credentials::Application {
            id: text(&config.neutron_application_credential_id, "neutron_application_credential_id")?,
            secret: secret(
                &config.neutron_application_credential_secret,
                "neutron_application_credential_secret",
            )?,
        });
    }
    Ok(Credentials::Password {
        user: text(&config.neutron_username, "neutron_username")?,
        user_domain: domain(
            &config.neutron_user_domain_id,
            &config.neutron_user_domain_name,
            "neutron_user_domain_name",
        )?,
        password: secret(&config.neutron_password, "neutron_password")?,
        project: text(&config.neutron_project_name, "neutron_project_name")?,
        project_domain: domain(
            &config.neutron_project_domain_id,
            &config.neutron_project_domain_name,
            "neutron_project_domain_name",
        )?,
    })
}

fn anything_set(config: &Config) -> Option<&'static str> {
    let set = [
        (ENDPOINT, config.neutron_endpoint_override.is_some()),
        ("neutron_username", config.neutron_username.is_some()),
        ("neutron_application_credential_id", config.neutron_application_credential_id.is_some()),
    ];
    set.into_iter().find(|(_, set)| *set).map(|(option, _)| option)
}

fn incomplete(config: &Config, present: &'static str, missing: &'static str) -> ConfigError {
    let origin = config.origin(present).cloned().unwrap_or(Origin::Default);
    ConfigError::Incomplete { present, missing, origin }
}
