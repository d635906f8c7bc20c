//! Sends requests to Nova over pooled keep-alive connections, or to Neutron's metadata agent over
//! its unix socket.
//!
//! Nova may have closed a pooled connection a moment ago, which looks the same as a crash during
//! the request. So a request that may be repeated goes out on a pooled connection, and is sent once
//! more on a new connection if that one breaks.
//!
//! Any other request (the password's POST) gets a new connection, unless Nova has shown that it
//! keeps connections and one answered within [`WARM`]. A guest that makes many such requests must
//! not use up a port of the host for each.
//!
//! Nothing is read from the environment: no proxy, no netrc. Redirects are passed on like any
//! response.

mod address;
mod body;
mod config;
mod error;
mod pool;
mod probe;
mod tls;

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::header::{HeaderMap, HeaderValue};
use hyper::http::response;
use hyper::http::uri::PathAndQuery;
use hyper::rt;
use hyper::service::Service;
use hyper::{Method, Request, StatusCode, Uri};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

pub use address::{Endpoint, EndpointError, Scheme};
pub(crate) use body::{UpstreamBody, UpstreamBodyError};
pub use config::{UpstreamConfig, UpstreamSetupError};
pub(crate) use error::UpstreamError;
pub use probe::{ProbeError, TlsErrorKind, probe};
pub use tls::{ClientCertificate, TlsConfig, TlsSetupError};

use super::RESPONSE_PIECE;
use super::metrics::Metrics;
use super::request::{AuthHeaders, set_empty_length, set_upstream_headers};
use address::{UpstreamAddress, connect_unix};
use pool::{Pool, Sender};

/// The longest idle time after which we assume that the server has not closed a connection. No
/// server's keep-alive time-out is that short (Apache's, which has the shortest default, is 5 s).
const WARM: Duration = Duration::from_secs(1);
/// Detects that Nova's host has vanished without closing its connections.
const TCP_KEEPALIVE: Duration = Duration::from_mins(1);

/// A request to the metadata API, complete but for the endpoint's `Host` and the client's
/// credentials.
#[derive(Debug)]
pub(crate) struct UpstreamRequest<'a> {
    pub(crate) method: Method,
    pub(crate) path: PathAndQuery,
    pub(crate) body: Bytes,
    pub(crate) content_type: Option<HeaderValue>,
    pub(crate) forwarded_for: Option<&'a HeaderValue>,
    /// A map to reuse for the headers, which saves the allocations of a new one. Its content is
    /// ignored.
    pub(crate) spare_headers: HeaderMap,
}

impl UpstreamRequest<'_> {
    fn is_repeatable(&self) -> bool {
        self.method.is_idempotent()
    }

    /// Builds the request for one attempt.
    fn build(&mut self, host: &HeaderValue, auth: AuthHeaders<'_>) -> Request<Full<Bytes>> {
        let mut headers = std::mem::take(&mut self.spare_headers);
        headers.clear();
        set_upstream_headers(&mut headers, host, auth, self.forwarded_for, self.content_type.as_ref());
        if self.body.is_empty() {
            set_empty_length(&mut headers, &self.method);
        }
        let mut request = Request::new(Full::new(self.body.clone()));
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = Uri::from(self.path.clone());
        *request.headers_mut() = headers;
        request
    }
}

/// The head of a response, and its body to come.
#[derive(Debug)]
pub(crate) struct UpstreamResponse {
    pub(crate) head: response::Parts,
    body: Incoming,
    lease: PooledConnection,
    stall_timeout: Duration,
}

impl UpstreamResponse {
    pub(crate) fn into_parts(self) -> (response::Parts, UpstreamBody) {
        (self.head, UpstreamBody::new(self.body, self.lease, self.stall_timeout))
    }
}

/// A connection in use. Dropping it closes the connection; only a complete response gives it back.
#[derive(Debug)]
struct PooledConnection {
    sender: Sender,
    route: Arc<EndpointPool>,
}

impl PooledConnection {
    fn give_back(self) {
        self.route.pool.give_back(self.sender);
    }
}

#[derive(Debug)]
struct EndpointPool {
    endpoint: Endpoint,
    pool: Pool,
    /// Set if the last pooled connection that was tried answered again. uWSGI's `http-socket`
    /// closes each connection without sending `Connection: close`.
    keeps_connections: AtomicBool,
}

/// The endpoints of the metadata API and their connections.
#[derive(Debug)]
pub struct Upstream {
    routes: Vec<Arc<EndpointPool>>,
    /// Index of the route that worked last.
    preferred: AtomicUsize,
    connector: TowerToHyperService<HttpsConnector<HttpConnector>>,
    request_slots: Option<Semaphore>,
    connect_timeout: Duration,
    answer_timeout: Duration,
    stall_timeout: Duration,
    metrics: Arc<Metrics>,
    tracker: TaskTracker,
}

impl Upstream {
    /// Reads the TLS files if an endpoint uses https, and does not connect yet. The tasks of
    /// connections join `tracker`.
    ///
    /// # Errors
    /// [`UpstreamSetupError`] if there is no endpoint, or the TLS files cannot be used.
    pub fn new(
        config: UpstreamConfig,
        metrics: Arc<Metrics>,
        tracker: TaskTracker,
    ) -> Result<Self, UpstreamSetupError> {
        if config.endpoints.is_empty() {
            return Err(UpstreamSetupError::NoEndpoint);
        }
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_keepalive(Some(TCP_KEEPALIVE));
        // Divided among the addresses of a name, so that a dead one leaves time for the next.
        tcp.set_connect_timeout(Some(config.connect_timeout));
        let uses_tls = config.endpoints.iter().any(Endpoint::is_https);
        let tls = if uses_tls { tls::client_config(&config.tls)? } else { tls::unused()? };
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .wrap_connector(tcp);
        let route = |endpoint| {
            let pool = Pool::new(config.idle_connections, config.idle_timeout);
            Arc::new(EndpointPool { endpoint, pool, keeps_connections: AtomicBool::new(false) })
        };
        Ok(Self {
            routes: config.endpoints.into_iter().map(route).collect(),
            preferred: AtomicUsize::new(0),
            connector: TowerToHyperService::new(connector),
            request_slots: config.waiting_requests.map(Semaphore::new),
            connect_timeout: config.connect_timeout,
            answer_timeout: config.answer_timeout,
            stall_timeout: config.stall_timeout,
            metrics,
            tracker,
        })
    }

    /// Closes the idle connections, which also ends their tasks.
    pub(crate) fn close_idle(&self) {
        for route in &self.routes {
            route.pool.clear();
        }
    }

    /// Sends a request and waits for the head of the response.
    pub(crate) async fn send(
        &self,
        request: &mut UpstreamRequest<'_>,
        auth: AuthHeaders<'_>,
    ) -> Result<UpstreamResponse, UpstreamError> {
        // Wait for a slot, if concurrent requests are limited. It is free again at the head of the
        // response, because the server then only has to write.
        let _slot = match &self.request_slots {
            Some(slots) => Some(self.request_slot(slots).await?),
            None => None,
        };

        // Try a pooled connection.
        let repeatable = request.is_repeatable();
        let route = &self.routes[self.preferred.load(Ordering::Relaxed)];
        let used_within = match (repeatable, route.keeps_connections.load(Ordering::Relaxed)) {
            (true, _) => Duration::MAX,
            (false, true) => WARM,
            (false, false) => Duration::ZERO,
        };
        if let Some(sender) = route.pool.take(used_within) {
            let response = self.send_on(route, sender, request, auth).await;
            let broken = matches!(response, Err(UpstreamError::Broken { .. }));
            if route.keeps_connections.load(Ordering::Relaxed) == broken {
                route.keeps_connections.store(!broken, Ordering::Relaxed);
            }
            if !broken || !repeatable {
                return response;
            }
            self.metrics.upstream_retry();
        }

        // Open a new connection.
        let (route, sender) = self.connect_to_any().await?;
        self.send_on(&route, sender, request, auth).await
    }

    async fn request_slot<'a>(&self, slots: &'a Semaphore) -> Result<SemaphorePermit<'a>, UpstreamError> {
        let limit = self.connect_timeout;
        match timeout(limit, slots.acquire()).await {
            Ok(Ok(slot)) => Ok(slot),
            Ok(Err(_)) => unreachable!("this semaphore is never closed"),
            Err(_) => Err(UpstreamError::Busy { limit }),
        }
    }

    async fn send_on(
        &self,
        route: &Arc<EndpointPool>,
        mut sender: Sender,
        request: &mut UpstreamRequest<'_>,
        auth: AuthHeaders<'_>,
    ) -> Result<UpstreamResponse, UpstreamError> {
        let address = || route.endpoint.address.clone();
        let response = sender.try_send_request(request.build(&route.endpoint.host, auth));
        let response = timeout(self.answer_timeout, response)
            .await
            .map_err(|_| UpstreamError::AnswerTimeout { address: address(), limit: self.answer_timeout })?;
        let (head, body) = response
            .map_err(|failed| {
                let source = failed.into_error();
                if source.is_parse() {
                    UpstreamError::Garbled { address: address(), source }
                } else {
                    UpstreamError::Broken { address: address(), source }
                }
            })?
            .into_parts();
        if head.status == StatusCode::SWITCHING_PROTOCOLS {
            return Err(UpstreamError::Upgraded { address: address() });
        }
        if head.status == StatusCode::FORBIDDEN {
            self.metrics.upstream_forbidden();
        }
        let lease = PooledConnection { sender, route: Arc::clone(route) };
        Ok(UpstreamResponse { head, body, lease, stall_timeout: self.stall_timeout })
    }

    /// Tries all routes in turn, beginning with the one that worked last.
    async fn connect_to_any(&self) -> Result<(Arc<EndpointPool>, Sender), UpstreamError> {
        let first = self.preferred.load(Ordering::Relaxed);
        let mut at = first;
        loop {
            match self.connect(&self.routes[at].endpoint).await {
                Ok(sender) => {
                    self.preferred.store(at, Ordering::Relaxed);
                    return Ok((Arc::clone(&self.routes[at]), sender));
                }
                Err(error) => {
                    at = (at + 1) % self.routes.len();
                    if at == first {
                        return Err(error);
                    }
                    // Counted here, because the request itself may yet succeed.
                    self.metrics.upstream_error(error.label());
                    tracing::debug!(
                        error = &error as &dyn Error,
                        "connection failed; trying the next endpoint"
                    );
                }
            }
        }
    }

    async fn connect(&self, endpoint: &Endpoint) -> Result<Sender, UpstreamError> {
        let (address, limit) = (&endpoint.address, self.connect_timeout);
        let late = |_| UpstreamError::ConnectTimeout { address: address.clone(), limit };
        match address {
            UpstreamAddress::Tcp(url) => {
                let connected = timeout(limit, self.connector.call(url.clone())).await.map_err(late)?;
                let stream = connected
                    .map_err(|source| UpstreamError::from_connector(address.clone(), limit, source))?;
                self.handshake(address, stream).await
            }
            UpstreamAddress::Unix(path) => {
                let connected = timeout(limit, connect_unix(path)).await.map_err(late)?;
                let stream = connected.map_err(|source| UpstreamError::Connect {
                    address: address.clone(),
                    source: source.into(),
                })?;
                self.handshake(address, TokioIo::new(stream)).await
            }
        }
    }

    async fn handshake<T>(&self, address: &UpstreamAddress, stream: T) -> Result<Sender, UpstreamError>
    where
        T: rt::Read + rt::Write + Unpin + Send + 'static,
    {
        let (sender, connection) = http1::Builder::new()
            .max_buf_size(RESPONSE_PIECE)
            .handshake(stream)
            .await
            .map_err(|source| UpstreamError::Handshake { address: address.clone(), source })?;
        self.metrics.upstream_connection();
        // Ends when the sender is dropped or the server closes.
        self.tracker.spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(error = &error as &dyn Error, "upstream connection ended");
            }
        });
        Ok(sender)
    }
}
