//! Sends requests to Nova over pooled keep-alive connections, or to Neutron's metadata agent over
//! its unix socket.
//!
//! A connection belongs to one guest ([`share`]), so that no fault of the server can pass bytes
//! from one guest to another. It is reused only after exactly one complete response to a request
//! without a body, and not for a while after the server sent the guest more than it was asked for.
//!
//! Nova may have closed a kept connection a moment ago, which looks the same as a crash during the
//! request. So a request that may be repeated goes out on a kept connection, and is sent once more
//! on a new connection if that one breaks. Any other request (the password's POST) gets a
//! connection of its own, which is closed after the response.
//!
//! The requests in flight are bounded: for each guest, and for all. See [`slots`].
//!
//! Names, unix sockets and certificates come from outside. See [`access`].
//!
//! Nothing is read from the environment: no proxy, no netrc. Redirects are passed on like any
//! response.

mod access;
mod address;
mod body;
mod config;
mod connect;
mod endpoints;
mod error;
mod pool;
mod probe;
mod resolve;
mod share;
mod slots;
mod stream;
mod tls;

use std::error::Error;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{HeaderMap, HeaderValue};
use hyper::http::response;
use hyper::http::uri::PathAndQuery;
use hyper::{Method, Request, StatusCode, Uri};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::task::TaskTracker;

pub use access::{NameLookup, NameLookupFuture, SocketConnector, SocketFuture, UpstreamAccess};
pub use address::{Endpoint, EndpointError, Scheme};
pub(crate) use body::{UpstreamBody, UpstreamBodyError};
pub use config::{UpstreamConfig, UpstreamSetupError};
pub(crate) use error::UpstreamError;
pub use probe::{ProbeError, TlsErrorKind, probe, probe_secrets};
pub use tls::{TlsFeed, UpstreamTls};

use super::client::GuestKey;
use super::metrics::Metrics;
use super::request::{AuthHeaders, set_empty_length, set_upstream_headers};
pub(super) use connect::RECEIVED_MEMORY;
use connect::{Connector, NEXT_ADDRESS, UpstreamConnection};
use endpoints::{EndpointState, Endpoints};
use error::{is_silence, is_unsolicited};
pub(crate) use share::GuestShare;
use share::Shares;
use slots::{Slot, SlotLimit, Slots};

/// A request to the metadata API, complete but for the endpoint's `Host` and the client's
/// credentials.
#[derive(Debug)]
pub(crate) struct UpstreamRequest<'a> {
    pub(crate) method: Method,
    pub(crate) path: PathAndQuery,
    pub(crate) body: Bytes,
    pub(crate) content_type: Option<HeaderValue>,
    pub(crate) forwarded_for: Option<&'a HeaderValue>,
    /// The guest's connection has larger buffers. The one to the upstream gets them as well; any
    /// other request gets the usual ones, whatever the connection was used for before.
    pub(crate) has_large_buffers: bool,
    /// The share of the guest, or `None` for a request on behalf of no guest.
    pub(crate) share: Option<Arc<GuestShare>>,
    /// A map to reuse for the headers, which saves the allocations of a new one. Its content is
    /// ignored.
    pub(crate) spare_headers: HeaderMap,
}

impl UpstreamRequest<'_> {
    /// Returns whether the request may be sent twice, and its connection be used again.
    ///
    /// A server that leaves a body unread takes it for the next request on that connection.
    fn is_repeatable(&self) -> bool {
        self.method.is_idempotent() && self.body.is_empty()
    }

    /// Builds the request for one attempt.
    fn build(&mut self, host: &HeaderValue, auth: AuthHeaders<'_>) -> Request<Full<Bytes>> {
        let mut headers = std::mem::take(&mut self.spare_headers);
        headers.clear();
        // Neutron's agent has a thread for each connection, or one for all, so its haproxy closes
        // them too (http-server-close).
        let is_last = !self.is_repeatable() || matches!(auth, AuthHeaders::Network(_));
        let content_type = self.content_type.as_ref();
        set_upstream_headers(&mut headers, host, auth, self.forwarded_for, content_type, is_last);
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
    lease: ConnectionLease,
    stall_timeout: Duration,
}

impl UpstreamResponse {
    pub(crate) fn into_parts(self) -> (response::Parts, UpstreamBody) {
        (self.head, UpstreamBody::new(self.body, self.lease, self.stall_timeout))
    }
}

/// A connection in use, and the guest's slot. Dropping it closes the connection; only a complete
/// response gives it back.
#[derive(Debug)]
struct ConnectionLease {
    connection: UpstreamConnection,
    endpoint: Arc<EndpointState>,
    /// The guest that may use the connection again.
    reused_by: Option<Arc<GuestShare>>,
    /// Released at the end of the response.
    slot: Option<Slot>,
}

impl ConnectionLease {
    fn give_back(self) {
        if let Some(share) = self.reused_by
            && share.reuse.is_allowed()
        {
            share.idle.give_back(self.connection, self.endpoint);
        }
    }
}

/// A bound on the requests in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RequestBound {
    Guest,
    All,
}

impl fmt::Display for RequestBound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Guest => "the guest has too many requests in flight",
            Self::All => "all guests together have too many requests in flight",
        })
    }
}

/// The endpoints of the metadata API and their connections.
#[derive(Debug)]
pub struct Upstream {
    endpoints: Endpoints,
    connector: Connector,
    shares: Arc<Shares>,
    /// For requests that wait for the head of their response.
    slots: Arc<Slots>,
    connect_timeout: Duration,
    answer_timeout: Duration,
    stall_timeout: Duration,
    metrics: Arc<Metrics>,
}

impl Upstream {
    /// Does not connect yet. The tasks of connections join `tracker`.
    ///
    /// # Errors
    /// [`UpstreamSetupError`] if there is no endpoint, or one uses https without certificates.
    pub fn new(
        config: UpstreamConfig,
        access: UpstreamAccess,
        metrics: Arc<Metrics>,
        tracker: TaskTracker,
    ) -> Result<Self, UpstreamSetupError> {
        if config.endpoints.is_empty() {
            return Err(UpstreamSetupError::NoEndpoint);
        }
        if config.uses_tls() && access.tls.is_none() {
            return Err(UpstreamSetupError::NoTls);
        }
        Ok(Self {
            endpoints: Endpoints::new(config.endpoints, &access.names),
            connector: Connector::new(access, config.connect_timeout, Arc::clone(&metrics), tracker),
            shares: Shares::new(config.requests_per_guest, config.idle_connections, config.idle_timeout),
            slots: Slots::new(SlotLimit::Fixed(config.waiting_requests)),
            connect_timeout: config.connect_timeout,
            answer_timeout: config.answer_timeout,
            stall_timeout: config.stall_timeout,
            metrics,
        })
    }

    /// Returns the share of a guest.
    pub(crate) fn share(&self, key: GuestKey) -> Arc<GuestShare> {
        self.shares.find(key)
    }

    /// Closes the idle connections, which also ends their tasks.
    pub(crate) fn close_idle(&self) {
        self.shares.close_idle();
    }

    /// Sends a request and waits for the head of the response.
    ///
    /// The caller drops the response to an earlier attempt first: it holds one of the guest's
    /// slots.
    pub(crate) async fn send(
        &self,
        request: &mut UpstreamRequest<'_>,
        auth: AuthHeaders<'_>,
    ) -> Result<UpstreamResponse, UpstreamError> {
        let share = request.share.clone();

        // Wait for a slot of the guest, then of all. The latter is free again at the head of the
        // response, because the server then only has to write.
        let (slot, _head_slot) = match &share {
            Some(share) => self.slots_of(share).await?,
            None => (None, None),
        };

        // Try a connection that the guest used before.
        let endpoint = self.endpoints.preferred();
        let reused_by = share.filter(|_| request.is_repeatable());
        let kept = reused_by.as_ref().filter(|share| share.reuse.is_allowed());
        if let Some(connection) = kept.and_then(|share| share.idle.take(endpoint)) {
            connection.check_before_reuse();
            match self.send_on(endpoint, connection, request, auth).await {
                // Nova has closed the connection, or what arrived was not meant for this request.
                Err(UpstreamError::Broken { .. } | UpstreamError::Garbled { .. }) => {
                    self.metrics.upstream_retry();
                }
                // The server's time-out crossed the request, which it has not read.
                Ok(response) if response.head.status == StatusCode::REQUEST_TIMEOUT => {
                    self.metrics.upstream_retry();
                }
                result => return result.map(|response| response.held_by(reused_by, slot)),
            }
        }

        // Open a new connection, and another one if a client certificate was refused that was
        // replaced a moment ago.
        let tls = self.connector.tls_in_force();
        let mut response = self.send_on_new(request, auth).await;
        let may_be_refused = match &response {
            // The reset may have overtaken the alert.
            Err(error @ UpstreamError::Broken { .. }) => {
                request.is_repeatable() || error.is_about_certificates()
            }
            _ => false,
        };
        if let Some(tls) = &tls
            && may_be_refused
            && self.connector.has_replaced_tls(tls).await
        {
            self.metrics.upstream_retry();
            response = self.send_on_new(request, auth).await;
        }
        response.map(|response| response.held_by(reused_by, slot))
    }

    async fn send_on_new(
        &self,
        request: &mut UpstreamRequest<'_>,
        auth: AuthHeaders<'_>,
    ) -> Result<UpstreamResponse, UpstreamError> {
        let (endpoint, connection) = self.connect_to_any(request.share.as_deref()).await?;
        self.send_on(&endpoint, connection, request, auth).await
    }

    /// Waits for a slot of the guest and for one of all.
    async fn slots_of(&self, share: &GuestShare) -> Result<(Option<Slot>, Option<Slot>), UpstreamError> {
        let mut deadline = None;
        let own = self.slot(&share.slots, share, RequestBound::Guest, &mut deadline).await?;
        let common = self.slot(&self.slots, share, RequestBound::All, &mut deadline).await?;
        Ok((Some(own), Some(common)))
    }

    async fn slot(
        &self,
        slots: &Arc<Slots>,
        share: &GuestShare,
        bound: RequestBound,
        deadline: &mut Option<Instant>,
    ) -> Result<Slot, UpstreamError> {
        if let Some(slot) = slots.try_acquire() {
            return Ok(slot);
        }
        let (began, limit) = (Instant::now(), self.connect_timeout);
        let deadline = *deadline.get_or_insert(began + limit);
        let slot = slots.wait(share.key(), deadline).await;
        self.metrics.upstream_wait(bound, began.elapsed());
        slot.ok_or(UpstreamError::Busy { limit, bound })
    }

    async fn send_on(
        &self,
        endpoint: &Arc<EndpointState>,
        mut connection: UpstreamConnection,
        request: &mut UpstreamRequest<'_>,
        auth: AuthHeaders<'_>,
    ) -> Result<UpstreamResponse, UpstreamError> {
        connection.set_large_buffers(request.has_large_buffers);
        let address = || endpoint.address();
        let response = connection.sender.try_send_request(request.build(&endpoint.endpoint.host, auth));
        let response = timeout(self.answer_timeout, response).await.map_err(|_| {
            self.was_silent(endpoint);
            UpstreamError::AnswerTimeout { address: address(), limit: self.answer_timeout }
        })?;
        let (head, body) = response
            .map_err(|failed| {
                let source = failed.into_error();
                if is_silence(&source) {
                    self.was_silent(endpoint);
                }
                if is_unsolicited(&source) && !connection.has_timed_out() {
                    let reuse = request.share.as_deref().map(|share| &*share.reuse);
                    endpoint.report_unsolicited(reuse, &self.metrics);
                }
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
        if head.status.is_server_error() {
            self.endpoints.failed(endpoint);
        }
        if head.status == StatusCode::FORBIDDEN {
            self.metrics.upstream_forbidden();
        }
        let endpoint = Arc::clone(endpoint);
        let lease = ConnectionLease { connection, endpoint, reused_by: None, slot: None };
        Ok(UpstreamResponse { head, body, lease, stall_timeout: self.stall_timeout })
    }

    /// Learns that a server did not answer in time, or acknowledged nothing.
    fn was_silent(&self, endpoint: &Arc<EndpointState>) {
        endpoint.was_silent();
        self.endpoints.failed(endpoint);
    }

    /// Connects to the first endpoint that accepts, which is preferred from then on. One that takes
    /// long delays the next one by [`NEXT_ADDRESS`] only.
    async fn connect_to_any(
        &self,
        share: Option<&GuestShare>,
    ) -> Result<(Arc<EndpointState>, UpstreamConnection), UpstreamError> {
        let reuse = share.map(|share| &share.reuse);
        let connect = async |endpoint: &Arc<EndpointState>| {
            (Arc::clone(endpoint), self.connector.connect(endpoint, reuse).await)
        };
        let mut rest = self.endpoints.in_order();
        if self.endpoints.is_single() {
            let (endpoint, connection) = connect(self.endpoints.preferred()).await;
            return Ok((endpoint, connection?));
        }
        let mut attempts = FuturesUnordered::new();
        loop {
            attempts.extend(rest.next().map(&connect));
            tokio::select! {
                Some((endpoint, connected)) = attempts.next() => match connected {
                    Ok(connection) => {
                        self.endpoints.prefer(&endpoint);
                        return Ok((endpoint, connection));
                    }
                    Err(error) => {
                        self.endpoints.failed(&endpoint);
                        if attempts.is_empty() && rest.len() == 0 {
                            return Err(error);
                        }
                        // Counted here, because the request itself may yet succeed.
                        self.metrics.upstream_error(error.label());
                        tracing::debug!(
                            error = &error as &dyn Error,
                            "connection failed; trying the next endpoint"
                        );
                    }
                },
                () = sleep(NEXT_ADDRESS), if rest.len() > 0 => {}
            }
        }
    }
}

impl UpstreamResponse {
    fn held_by(mut self, reused_by: Option<Arc<GuestShare>>, slot: Option<Slot>) -> Self {
        self.lease.reused_by = reused_by;
        self.lease.slot = slot;
        self
    }
}
