//! Serves one guest connection to its end: drives hyper, keeps the deadlines, and says the last word.
//!
//! An answer must arrive. Closing a socket with unread bytes in it makes the kernel send a reset, which may overtake the
//! answer; so after an answer to half a request the rest is read and thrown away for a moment. And an answer cut short
//! must not look whole: that one ends with a reset.

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1::Parts;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use metadata_ebpf::identity::ClientAddress;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::caller::ClientLookup;
use super::fault::HEAD_TIMEOUT_ANSWER;
use super::identify::Directory;
use super::peer::{Guest, Haproxy, Peer};
use super::pulse::{Allowance, Expiry, Pulse, Watched};
use super::service::Session;
use super::shared::Proxy;

/// For how long and how much is read after an answer to half a request.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 256 * 1024;

/// A stream to a guest.
pub trait GuestStream: AsyncRead + AsyncWrite + Unpin + Send + 'static {
    /// Closes such that the peer sees that something was lost.
    fn reset(self);
}

impl GuestStream for TcpStream {
    fn reset(self) {
        // Fails only on a socket that is gone already.
        let _ = self.set_zero_linger();
    }
}

impl GuestStream for UnixStream {
    fn reset(self) {
        // A unix socket knows no reset. haproxy sees by the length or the last chunk that something is missing.
    }
}

/// How a connection ended.
enum End {
    Served(hyper::Result<()>),
    Expired(Expiry),
    Drained,
}

impl<D: Directory> Proxy<D> {
    /// Serves one connection of `client` until it ends, or until `cancel` and the requests in flight after it.
    pub async fn serve_connection<T: GuestStream>(
        self: Arc<Self>,
        stream: T,
        client: ClientAddress,
        cancel: CancellationToken,
    ) {
        self.converse(stream, Guest::new(client), cancel).await;
    }
}

impl<C: ClientLookup> Proxy<C> {
    /// Serves one connection of a haproxy in the same way.
    pub(super) async fn serve_haproxy(self: Arc<Self>, stream: UnixStream, cancel: CancellationToken) {
        self.converse(stream, Haproxy, cancel).await;
    }
}

impl<D: Send + Sync + 'static> Proxy<D> {
    async fn converse<T: GuestStream>(
        self: Arc<Self>,
        stream: T,
        peer: impl Peer<D>,
        cancel: CancellationToken,
    ) {
        let attachment = peer.attachment();
        let pulse = Arc::new(Pulse::new());
        let rate = self.rates.as_ref().zip(peer.client()).and_then(|(rates, client)| rates.of(&client));
        let session = Arc::new(Session { proxy: Arc::clone(&self), peer, pulse: Arc::clone(&pulse), rate });
        let service = service_fn(move |request| Arc::clone(&session).answer(request));
        let watched = TokioIo::new(Watched::new(stream, Arc::clone(&pulse)));
        let mut connection = self.protocol.serve_connection(watched, service);
        let allowance = Allowance {
            idle: self.config.keep_alive_timeout,
            head: self.config.request_head_timeout,
            blocked: self.config.write_timeout,
        };

        let end = {
            let mut driven = Pin::new(&mut connection);
            // Never later than any deadline: a deadline that begins after the alarm was set is not nearer than
            // `shortest`, so most requests come and go without the alarm being touched.
            let mut alarm = pin!(sleep_until(Instant::now() + allowance.shortest()));
            let mut drained_by = None;
            loop {
                tokio::select! {
                    biased;
                    served = driven.as_mut() => break End::Served(served),
                    () = cancel.cancelled(), if drained_by.is_none() => {
                        driven.as_mut().graceful_shutdown();
                        let by = Instant::now() + self.config.drain_timeout;
                        drained_by = Some(by);
                        let at = alarm.deadline().min(by);
                        alarm.as_mut().reset(at);
                    }
                    () = &mut alarm => {
                        let now = Instant::now();
                        if drained_by.is_some_and(|by| now >= by) {
                            break End::Drained;
                        }
                        let next = match pulse.deadline(&allowance) {
                            Some((at, expiry)) if now >= at => break End::Expired(expiry),
                            Some((at, _)) => at,
                            None => now + allowance.shortest(),
                        };
                        let next = next.min(now + allowance.shortest());
                        alarm.as_mut().reset(drained_by.map_or(next, |by| next.min(by)));
                    }
                }
            }
        };

        let Parts { io, read_buf, .. } = connection.into_parts();
        let stream = io.into_inner().stream;
        match end {
            End::Served(Ok(())) if pulse.left_unread() => linger(stream).await,
            End::Served(Ok(())) => {}
            End::Served(Err(error)) if error.is_user() => stream.reset(),
            End::Served(Err(error)) if error.is_parse() => {
                self.metrics.rejected_request(if error.is_parse_too_large() {
                    "head_too_large"
                } else {
                    "malformed"
                });
                linger(stream).await;
            }
            End::Served(Err(error)) => {
                let error = &error as &dyn std::error::Error;
                let attachment = attachment.map(tracing::field::display);
                tracing::debug!(attachment, error, "connection ended");
            }
            End::Expired(Expiry::Idle) if read_buf.is_empty() => {}
            // A pipelined head that arrived in part together with the request before it waits as well.
            End::Expired(Expiry::Idle | Expiry::Head) => {
                self.metrics.rejected_request("head_timeout");
                refuse_slow_head(stream).await;
            }
            End::Expired(Expiry::Blocked) => {
                self.metrics.rejected_connection("write_timeout");
                stream.reset();
            }
            End::Drained => {
                self.metrics.rejected_connection("drain_timeout");
                stream.reset();
            }
        }
    }
}

async fn refuse_slow_head<T: GuestStream>(mut stream: T) {
    if let Ok(Ok(())) = timeout(LINGER, stream.write_all(HEAD_TIMEOUT_ANSWER)).await {
        linger(stream).await;
    }
}

/// Lets the guest read its answer before the connection is closed: RFC 9112, section 9.6.
async fn linger<T: GuestStream>(mut stream: T) {
    let until_closed = async {
        // Fails if hyper has done so already, or the guest is gone: either is well.
        let _ = stream.shutdown().await;
        let mut waste = [0; 4096];
        let mut budget = LINGER_BYTES;
        while let Ok(read @ 1..) = stream.read(&mut waste).await {
            budget = budget.saturating_sub(read);
            if budget == 0 {
                break;
            }
        }
    };
    // Whoever takes longer has had the time to read.
    let _ = timeout(LINGER, until_closed).await;
}
