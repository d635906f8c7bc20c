//! Asks Nova: pooled keep-alive connections to one of its endpoints, over http or https. Or Neutron's metadata agent, over
//! its unix socket, with no more requests at once than it takes.
//!
//! A pooled connection may have been closed by Nova a moment ago, and from outside that looks like a crash in
//! mid-request. So a request that may be repeated goes out on one, and is repeated once, on a new connection. Everything
//! else (the password's POST) gets a connection of its own, unless Nova has shown that it keeps connections and one answered
//! within [`WARM`]: a guest that makes one such request after the other shall not take a port of the host with each.
//!
//! Nothing of the environment is read: no proxy, no netrc. Redirects are answers like others.

use std::error::Error;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::header::HeaderValue;
use hyper::http::response;
use hyper::rt;
use hyper::service::Service;
use hyper::{Request, StatusCode};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

use super::endpoint::{Endpoint, Place};
use super::pool::{Pool, Sender};
use super::tls::{self, TlsConfig, TlsSetupError};
use super::unix;
use crate::proxy::metrics::Metrics;

/// Who keeps connections and answered so lately has not closed for want of work: no server's keep-alive time-out is that short
/// (Apache's, which has the shortest default, is 5 s).
const WARM: Duration = Duration::from_secs(1);
/// Finds out that Nova's host is gone although nothing was closed.
const TCP_KEEPALIVE: Duration = Duration::from_mins(1);

/// Where Nova is and how long it may take.
#[derive(Debug, Clone)]
pub struct UpstreamConfig {
    /// Where Nova is. The first that can be reached is used until it cannot.
    pub endpoints: Vec<Endpoint>,
    /// How to speak TLS, for https.
    pub tls: TlsConfig,
    /// For name, TCP and TLS together.
    pub connect_timeout: Duration,
    /// From the request to the head of its answer.
    pub answer_timeout: Duration,
    /// Between two pieces of an answer's body.
    pub stall_timeout: Duration,
    /// How long a connection is kept without use; shorter than Nova's own (`client_socket_timeout`, `http-keepalive`).
    pub idle_timeout: Duration,
    /// How many connections are kept without use, for each endpoint.
    pub idle_connections: usize,
    /// How many requests may wait for the head of their answer at once, where that has a limit. Others wait their turn
    /// for as long as connecting may take.
    pub waiting_requests: Option<usize>,
}

impl UpstreamConfig {
    /// The defaults, for these endpoints.
    #[must_use]
    pub fn new(endpoints: Vec<Endpoint>) -> Self {
        Self {
            endpoints,
            tls: TlsConfig::default(),
            connect_timeout: Duration::from_secs(5),
            answer_timeout: Duration::from_mins(1),
            stall_timeout: Duration::from_mins(1),
            // Apache in front of Nova, the usual deployment, closes after 5 s.
            idle_timeout: Duration::from_secs(4),
            // As many as there were at once go on to be used; a storm of boots is over before they time out.
            idle_connections: 256,
            waiting_requests: None,
        }
    }

    /// The defaults for Neutron's metadata agent: it closes after each answer, and its accept queue is short.
    #[must_use]
    pub fn neutron_agent(socket: &Path, waiting_requests: usize) -> Self {
        Self {
            idle_connections: 0,
            waiting_requests: Some(waiting_requests),
            ..Self::new(vec![Endpoint::socket(socket)])
        }
    }
}

/// Why the upstream cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamSetupError {
    /// No endpoint is configured.
    #[error("no endpoint of the metadata API is configured")]
    NoEndpoint,
    /// TLS cannot be set up.
    #[error(transparent)]
    Tls(#[from] TlsSetupError),
}

/// Why Nova gave no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum UpstreamError {
    #[error("cannot find the address of {endpoint}")]
    Resolve { endpoint: Place, source: Box<dyn Error + Send + Sync> },
    #[error("cannot connect to {endpoint}")]
    Connect { endpoint: Place, source: Box<dyn Error + Send + Sync> },
    #[error("no connection to {endpoint} within {limit:?}")]
    ConnectTimeout { endpoint: Place, limit: Duration },
    #[error("all of the requests that may be made at once still wait for an answer after {limit:?}")]
    Busy { limit: Duration },
    #[error("no TLS with {endpoint}")]
    Tls { endpoint: Place, source: Box<dyn Error + Send + Sync> },
    #[error("no HTTP with {endpoint}")]
    Handshake { endpoint: Place, source: hyper::Error },
    #[error("the connection to {endpoint} broke before the answer")]
    Broken { endpoint: Place, source: hyper::Error },
    #[error("the answer of {endpoint} is not HTTP")]
    Garbled { endpoint: Place, source: hyper::Error },
    #[error("{endpoint} changed the protocol unasked")]
    Upgraded { endpoint: Place },
    #[error("no answer of {endpoint} within {limit:?}")]
    AnswerTimeout { endpoint: Place, limit: Duration },
}

impl UpstreamError {
    pub(super) const fn label(&self) -> &'static str {
        match self {
            Self::Resolve { .. } => "resolve",
            Self::Connect { .. } => "connect",
            Self::ConnectTimeout { .. } => "connect_timeout",
            Self::Busy { .. } => "busy",
            Self::Tls { .. } => "tls",
            Self::Handshake { .. } => "handshake",
            Self::Broken { .. } => "broken",
            Self::Garbled { .. } => "garbled",
            Self::Upgraded { .. } => "upgraded",
            Self::AnswerTimeout { .. } => "answer_timeout",
        }
    }
}

/// A request that can be made, and be made again.
pub(super) trait Question {
    /// Whether Nova may be asked twice.
    fn repeatable(&self) -> bool;
    /// The request, addressed to `host`.
    fn ask(&mut self, host: &HeaderValue) -> Request<Full<Bytes>>;
}

/// The head of Nova's answer, and its body to come.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) head: response::Parts,
    pub(super) body: Incoming,
    pub(super) lease: Lease,
}

/// A connection in use. Dropped, it is closed; only a whole answer gives it back.
#[derive(Debug)]
pub(super) struct Lease {
    sender: Sender,
    route: Arc<Route>,
}

impl Lease {
    pub(super) fn give_back(self) {
        self.route.pool.give_back(self.sender);
    }
}

#[derive(Debug)]
struct Route {
    endpoint: Endpoint,
    pool: Pool,
    /// A connection that had answered before answered again, the last time one was tried. uWSGI's `http-socket` closes each
    /// and does not say so.
    keeps: AtomicBool,
}

/// The way to Nova.
#[derive(Debug)]
pub struct Upstream {
    routes: Vec<Arc<Route>>,
    /// The route that worked last.
    preferred: AtomicUsize,
    connector: TowerToHyperService<HttpsConnector<HttpConnector>>,
    places: Option<Semaphore>,
    connect_timeout: Duration,
    answer_timeout: Duration,
    pub(super) stall_timeout: Duration,
    metrics: Arc<Metrics>,
    tracker: TaskTracker,
}

impl Upstream {
    /// Reads the TLS files, if TLS is spoken; connects to nothing yet. The tasks of its connections join `tracker`.
    ///
    /// # Errors
    /// [`UpstreamSetupError`] if there is nothing to connect to or the TLS files are not usable.
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
        // Divided among the addresses of a name, so that one that does not answer leaves time for the next.
        tcp.set_connect_timeout(Some(config.connect_timeout));
        let speaks_tls = config.endpoints.iter().any(Endpoint::is_https);
        let tls = if speaks_tls { tls::client_config(&config.tls)? } else { tls::unused()? };
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .wrap_connector(tcp);
        let route = |endpoint| {
            let pool = Pool::new(config.idle_connections, config.idle_timeout);
            Arc::new(Route { endpoint, pool, keeps: AtomicBool::new(false) })
        };
        Ok(Self {
            routes: config.endpoints.into_iter().map(route).collect(),
            preferred: AtomicUsize::new(0),
            connector: TowerToHyperService::new(connector),
            places: config.waiting_requests.map(Semaphore::new),
            connect_timeout: config.connect_timeout,
            answer_timeout: config.answer_timeout,
            stall_timeout: config.stall_timeout,
            metrics,
            tracker,
        })
    }

    /// Closes the idle connections, and with them the tasks that keep them.
    pub fn close_idle(&self) {
        for route in &self.routes {
            route.pool.clear();
        }
    }

    /// Asks Nova and waits for the head of its answer. With the head the place is free for the next request: whoever
    /// answers is done then but for what it writes.
    pub(super) async fn ask(&self, question: &mut impl Question) -> Result<Reply, UpstreamError> {
        let _place = match &self.places {
            Some(places) => Some(self.place(places).await?),
            None => None,
        };
        let repeatable = question.repeatable();
        let route = &self.routes[self.preferred.load(Ordering::Relaxed)];
        let used_within = match (repeatable, route.keeps.load(Ordering::Relaxed)) {
            (true, _) => Duration::MAX,
            (false, true) => WARM,
            (false, false) => Duration::ZERO,
        };
        if let Some(sender) = route.pool.take(used_within) {
            let answer = self.ask_on(route, sender, question).await;
            let broken = matches!(answer, Err(UpstreamError::Broken { .. }));
            if route.keeps.load(Ordering::Relaxed) == broken {
                route.keeps.store(!broken, Ordering::Relaxed);
            }
            if !broken || !repeatable {
                return answer;
            }
            self.metrics.upstream_retry();
        }
        let (route, sender) = self.connect_to_any().await?;
        self.ask_on(&route, sender, question).await
    }

    async fn place<'a>(&self, places: &'a Semaphore) -> Result<SemaphorePermit<'a>, UpstreamError> {
        let limit = self.connect_timeout;
        match timeout(limit, places.acquire()).await {
            Ok(Ok(place)) => Ok(place),
            Ok(Err(_)) => unreachable!("nobody closes this semaphore"),
            Err(_) => Err(UpstreamError::Busy { limit }),
        }
    }

    async fn ask_on(
        &self,
        route: &Arc<Route>,
        mut sender: Sender,
        question: &mut impl Question,
    ) -> Result<Reply, UpstreamError> {
        let endpoint = || route.endpoint.place.clone();
        let answer = sender.try_send_request(question.ask(&route.endpoint.host));
        let answer = timeout(self.answer_timeout, answer)
            .await
            .map_err(|_| UpstreamError::AnswerTimeout { endpoint: endpoint(), limit: self.answer_timeout })?;
        let (head, body) = answer
            .map_err(|failed| {
                let source = failed.into_error();
                if source.is_parse() {
                    UpstreamError::Garbled { endpoint: endpoint(), source }
                } else {
                    UpstreamError::Broken { endpoint: endpoint(), source }
                }
            })?
            .into_parts();
        if head.status == StatusCode::SWITCHING_PROTOCOLS {
            return Err(UpstreamError::Upgraded { endpoint: endpoint() });
        }
        if head.status == StatusCode::FORBIDDEN {
            self.metrics.upstream_forbidden();
        }
        Ok(Reply { head, body, lease: Lease { sender, route: Arc::clone(route) } })
    }

    /// Tries all routes in turn, beginning with the one that worked last.
    async fn connect_to_any(&self) -> Result<(Arc<Route>, Sender), UpstreamError> {
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
                    // Counted here, as the request itself may yet succeed.
                    self.metrics.upstream_error(error.label());
                    tracing::debug!(error = &error as &dyn Error, "trying the next endpoint of Nova");
                }
            }
        }
    }

    async fn connect(&self, endpoint: &Endpoint) -> Result<Sender, UpstreamError> {
        let (place, limit) = (&endpoint.place, self.connect_timeout);
        let late = |_| UpstreamError::ConnectTimeout { endpoint: place.clone(), limit };
        match place {
            Place::Url(url) => {
                let connected = timeout(limit, self.connector.call(url.clone())).await.map_err(late)?;
                let stream = connected.map_err(|source| no_connection(place, limit, source))?;
                self.shake_hands(place, stream).await
            }
            Place::Socket(path) => {
                let connected = timeout(limit, unix::connect(path)).await.map_err(late)?;
                let stream = connected.map_err(|source| UpstreamError::Connect {
                    endpoint: place.clone(),
                    source: source.into(),
                })?;
                self.shake_hands(place, TokioIo::new(stream)).await
            }
        }
    }

    async fn shake_hands<T>(&self, place: &Place, stream: T) -> Result<Sender, UpstreamError>
    where
        T: rt::Read + rt::Write + Unpin + Send + 'static,
    {
        let (sender, connection) = http1::handshake(stream)
            .await
            .map_err(|source| UpstreamError::Handshake { endpoint: place.clone(), source })?;
        self.metrics.upstream_connection();
        // Ends when the sender is dropped or the other side closes.
        self.tracker.spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(error = &error as &dyn Error, "connection to the metadata API ended");
            }
        });
        Ok(sender)
    }
}

/// Reads the connector's boxed error: the sources of it are the only place where the kind is told.
fn no_connection(place: &Place, limit: Duration, source: Box<dyn Error + Send + Sync>) -> UpstreamError {
    let endpoint = place.clone();
    let mut cause: Option<&(dyn Error + 'static)> = Some(&*source);
    let mut refused = false;
    while let Some(error) = cause {
        if error.is::<rustls::Error>() {
            return UpstreamError::Tls { endpoint, source };
        }
        cause = error.source();
        if let Some(error) = error.downcast_ref::<io::Error>() {
            if error.kind() == io::ErrorKind::TimedOut {
                return UpstreamError::ConnectTimeout { endpoint, limit };
            }
            // A name that is not found carries no errno.
            refused |= error.raw_os_error().is_some();
            // `io::Error::source` skips the error it wraps and goes on with that one's source.
            if let Some(inner) = error.get_ref() {
                cause = Some(inner);
            }
        }
    }
    if refused {
        UpstreamError::Connect { endpoint, source }
    } else if is_tls_eof(&*source) {
        UpstreamError::Tls { endpoint, source }
    } else {
        UpstreamError::Resolve { endpoint, source }
    }
}

/// A server that closes in mid-handshake: an I/O error of the TLS layer without errno and without rustls' own error.
fn is_tls_eof(error: &(dyn Error + 'static)) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::UnexpectedEof)
}
