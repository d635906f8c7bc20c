//! Keystone v3: credentials for a token, and the catalogue that comes with it.

use std::time::Duration;

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode, header};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde_json::{Value, json};

use super::access::{Credentials, Domain, HttpUrl, NeutronInterface};
use super::catalog::{CatalogError, Service, network_endpoint};
use super::http::{Http, HttpError};
use super::timestamp;

/// The longest answer. A catalogue of a large cloud, with fifty services in ten regions, takes about 300 KiB.
const LIMIT: usize = 4 * 1024 * 1024;
/// The header in which a token comes.
const SUBJECT: &str = "x-subject-token";

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub enum KeystoneError {
    /// Keystone cannot be asked.
    #[error(transparent)]
    Http(#[from] HttpError),
    /// Keystone does not believe us.
    #[error("refuses the credentials (401): {}", credentials)]
    Refused {
        /// What to look at.
        credentials: &'static str,
    },
    /// Keystone refuses for another reason, or cannot.
    #[error("answers {status} where a token is asked for{}", advice(*status))]
    Status {
        /// How it answers.
        status: StatusCode,
    },
    /// The answer is no token.
    #[error("answers with something that is no token: {what}")]
    NoToken {
        /// What is wrong with it.
        what: String,
    },
    /// The catalogue tells no endpoint.
    #[error("its catalogue {0}")]
    Catalog(#[from] CatalogError),
}

fn advice(status: StatusCode) -> &'static str {
    match status.as_u16() {
        404 => ": neutron_auth_url does not lead to Keystone's v3 API",
        403 => ": the user may not have a token for this project",
        429 => ": too many attempts",
        _ => "",
    }
}

/// Whom Keystone vouches for, and where.
#[derive(Clone, Debug)]
pub(super) struct Keystone {
    pub(super) url: HttpUrl,
    pub(super) credentials: Credentials,
    pub(super) interface: NeutronInterface,
    pub(super) region: Option<String>,
    pub(super) endpoint: Option<HttpUrl>,
}

/// A token that was just issued.
#[derive(Debug)]
pub(super) struct Grant {
    pub(super) token: SecretString,
    pub(super) lifetime: Duration,
    pub(super) endpoint: HttpUrl,
}

#[derive(Deserialize)]
struct Answer {
    token: Token,
}

#[derive(Deserialize)]
struct Token {
    issued_at: String,
    expires_at: String,
    #[serde(default)]
    catalog: Vec<Service>,
}

impl Keystone {
    /// Asks for a token.
    pub(super) async fn authenticate(&self, http: &Http) -> Result<Grant, KeystoneError> {
        let request = Request::builder()
            .method(Method::POST)
            .uri(self.tokens_url())
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::ACCEPT, "application/json")
            .body(Full::from(Bytes::from(self.question().to_string())))
            .map_err(|error| KeystoneError::NoToken { what: error.to_string() })?;
        let (head, body) = http.ask(request, LIMIT).await?;
        match head.status {
            StatusCode::CREATED | StatusCode::OK => {}
            StatusCode::UNAUTHORIZED => {
                return Err(KeystoneError::Refused { credentials: self.what_to_check() });
            }
            status => return Err(KeystoneError::Status { status }),
        }
        let no_token = |what: &str| KeystoneError::NoToken { what: what.to_owned() };
        let token = head.headers.get(SUBJECT).ok_or_else(|| no_token("it has no X-Subject-Token"))?;
        let token = token.to_str().map_err(|_| no_token("its X-Subject-Token is no text"))?;
        let token = SecretString::from(token);
        let Answer { token: body } =
            serde_json::from_slice(&body).map_err(|error| no_token(&error.to_string()))?;
        let lifetime = timestamp::between(&body.issued_at, &body.expires_at)
            .ok_or_else(|| no_token("it does not last from its issued_at to its expires_at"))?;
        let endpoint = match &self.endpoint {
            Some(endpoint) => endpoint.clone(),
            None => network_endpoint(&body.catalog, self.interface, self.region.as_deref())?,
        };
        Ok(Grant { token, lifetime, endpoint })
    }

    fn tokens_url(&self) -> String {
        let url = self.url.as_str();
        let v3 = if url.ends_with("/v3") { "" } else { "/v3" };
        format!("{url}{v3}/auth/tokens")
    }

    fn question(&self) -> Value {
        let named = |domain: &Domain| match domain {
            Domain::Id(id) => json!({ "id": id }),
            Domain::Name(name) => json!({ "name": name }),
        };
        match &self.credentials {
            Credentials::Password { user, user_domain, password, project, project_domain } => {
                json!({ "auth": {
                "identity": { "methods": ["password"], "password": { "user": {
                    "name": user, "domain": named(user_domain), "password": password.expose_secret(),
                } } },
                "scope": { "project": { "name": project, "domain": named(project_domain) } },
            } })
            }
            // The credential names its project itself.
            Credentials::Application { id, secret } => json!({ "auth": {
                "identity": { "methods": ["application_credential"], "application_credential": {
                    "id": id, "secret": secret.expose_secret(),
                } },
            } }),
        }
    }

    fn what_to_check(&self) -> &'static str {
        match self.credentials {
            Credentials::Password { .. } => {
                "see neutron_username, neutron_password, neutron_project_name and the domains of user and project"
            }
            Credentials::Application { .. } => {
                "see neutron_application_credential_id and neutron_application_credential_secret; it may have \
                 expired or been deleted"
            }
        }
    }
}
