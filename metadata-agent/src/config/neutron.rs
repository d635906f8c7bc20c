//! How to reach Neutron's API: from the options that keystoneauth has, each behind the prefix `neutron_`, to one value in
//! which what belongs together is together.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use hyper::Uri;
use secrecy::{ExposeSecret, SecretString};

use super::fault::Fault;
use super::options::Config;
use super::resolved::Origin;
use super::rule::{Rejected, Rule};
use super::value::{NeutronAuthType, NeutronInterface};

/// An absolute URL of http or https without query and user, and without a slash at its end.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HttpUrl(String);

impl HttpUrl {
    /// Reads a URL.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim().trim_end_matches('/');
        let uri: Uri = text.parse().ok()?;
        let known = matches!(uri.scheme_str(), Some("http" | "https"));
        let authority = uri.authority()?;
        let plain = !authority.as_str().contains('@') && !authority.host().is_empty();
        let bare = uri.query().is_none() && !text.contains('#');
        (known && plain && bare).then(|| Self(text.to_owned()))
    }

    /// The URL as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for HttpUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An [`HttpUrl`].
pub struct Web;

impl Rule<HttpUrl> for Web {
    fn read(&self, text: &str) -> Result<HttpUrl, Rejected> {
        HttpUrl::parse(text).ok_or(Rejected::NotAccepted)
    }

    fn accepts(&self) -> String {
        "a URL that begins with http:// or https://, without user and query".to_owned()
    }
}

/// A name or an id of Keystone's: any text of one line.
pub struct Line;

impl Rule<String> for Line {
    fn read(&self, text: &str) -> Result<String, Rejected> {
        let one_line = !text.contains(char::is_control);
        if one_line { Ok(text.to_owned()) } else { Err(Rejected::NotAccepted) }
    }

    fn accepts(&self) -> String {
        "a text of one line".to_owned()
    }
}

/// How to reach Neutron's API.
#[derive(Clone, Debug)]
pub struct NeutronAccess {
    /// Who we are.
    pub auth: NeutronAuth,
    /// Where Neutron is; without it the catalogue tells.
    pub endpoint: Option<HttpUrl>,
    /// In which region of the catalogue; without it, there must be one alone.
    pub region: Option<String>,
    /// Which of the catalogue's interfaces.
    pub interface: NeutronInterface,
    /// The authorities to believe; without it, the host's.
    pub authorities: Option<PathBuf>,
    /// Believe anybody.
    pub insecure: bool,
    /// How long an answer may take, and a token.
    pub patience: Duration,
}

/// Who we are to Neutron.
#[derive(Clone, Debug)]
pub enum NeutronAuth {
    /// Nobody: Neutron runs without Keystone.
    Nobody {
        /// Where Neutron is.
        endpoint: HttpUrl,
    },
    /// Whom Keystone vouches for.
    Keystone {
        /// Where Keystone is.
        url: HttpUrl,
        /// What we show to it.
        credentials: Credentials,
    },
}

/// What Keystone knows us by.
#[derive(Clone, Debug)]
pub enum Credentials {
    /// A user in a project.
    Password {
        /// The user.
        user: String,
        /// The user's domain.
        user_domain: Domain,
        /// The password.
        password: SecretString,
        /// The project.
        project: String,
        /// The project's domain.
        project_domain: Domain,
    },
    /// A credential that stands for a user in a project.
    Application {
        /// Its id.
        id: String,
        /// Its secret.
        secret: SecretString,
    },
}

/// A domain of Keystone's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Domain {
    /// By id.
    Id(String),
    /// By name.
    Name(String),
}

/// The options as they belong together; `None` while Neutron is not to be asked.
pub(super) fn access(config: &Config) -> Result<Option<NeutronAccess>, Fault> {
    let auth = match config.neutron_auth_type {
        NeutronAuthType::Nobody => match config.neutron_endpoint_override.clone() {
            Some(endpoint) => NeutronAuth::Nobody { endpoint },
            None => return Err(incomplete(config, AUTH_TYPE, ENDPOINT)),
        },
        NeutronAuthType::Password | NeutronAuthType::ApplicationCredential => {
            match &config.neutron_auth_url {
                Some(url) => NeutronAuth::Keystone { url: url.clone(), credentials: credentials(config)? },
                // A part of the options is an oversight; none of them is no wish.
                None => {
                    return anything_set(config).map_or(Ok(None), |set| Err(incomplete(config, set, URL)));
                }
            }
        }
    };
    Ok(Some(NeutronAccess {
        auth,
        endpoint: config.neutron_endpoint_override.clone(),
        region: config.neutron_region_name.clone(),
        interface: config.neutron_interface,
        authorities: config.neutron_cafile.clone(),
        insecure: config.neutron_insecure,
        patience: config.neutron_timeout,
    }))
}

const URL: &str = "neutron_auth_url";
const ENDPOINT: &str = "neutron_endpoint_override";
const AUTH_TYPE: &str = "neutron_auth_type";

fn credentials(config: &Config) -> Result<Credentials, Fault> {
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

fn incomplete(config: &Config, present: &'static str, missing: &'static str) -> Fault {
    let origin = config.origin(present).cloned().unwrap_or(Origin::Default);
    Fault::Incomplete { present, missing, origin }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_absolute_and_says_no_more_than_where() {
        for (text, want) in [
            ("http://controller:5000/v3/", "http://controller:5000/v3"),
            ("https://[fd00::1]:9696", "https://[fd00::1]:9696"),
            ("https://api.example/networking", "https://api.example/networking"),
        ] {
            assert_eq!(HttpUrl::parse(text).unwrap().as_str(), want);
        }
        for bad in
            ["", "controller:5000", "ftp://a", "http://", "http://u:p@a", "http://a/?b", "http://a/#b", "/v3"]
        {
            assert_eq!(HttpUrl::parse(bad), None, "{bad}");
        }
    }
}
