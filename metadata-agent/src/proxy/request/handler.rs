//! The phases of one request, in order: check the target, apply the limits, identify the client,
//! read the body, send, relay the response.

use std::convert::Infallible;
use std::error::Error;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::{Body, Bytes, Incoming};
use hyper::header::CONTENT_TYPE;
use hyper::http::uri::PathAndQuery;
use hyper::{Method, Request, Response, StatusCode, Version};
use metadata_ebpf::identity::AttachmentId;

use super::headers::{AuthHeaders, remove_hop_by_hop};
use super::record::RequestRecord;
use super::rejection::Rejection;
use super::response::ResponseBody;
use super::target::{TargetError, upstream_path};
use crate::proxy::client::{
    Caller, Client, ClientSource, GuestKey, IdentityKind, LimitedGuest, SignedIdentity,
};
use crate::proxy::downstream::{ConnectionActivity, GuestRate, Ticket};
use crate::proxy::upstream::{GuestShare, UpstreamRequest, UpstreamResponse};
use crate::proxy::{Proxy, ProxyConfig};

/// Handles the requests of one connection.
#[derive(Debug)]
pub(crate) struct RequestHandler {
    proxy: Arc<Proxy>,
    source: ClientSource,
    activity: Arc<ConnectionActivity>,
    rate: Option<GuestRate>,
    ticket: Mutex<Ticket>,
    /// The share of the guest that sent the first request.
    share: OnceLock<Arc<GuestShare>>,
}

impl RequestHandler {
    pub(crate) fn new(
        proxy: Arc<Proxy>,
        source: ClientSource,
        activity: Arc<ConnectionActivity>,
        ticket: Ticket,
    ) -> Self {
        let rate = proxy.rates.as_ref().zip(source.guest_connection());
        let rate = rate.and_then(|(rates, guest)| rates.connection(guest));
        Self { proxy, source, activity, rate, ticket: Mutex::new(ticket), share: OnceLock::new() }
    }

    pub(crate) fn attachment(&self) -> Option<AttachmentId> {
        self.source.attachment()
    }

    /// Returns whether this is a haproxy connection whose first head has not been read.
    pub(crate) fn awaits_haproxy_head(&self) -> bool {
        self.is_haproxy() && self.ticket().awaits_head()
    }

    /// Returns whether the connection may stay open until its peer closes it. No more requests may
    /// follow.
    pub(crate) fn may_linger(&self) -> bool {
        !self.is_haproxy() || self.ticket().may_linger()
    }

    pub(crate) async fn handle(
        self: Arc<Self>,
        request: Request<Incoming>,
    ) -> Result<Response<ResponseBody>, Infallible> {
        let path = request.uri().path_and_query();
        let attachment = self.attachment();
        let mut record =
            RequestRecord::begin(&self.proxy.metrics, &self.activity, attachment, request.method(), path);
        Ok(match self.forward(request, &mut record).await {
            Ok(response) => Self::relay(response, record),
            Err(rejection) => self.reject(&rejection, record),
        })
    }

    async fn forward(
        &self,
        request: Request<Incoming>,
        record: &mut RequestRecord,
    ) -> Result<UpstreamResponse, Rejection> {
        let (head, body) = request.into_parts();

        // Check the request target.
        if self.activity.take_fragment() {
            return Err(TargetError::Fragment.into());
        }
        let path = upstream_path(&head.method, &head.uri, &head.headers)?;

        // Apply the rate limit.
        if let Some(rate) = &self.rate {
            rate.admit(&head.method, &path)?;
        }

        // Identify the client. This may wait for its port to become known, so a haproxy's request
        // counts for its client before.
        let caller = self.source.caller(&head.headers)?;
        if let Caller::Forwarded(_) = caller {
            self.count_for(caller.limited())?;
        }
        let client = self.proxy.clients.resolve(&caller).await?;
        record.identified(client.identity().instance());
        self.apply_instance_limits(&head.method, &path, client.limited())?;

        // Read the whole body first, so that a slow guest does not hold a connection to Nova.
        let body = read_body(body, &self.proxy.config).await?;
        // Nova reads it with POST alone. A server would take an unread one for another request.
        let body = if head.method == Method::POST { body } else { Bytes::new() };
        let content_type = if body.is_empty() { None } else { head.headers.get(CONTENT_TYPE).cloned() };

        // Send, with the credentials of the client.
        let mut request = UpstreamRequest {
            method: head.method,
            path,
            body,
            content_type,
            forwarded_for: Some(client.forwarded_for()),
            has_large_buffers: self.activity.has_large_buffers(),
            share: Some(self.share_of(&client)),
            spare_headers: head.headers,
        };
        match client.identity().kind() {
            IdentityKind::Signed(signed) => self.send_signed(&mut request, signed).await,
            IdentityKind::ByNetwork(network) => {
                Ok(self.proxy.upstream.send(&mut request, AuthHeaders::Network(network)).await?)
            }
        }
    }

    /// Counts for the client's instance, unless the connection has counted for it from the start.
    fn apply_instance_limits(
        &self,
        method: &Method,
        path: &PathAndQuery,
        client: LimitedGuest,
    ) -> Result<(), Rejection> {
        let guest = self.source.guest_connection();
        if guest.is_some_and(|guest| guest.limited() == client) {
            return Ok(());
        }
        self.count_for(client)?;
        let rate = self.proxy.rates.as_ref().zip(guest);
        match rate.and_then(|(rates, guest)| rates.instance(guest, client)) {
            Some(rate) => rate.admit(method, path),
            None => Ok(()),
        }
    }

    /// Counts the connection for this guest from now on.
    fn count_for(&self, guest: LimitedGuest) -> Result<(), Rejection> {
        Ok(self.ticket().count_for(guest)?)
    }

    fn ticket(&self) -> MutexGuard<'_, Ticket> {
        self.ticket.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_haproxy(&self) -> bool {
        self.source.guest_connection().is_none()
    }

    /// Returns the share of a client. Mostly all requests of a connection have the same.
    fn share_of(&self, client: &Client<'_>) -> Arc<GuestShare> {
        let key = match client.identity().kind() {
            // Connections to Nova are kept for the instance whose requests they carried.
            IdentityKind::Signed(signed) => GuestKey::Instance(signed.instance()),
            IdentityKind::ByNetwork(_) => client.limited().key,
        };
        let first = self.share.get_or_init(|| self.proxy.upstream.share(key));
        if first.key() == key { Arc::clone(first) } else { self.proxy.upstream.share(key) }
    }

    /// Sends with the signature that Nova accepted last, and if it is refused, with each of the
    /// others.
    async fn send_signed(
        &self,
        request: &mut UpstreamRequest<'_>,
        signed: &SignedIdentity,
    ) -> Result<UpstreamResponse, Rejection> {
        let (upstream, secrets) = (&self.proxy.upstream, self.proxy.clients.secrets());
        let signatures = signed.signatures();
        let (first, signature) = signatures.first(secrets);
        let mut response = upstream.send(request, AuthHeaders::Signed(signed, signature)).await?;
        for (number, signature) in signatures.others(first) {
            if !is_forbidden(&response) {
                return Ok(response);
            }
            // The refused response holds one of the guest's slots.
            drop(response);
            // A POST may be repeated here too: Nova checks the signature before it does anything.
            response = upstream.send(request, AuthHeaders::Signed(signed, signature)).await?;
            if !is_forbidden(&response) && !response.head.status.is_server_error() {
                secrets.accepted(signatures.generation(), number);
                tracing::debug!(number, "Nova accepted another shared secret");
            }
        }
        if is_forbidden(&response) {
            secrets.all_refused(signatures.generation());
            if self.proxy.signature_log.allow() {
                tracing::warn!(
                    "Nova answered 403; metadata_proxy_shared_secret (shared_secret_files) differs from the \
                     one in Nova's [neutron] section"
                );
            }
        }
        Ok(response)
    }

    fn relay(response: UpstreamResponse, mut record: RequestRecord) -> Response<ResponseBody> {
        let (mut head, body) = response.into_parts();
        head.version = Version::HTTP_11;
        remove_hop_by_hop(&mut head.headers);
        record.responded(head.status);
        Response::from_parts(head, ResponseBody::from_upstream(body, record))
    }

    fn reject(&self, rejection: &Rejection, mut record: RequestRecord) -> Response<ResponseBody> {
        rejection.count(&self.proxy.metrics);
        let attachment = self.attachment().map(tracing::field::display);
        let error = rejection as &dyn Error;
        if matches!(rejection, Rejection::Upstream(_)) && self.proxy.upstream_log.allow() {
            tracing::warn!(attachment, error, "upstream request failed");
        } else {
            tracing::debug!(attachment, error, "request rejected");
        }
        let (response, leaves_unread) = rejection.response();
        if leaves_unread {
            record.leave_request_unread();
        }
        record.responded(response.status());
        response.map(|text| ResponseBody::from_text(text, record))
    }
}

fn is_forbidden(response: &UpstreamResponse) -> bool {
    response.head.status == StatusCode::FORBIDDEN
}

async fn read_body(body: Incoming, config: &ProxyConfig) -> Result<Bytes, Rejection> {
    if body.is_end_stream() {
        return Ok(Bytes::new());
    }
    let limit = config.request_body_limit;
    // Refused by its announced length before it is read: a guest that waits for 100 Continue need
    // not send it.
    if body.size_hint().lower() > limit as u64 {
        return Err(Rejection::BodyTooLarge { limit });
    }
    let whole = Limited::new(body, limit).collect();
    match tokio::time::timeout(config.request_body_timeout, whole).await {
        Ok(Ok(whole)) => Ok(whole.to_bytes()),
        Ok(Err(source)) if source.is::<LengthLimitError>() => Err(Rejection::BodyTooLarge { limit }),
        Ok(Err(source)) => Err(Rejection::BodyBroken { source }),
        Err(_) => Err(Rejection::BodyTimeout { limit: config.request_body_timeout }),
    }
}
