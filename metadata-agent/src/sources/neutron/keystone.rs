//! Keystone v3: exchanges credentials for a token and the service catalog.

use std::time::Duration;

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode, header};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde_json::{Value, json};

use super::access::{Credentials, Domain, HttpUrl, NeutronInterface};
use super::catalog::{CatalogError, CatalogService, network_endpoint};
use super::http::{Http, HttpError};
use super::timestamp;

/// Largest accepted response. The catalog of a large cloud, with fifty services in ten regions,
/// takes about 300 KiB.
const LIMIT: usize = 4 * 1024 * 1024;
/// Response header with the token.
const SUBJECT: &str = "x-subject-token";

/// Keystone issued no token.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KeystoneError {
    #[error(transparent)]
    Http(#[from] HttpError),
    #[error("credentials were rejected (401): {advice}")]
    Rejected { advice: &'static str },
    #[error("request for a token failed with {status}{}", advice(*status))]
    Status { status: StatusCode },
    #[error("response is not a token: {reason}")]
    InvalidToken { reason: String },
    #[error("catalog {0}")]
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

/// PortSelector Keystone vouches for, and where.
#[derive(Clone, Debug)]
pub(super) struct Keystone {
    pub(super) url: HttpUrl,
    pub(super) credentials: Credentials,
    pub(super) interface: NeutronInterface,
    pub(super) region: Option<String>,
    pub(super) endpoint: Option<HttpUrl>,
}

/// New token, with Neutron's endpoint.
#[derive(Debug)]
pub(super) struct IssuedToken {
    pub(super) token: SecretString,
    pub(super) lifetime: Duration,
    pub(super) endpoint: HttpUrl,
}

#[derive(Deserialize)]
struct TokenResponse {
    token: TokenBody,
}

#[derive(Deserialize)]
struct TokenBody {
    issued_at: String,
    expires_at: String,
    #[serde(default)]
    catalog: Vec<CatalogService>,
}

impl Keystone {
    /// Requests a token.
    pub(super) async fn authenticate(&self, http: &Http) -> Result<IssuedToken, KeystoneError> {
        let request = Request::builder()
            .method(Method::POST)
            .uri(self.tokens_url())
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::ACCEPT, "application/json")
            .body(Full::from(Bytes::from(self.body().to_string())))
            .map_err(|error| KeystoneError::InvalidToken { reason: error.to_string() })?;
        let (head, body) = http.send(request, LIMIT).await?;
        match head.status {
            StatusCode::CREATED | StatusCode::OK => {}
            StatusCode::UNAUTHORIZED => {
                return Err(KeystoneError::Rejected { advice: self.advice() });
            }
            status => return Err(KeystoneError::Status { status }),
        }
        let invalid = |reason: &str| KeystoneError::InvalidToken { reason: reason.to_owned() };
        let token = head.headers.get(SUBJECT).ok_or_else(|| invalid("no X-Subject-Token"))?;
        let token = token.to_str().map_err(|_| invalid("X-Subject-Token is not text"))?;
        let token = SecretString::from(token);
        let TokenResponse { token: body } =
            serde_json::from_slice(&body).map_err(|error| invalid(&error.to_string()))?;
        let lifetime = timestamp::between(&body.issued_at, &body.expires_at)
            .ok_or_else(|| invalid("invalid issued_at or expires_at"))?;
        let endpoint = match &self.endpoint {
            Some(endpoint) => endpoint.clone(),
            None => network_endpoint(&body.catalog, self.interface, self.region.as_deref())?,
        };
        Ok(IssuedToken { token, lifetime, endpoint })
    }

    fn tokens_url(&self) -> String {
        let url = self.url.as_str();
        let v3 = if url.ends_with("/v3") { "" } else { "/v3" };
        format!("{url}{v3}/auth/tokens")
    }

    fn body(&self) -> Value {
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
            // An application credential implies its project.
            Credentials::Application { id, secret } => json!({ "auth": {
                "identity": { "methods": ["application_credential"], "application_credential": {
                    "id": id, "secret": secret.expose_secret(),
                } },
            } }),
        }
    }

    fn advice(&self) -> &'static str {
        match self.credentials {
            Credentials::Password { .. } => {
                "check neutron_username, neutron_password, neutron_project_name and the domains of user and project"
            }
            Credentials::Application { .. } => {
                "check neutron_application_credential_id and neutron_application_credential_secret; it may have \
                 expired or been deleted"
            }
        }
    }
}
