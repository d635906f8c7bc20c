//! Answers one request: who asks, what for, what Nova says.

use std::convert::Infallible;
use std::error::Error;
use std::sync::Arc;

use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Body, Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use hyper::http::uri::PathAndQuery;
use hyper::{Method, Request, Response, StatusCode, Uri, Version};

use super::ProxyConfig;
use super::exchange::Exchange;
use super::fault::Fault;
use super::headers::{Told, address, end_hop};
use super::peer::{Asker, Peer};
use super::pulse::Pulse;
use super::rate::PortRate;
use super::relay::Answer;
use super::requester::{Credentials, Signed};
use super::shared::Proxy;
use super::target::{TargetFault, path_to_ask};
use super::upstream::{Question, Reply};

/// One connection and who is at its other end.
#[derive(Debug)]
pub(super) struct Session<D, P> {
    pub(super) proxy: Arc<Proxy<D>>,
    pub(super) peer: P,
    pub(super) pulse: Arc<Pulse>,
    pub(super) rate: Option<Arc<PortRate>>,
}

impl<D: Send + Sync, P: Peer<D>> Session<D, P> {
    pub(super) async fn answer(
        self: Arc<Self>,
        request: Request<Incoming>,
    ) -> Result<Response<Answer>, Infallible> {
        let path = request.uri().path_and_query();
        let metrics = &self.proxy.metrics;
        let attachment = self.peer.attachment();
        let mut exchange = Exchange::begin(metrics, &self.pulse, attachment, request.method(), path);
        match self.relay(request, &mut exchange).await {
            Ok(reply) => {
                let mut head = reply.head;
                head.version = Version::HTTP_11;
                end_hop(&mut head.headers);
                exchange.answered(head.status);
                let stall = self.proxy.upstream.stall_timeout;
                Ok(Response::from_parts(head, Answer::relay(reply.body, reply.lease, stall, exchange)))
            }
            Err(fault) => Ok(self.refuse(&fault, exchange)),
        }
    }

    async fn relay(&self, request: Request<Incoming>, exchange: &mut Exchange) -> Result<Reply, Fault> {
        let (head, body) = request.into_parts();
        if self.pulse.takes_fragment() {
            return Err(TargetFault::Fragment.into());
        }
        let path = path_to_ask(&head.method, &head.uri, &head.headers)?;
        self.rate.as_ref().map_or(Ok(()), |rate| rate.admit(&head.method, &path))?;
        let Asker { requester, origin } = self.peer.identify(&self.proxy, &head.headers).await?;
        exchange.identified(requester.instance());
        let body = read_body(body, &self.proxy.config).await?;
        let content_type = if body.is_empty() { None } else { head.headers.get(CONTENT_TYPE).cloned() };
        let relayed = Relayed {
            method: head.method,
            path,
            body,
            content_type,
            forwarded_for: requester.forwarded_for(&origin),
            spare: head.headers,
        };
        match requester.credentials() {
            Credentials::Signed(signed) => self.ask_nova(relayed, signed).await,
            Credentials::ByNetwork(network) => {
                let mut question = Addressed { relayed, told: Told::Network(network) };
                Ok(self.proxy.upstream.ask(&mut question).await?)
            }
        }
    }

    /// Asks with the signature that Nova took last, and where it refuses, with each of the others.
    async fn ask_nova(&self, relayed: Relayed, signed: &Signed) -> Result<Reply, Fault> {
        let signatures = signed.signatures();
        let (first, signature) = signatures.first();
        let mut question = Addressed { relayed, told: Told::Instance(signed, signature) };
        let mut reply = self.proxy.upstream.ask(&mut question).await?;
        for (number, signature) in signatures.others(first) {
            if !is_refused(&reply) {
                return Ok(reply);
            }
            // A POST may be repeated here as well: Nova checks the signature before it does anything.
            question.told = Told::Instance(signed, signature);
            reply = self.proxy.upstream.ask(&mut question).await?;
            if !is_refused(&reply) && !reply.head.status.is_server_error() {
                signatures.taken(number);
                tracing::debug!(number, "Nova takes another one of the shared secrets");
            }
        }
        if is_refused(&reply) {
            signed.all_refused();
            if self.proxy.forbidden.may_speak() {
                tracing::warn!(
                    "Nova answers 403: metadata_proxy_shared_secret (shared_secret_files) here and in Nova's \
                     [neutron] differ"
                );
            }
        }
        Ok(reply)
    }

    fn refuse(&self, fault: &Fault, mut exchange: Exchange) -> Response<Answer> {
        fault.count(&self.proxy.metrics);
        let attachment = self.peer.attachment().map(tracing::field::display);
        let error = fault as &dyn Error;
        if matches!(fault, Fault::Upstream(_)) && self.proxy.upstream_failed.may_speak() {
            tracing::warn!(attachment, error, "the metadata API did not answer");
        } else {
            tracing::debug!(attachment, error, "request refused");
        }
        let (response, leaves_unread) = fault.response();
        if leaves_unread {
            exchange.leave_request_unread();
        }
        exchange.answered(response.status());
        response.map(|text| Answer::sentence(text, exchange))
    }
}

/// Whether Nova did not take the signature.
fn is_refused(reply: &Reply) -> bool {
    reply.head.status == StatusCode::FORBIDDEN
}

/// Reads the whole body before Nova is asked, so that a slow guest does not hold a connection to Nova.
async fn read_body(body: Incoming, config: &ProxyConfig) -> Result<Bytes, Fault> {
    if body.is_end_stream() {
        return Ok(Bytes::new());
    }
    let limit = config.request_body_limit;
    // Refused by its announced length before it is read: a guest that waits for 100 Continue need not send it.
    if body.size_hint().lower() > limit as u64 {
        return Err(Fault::BodyTooLarge { limit });
    }
    let whole = Limited::new(body, limit).collect();
    match tokio::time::timeout(config.request_body_timeout, whole).await {
        Ok(Ok(whole)) => Ok(whole.to_bytes()),
        Ok(Err(source)) if source.is::<LengthLimitError>() => Err(Fault::BodyTooLarge { limit }),
        Ok(Err(source)) => Err(Fault::BodyBroken { source }),
        Err(_) => Err(Fault::BodyTimeout { limit: config.request_body_timeout }),
    }
}

/// What of a guest's request is passed on.
struct Relayed {
    method: Method,
    path: PathAndQuery,
    body: Bytes,
    content_type: Option<HeaderValue>,
    forwarded_for: HeaderValue,
    /// The guest's own header map, for its memory.
    spare: HeaderMap,
}

/// A guest's request as the metadata API gets it.
struct Addressed<'a> {
    relayed: Relayed,
    told: Told<'a>,
}

impl Question for Addressed<'_> {
    fn repeatable(&self) -> bool {
        self.relayed.method.is_idempotent()
    }

    fn ask(&mut self, host: &HeaderValue) -> Request<Full<Bytes>> {
        let Relayed { method, path, body, content_type, forwarded_for, spare } = &mut self.relayed;
        let mut headers = std::mem::take(spare);
        address(&mut headers, host, self.told, forwarded_for.clone(), content_type.as_ref());
        let mut request = Request::new(Full::new(body.clone()));
        *request.method_mut() = method.clone();
        *request.uri_mut() = Uri::from(path.clone());
        *request.headers_mut() = headers;
        request
    }
}
