//! How to reach Neutron's API, and who we are to it.

use std::path::PathBuf;
use std::time::Duration;

use secrecy::SecretString;

use super::url::HttpUrl;
use super::value::NeutronInterface;

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
