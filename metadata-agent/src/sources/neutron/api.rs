//! Neutron's API v2: a list of ports by filters, page by page, with a token that is renewed on the way if need be.
//!
//! Everything that is asked goes through the [`Gate`].

use std::fmt::Write as _;
use std::sync::Arc;

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::HeaderValue;
use hyper::{Request, StatusCode, header};
use secrecy::ExposeSecret;
use tokio::time::{Instant, sleep_until};

use super::access::HttpUrl;
use super::gate::Gate;
use super::http::{Http, HttpError};
use super::ports::{FIELDS, Page, Told};
use super::session::{AuthError, Token, Tokens};
use crate::ids::PortId;

/// Ports in one answer.
const PAGE: usize = 1000;
/// Answers to one question: a server whose pages have no end is at fault.
const PAGES: usize = 32;
/// The longest answer to a question about single ports.
pub(super) const SOME: usize = 1024 * 1024;
/// The longest page of all ports of a host: 1000 ports of 32 KiB each.
pub(super) const MANY: usize = 32 * 1024 * 1024;

/// Why a question has no answer.
#[derive(Debug, thiserror::Error)]
#[error("{kind}")]
pub struct ApiError {
    /// Who is at fault: the URL of Neutron or of Keystone.
    pub place: String,
    /// What is wrong.
    pub kind: ApiErrorKind,
}

/// What is wrong with Neutron.
#[derive(Debug, thiserror::Error)]
pub enum ApiErrorKind {
    /// There is no token.
    #[error(transparent)]
    Auth(Arc<AuthError>),
    /// No answer.
    #[error(transparent)]
    Http(#[from] HttpError),
    /// Another answer than ports.
    #[error("answers {status} where ports are asked for{}", advice(*status))]
    Status {
        /// How it answers.
        status: StatusCode,
    },
    /// No list of ports.
    #[error("sends no list of ports: {0}")]
    Json(#[source] serde_json::Error),
    /// Pages that do not end, or that do not tell where the next begins.
    #[error("sends pages that lead nowhere")]
    Pages,
    /// A question that cannot be put into HTTP.
    #[error("cannot be asked: {0}")]
    Question(#[source] hyper::http::Error),
}

fn advice(status: StatusCode) -> &'static str {
    match status.as_u16() {
        403 => ": the policy forbids it; the user needs the role admin or service",
        404 => ": neutron_endpoint_override, or the catalogue, does not lead to Neutron's API",
        _ => "",
    }
}

/// Neutron's API. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Api {
    http: Arc<Http>,
    tokens: Tokens,
    /// Who is named where Keystone is at fault.
    keystone: Arc<str>,
    gate: Arc<Gate<Arc<ApiError>>>,
    is_paced: bool,
}

/// A filter: an attribute and a value. Several of one attribute are alternatives.
pub(super) type Filter = (&'static str, String);

impl Api {
    pub(super) fn new(http: Arc<Http>, tokens: Tokens, keystone: &str) -> Self {
        Self { http, tokens, keystone: keystone.into(), gate: Arc::new(Gate::new()), is_paced: true }
    }

    /// For somebody whose questions guests wait for, and who limits how many are under way instead of how often one is put.
    pub(super) fn unpaced(&self) -> Self {
        Self { is_paced: false, ..self.clone() }
    }

    /// When it may be asked again, if it has a fault.
    pub(super) fn opens(&self) -> Option<Instant> {
        self.gate.opens()
    }

    /// The ports that fit and that shall be kept, with at most `limit` bytes a page.
    pub(super) async fn ports(
        &self,
        filters: &[Filter],
        limit: usize,
        keep: impl Fn(PortId) -> bool,
    ) -> Result<Vec<Told>, Arc<ApiError>> {
        let mut kept = Vec::new();
        let mut marker = None;
        for _ in 0..PAGES {
            let (page, endpoint) = self.page(&query(filters, marker), limit).await?;
            let next = page.next();
            let lost = page.is_followed() && (next.is_none() || next == marker);
            kept.extend(page.told().filter(|(id, _)| keep(*id)));
            match next {
                _ if lost => return Err(self.fault(&endpoint, ApiErrorKind::Pages)),
                None => return Ok(kept),
                Some(_) => marker = next,
            }
        }
        Err(self.fault(&self.keystone, ApiErrorKind::Pages))
    }

    async fn page(&self, query: &str, limit: usize) -> Result<(Page, String), Arc<ApiError>> {
        if self.is_paced {
            let turn = self.gate.enter(Instant::now())?;
            sleep_until(turn).await;
        }
        self.gate.look(Instant::now())?;
        let mut token = self.tokens.get().await.map_err(|error| self.unauthorised(error))?;
        let mut answer = self.ask(&token, query, limit).await;
        if let Ok((StatusCode::UNAUTHORIZED, _)) = answer {
            token = self.tokens.replace(&token).await.map_err(|error| match *error {
                AuthError::TokenRefused => self.fault(token.endpoint.as_str(), ApiErrorKind::Auth(error)),
                AuthError::Keystone(_) | AuthError::Stopping => self.unauthorised(error),
            })?;
            answer = self.ask(&token, query, limit).await;
        }
        let endpoint = token.endpoint.as_str();
        match answer {
            Ok((StatusCode::OK, body)) => {
                token.accept();
                let page = serde_json::from_slice(&body)
                    .map_err(|error| self.fault(endpoint, ApiErrorKind::Json(error)))?;
                self.gate.passed();
                Ok((page, endpoint.to_owned()))
            }
            Ok((status, _)) => {
                if status == StatusCode::UNAUTHORIZED {
                    // So that the next token is not spent on it before the gate opens.
                    drop(self.tokens.replace(&token).await);
                } else {
                    token.accept();
                }
                Err(self.fault(endpoint, ApiErrorKind::Status { status }))
            }
            Err(error) => Err(self.fault(endpoint, error)),
        }
    }

    async fn ask(
        &self,
        token: &Token,
        query: &str,
        limit: usize,
    ) -> Result<(StatusCode, Bytes), ApiErrorKind> {
        let mut request = Request::get(format!("{}?{query}", ports_url(&token.endpoint)))
            .header(header::ACCEPT, "application/json");
        if let Some(secret) = &token.secret {
            let value = HeaderValue::try_from(secret.expose_secret());
            let mut value = value.map_err(|error| ApiErrorKind::Question(error.into()))?;
            value.set_sensitive(true);
            request = request.header("x-auth-token", value);
        }
        let request = request.body(Full::default()).map_err(ApiErrorKind::Question)?;
        let (head, body) = self.http.ask(request, limit).await?;
        Ok((head.status, body))
    }

    fn unauthorised(&self, error: Arc<AuthError>) -> Arc<ApiError> {
        self.fault(&self.keystone, ApiErrorKind::Auth(error))
    }

    fn fault(&self, place: &str, kind: ApiErrorKind) -> Arc<ApiError> {
        let error = Arc::new(ApiError { place: place.to_owned(), kind });
        self.gate.failed(Arc::clone(&error), Instant::now());
        error
    }
}

fn ports_url(endpoint: &HttpUrl) -> String {
    let endpoint = endpoint.as_str();
    let version = if endpoint.ends_with("/v2.0") { "" } else { "/v2.0" };
    format!("{endpoint}{version}/ports")
}

fn query(filters: &[Filter], marker: Option<PortId>) -> String {
    let mut query = format!("limit={PAGE}&sort_key=id&sort_dir=asc");
    if let Some(marker) = marker {
        append(&mut query, "marker", &marker.to_string());
    }
    for (name, value) in filters {
        append(&mut query, name, value);
    }
    for field in FIELDS {
        append(&mut query, "fields", field);
    }
    query
}

/// Appends a pair. What RFC 3986 lets stand in a query, and separates nothing, stands as it is.
fn append(query: &mut String, name: &str, value: &str) {
    query.push('&');
    query.push_str(name);
    query.push('=');
    for byte in value.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~:".contains(&byte) {
            query.push(char::from(byte));
        } else {
            write!(query, "%{byte:02X}").unwrap_or_else(|_| unreachable!("writing to a String cannot fail"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_one_whatever_is_asked_for() {
        let filters =
            [("binding:host_id", "a&b =\u{fc}".to_owned()), ("mac_address", "fa:16:3e:00:00:01".to_owned())];
        let text = query(&filters, None);
        let want =
            "&binding:host_id=a%26b%20%3D%C3%BC&mac_address=fa:16:3e:00:00:01&fields=id&fields=device_id&";
        assert!(text.contains(want), "{text}");
        let marker = "3f2a9d10-77c1-4e55-9d0c-2b6f4f1f0a01".parse().unwrap();
        assert!(query(&[], Some(marker)).contains("&marker=3f2a9d10-77c1-4e55-9d0c-2b6f4f1f0a01&"));
    }

    #[test]
    fn an_endpoint_may_name_the_version_or_not() {
        for (endpoint, want) in [
            ("http://a:9696", "http://a:9696/v2.0/ports"),
            ("http://a:9696/v2.0/", "http://a:9696/v2.0/ports"),
            ("https://a/networking", "https://a/networking/v2.0/ports"),
        ] {
            assert_eq!(ports_url(&HttpUrl::parse(endpoint).unwrap()), want);
        }
    }
}
