//! Neutron's API v2: lists of ports by filters, page by page, with renewal of the token if
//! necessary.
//!
//! Every request passes the [`RequestPacer`].

use std::fmt::Write as _;
use std::sync::Arc;

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::HeaderValue;
use hyper::{Request, StatusCode, header};
use secrecy::ExposeSecret;
use tokio::time::{Instant, sleep_until};

use super::access::HttpUrl;
use super::http::{Http, HttpError};
use super::pacer::RequestPacer;
use super::ports::{ParsedPort, PortPage};
use super::token::{AuthError, Token, Tokens};
use crate::ids::PortId;

/// Ports per page.
const PAGE_SIZE: usize = 1000;
/// Maximum number of pages per list.
const MAX_PAGES: usize = 32;
/// Largest accepted response about single ports without trunks.
pub(super) const SINGLE_PORTS_LIMIT: usize = 1024 * 1024;
/// Largest accepted page with ports of a host: 1000 ports of 32 KiB each, or 60 that are parents of
/// the largest possible trunk. Tenants decide how large theirs are, and share the page.
pub(super) const HOST_PORTS_LIMIT: usize = 32 * 1024 * 1024;

/// A request failed.
#[derive(Debug, thiserror::Error)]
#[error("{kind}")]
pub(crate) struct ApiError {
    /// URL of the failed service: Neutron or Keystone.
    pub place: String,
    pub kind: ApiErrorKind,
}

/// Kind of an [`ApiError`].
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApiErrorKind {
    #[error(transparent)]
    Auth(Arc<AuthError>),
    #[error(transparent)]
    Http(#[from] HttpError),
    #[error("request for ports failed with {status}{}", advice(*status))]
    Status { status: StatusCode },
    #[error("response is not a list of ports: {0}")]
    Json(#[source] serde_json::Error),
    /// The list has too many pages, or a link without a marker.
    #[error("list of ports has invalid pages")]
    Pages,
    #[error("cannot create request: {0}")]
    Request(#[source] hyper::http::Error),
}

fn advice(status: StatusCode) -> &'static str {
    match status.as_u16() {
        403 => ": the policy forbids it; the user needs the role admin or service",
        404 => ": neutron_endpoint_override, or the catalog, does not lead to Neutron's API",
        _ => "",
    }
}

/// Neutron's API. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Api {
    http: Arc<Http>,
    tokens: Tokens,
    /// URL of Keystone, for errors.
    keystone: Arc<str>,
    pacer: Arc<RequestPacer<Arc<ApiError>>>,
    is_paced: bool,
}

/// Attribute and value. Several values of one attribute are alternatives.
pub(super) type Filter = (&'static str, String);

impl Api {
    pub(super) fn new(http: Arc<Http>, tokens: Tokens, keystone: &str) -> Self {
        Self { http, tokens, keystone: keystone.into(), pacer: Arc::new(RequestPacer::new()), is_paced: true }
    }

    /// Returns a handle without rate limit, for requests that guests wait for. The caller limits
    /// their concurrency.
    pub(super) fn unpaced(&self) -> Self {
        Self { is_paced: false, ..self.clone() }
    }

    /// Returns the end of the backoff after a failure.
    pub(super) fn blocked_until(&self) -> Option<Instant> {
        self.pacer.blocked_until()
    }

    /// Lists the matching ports that `keep` accepts, with at most `limit` bytes per page.
    pub(super) async fn ports(
        &self,
        fields: &[&str],
        filters: &[Filter],
        limit: usize,
        mut keep: impl FnMut(PortId) -> bool,
    ) -> Result<Vec<ParsedPort>, Arc<ApiError>> {
        let mut kept = Vec::new();
        let mut marker = None;
        for _ in 0..MAX_PAGES {
            let (page, endpoint) = self.page(&query(fields, filters, marker), limit).await?;
            let next = page.next();
            let invalid = page.has_next() && (next.is_none() || next == marker);
            kept.extend(page.into_ports().filter(|(id, _)| keep(*id)));
            match next {
                _ if invalid => return Err(self.fail(&endpoint, ApiErrorKind::Pages)),
                None => return Ok(kept),
                Some(_) => marker = next,
            }
        }
        Err(self.fail(&self.keystone, ApiErrorKind::Pages))
    }

    async fn page(&self, query: &str, limit: usize) -> Result<(PortPage, String), Arc<ApiError>> {
        if self.is_paced {
            let turn = self.pacer.reserve(Instant::now())?;
            sleep_until(turn).await;
        }
        self.pacer.check(Instant::now())?;
        let mut token = self.tokens.get().await.map_err(|error| self.no_token(error))?;
        let mut response = self.send(&token, query, limit).await;
        if let Ok((StatusCode::UNAUTHORIZED, _)) = response {
            token = self.tokens.replace(&token).await.map_err(|error| match *error {
                AuthError::TokenRejected => self.fail(token.endpoint.as_str(), ApiErrorKind::Auth(error)),
                AuthError::Keystone(_) | AuthError::Stopping => self.no_token(error),
            })?;
            response = self.send(&token, query, limit).await;
        }
        let endpoint = token.endpoint.as_str();
        match response {
            Ok((StatusCode::OK, body)) => {
                token.accept();
                let page = serde_json::from_slice(&body)
                    .map_err(|error| self.fail(endpoint, ApiErrorKind::Json(error)))?;
                self.pacer.succeeded();
                Ok((page, endpoint.to_owned()))
            }
            Ok((status, _)) => {
                if status == StatusCode::UNAUTHORIZED {
                    // Invalidate the token, so that the next one is not requested before the
                    // backoff ends.
                    drop(self.tokens.replace(&token).await);
                } else {
                    token.accept();
                    token.doubt_endpoint();
                }
                Err(self.fail(endpoint, ApiErrorKind::Status { status }))
            }
            Err(error) => {
                token.doubt_endpoint();
                Err(self.fail(endpoint, error))
            }
        }
    }

    async fn send(
        &self,
        token: &Token,
        query: &str,
        limit: usize,
    ) -> Result<(StatusCode, Bytes), ApiErrorKind> {
        let mut request = Request::get(format!("{}?{query}", ports_url(&token.endpoint)))
            .header(header::ACCEPT, "application/json");
        if let Some(secret) = &token.secret {
            let value = HeaderValue::try_from(secret.expose_secret());
            let mut value = value.map_err(|error| ApiErrorKind::Request(error.into()))?;
            value.set_sensitive(true);
            request = request.header("x-auth-token", value);
        }
        let request = request.body(Full::default()).map_err(ApiErrorKind::Request)?;
        let (head, body) = self.http.send(request, limit).await?;
        Ok((head.status, body))
    }

    fn no_token(&self, error: Arc<AuthError>) -> Arc<ApiError> {
        self.fail(&self.keystone, ApiErrorKind::Auth(error))
    }

    fn fail(&self, place: &str, kind: ApiErrorKind) -> Arc<ApiError> {
        let error = Arc::new(ApiError { place: place.to_owned(), kind });
        self.pacer.failed(Arc::clone(&error), Instant::now());
        error
    }
}

fn ports_url(endpoint: &HttpUrl) -> String {
    let endpoint = endpoint.as_str();
    let version = if endpoint.ends_with("/v2.0") { "" } else { "/v2.0" };
    format!("{endpoint}{version}/ports")
}

fn query(fields: &[&str], filters: &[Filter], marker: Option<PortId>) -> String {
    let mut query = format!("limit={PAGE_SIZE}&sort_key=id&sort_dir=asc");
    if let Some(marker) = marker {
        append(&mut query, "marker", &marker.to_string());
    }
    for (name, value) in filters {
        append(&mut query, name, value);
    }
    for field in fields {
        append(&mut query, "fields", field);
    }
    query
}

/// Appends a pair. Characters that RFC 3986 allows in a query, and that are not separators, are not
/// encoded.
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
    fn values_are_encoded_in_a_query() {
        let filters =
            [("binding:host_id", "a&b =\u{fc}".to_owned()), ("mac_address", "fa:16:3e:00:00:01".to_owned())];
        let text = query(&["id", "device_id"], &filters, None);
        let want =
            "&binding:host_id=a%26b%20%3D%C3%BC&mac_address=fa:16:3e:00:00:01&fields=id&fields=device_id";
        assert!(text.ends_with(want), "{text}");
        let marker = "3f2a9d10-77c1-4e55-9d0c-2b6f4f1f0a01".parse().unwrap();
        assert!(query(&[], &[], Some(marker)).ends_with("&marker=3f2a9d10-77c1-4e55-9d0c-2b6f4f1f0a01"));
    }

    #[test]
    fn an_endpoint_may_include_the_version() {
        for (endpoint, want) in [
            ("http://a:9696", "http://a:9696/v2.0/ports"),
            ("http://a:9696/v2.0/", "http://a:9696/v2.0/ports"),
            ("https://a/networking", "https://a/networking/v2.0/ports"),
        ] {
            assert_eq!(ports_url(&HttpUrl::parse(endpoint).unwrap()), want);
        }
    }
}
