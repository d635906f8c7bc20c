//! Serves one connection to its end: drives hyper, enforces the time-outs, and closes properly.
//!
//! A response must arrive. If a socket is closed with unread bytes in it, the kernel sends a reset,
//! which may overtake the response. So after a response to an incomplete request, the rest is read
//! and discarded. A truncated response must not look complete, so it ends with a reset.
//!
//! A socket that is closed before the guest has received everything keeps its buffers in the kernel
//! for minutes. A guest could pile up any number of them. So a connection counts as open until the
//! guest has received everything, for no longer than a guest may stop reading, and then it is
//! reset.

use std::convert::Infallible;
use std::error::Error;
use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1::{Connection, Parts};
use hyper::service::{Service, service_fn};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use metadata_ebpf::identity::ClientAddress;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::activity::{ActivityStream, ConnectionActivity, TimeoutKind, Timeouts};
use super::admission::Ticket;
use super::own_request;
use crate::proxy::Proxy;
use crate::proxy::client::ClientSource;
use crate::proxy::large_buffers::{LARGE_IDLE, SendBuffer};
use crate::proxy::metrics::RejectionLabel;
use crate::proxy::request::{HEAD_TIMEOUT_RESPONSE, MALFORMED_RESPONSE, RequestHandler, ResponseBody};

/// Bytes that are read and discarded at the end of a connection.
const LINGER_BYTES: usize = 256 * 1024;

/// Time to write a response that no request waits for, and for the peer to receive the last
/// response after the signal to stop.
const LINGER: Duration = Duration::from_secs(1);

/// Time for the first head of a haproxy connection. haproxy connects once it has the whole head.
const HAPROXY_HEAD_TIMEOUT: Duration = Duration::from_secs(2);

/// Pauses between two looks at the end of a connection.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// A stream to a guest or a haproxy.
pub trait ClientStream: AsyncRead + AsyncWrite + SendBuffer + Unpin + Send + 'static {
    /// Closes in a way that shows the peer that data was lost.
    fn reset(self);

    /// Returns whether the peer has received all data but a few KiB. The stream must be open, and
    /// nothing may be written afterwards.
    fn is_drained(&self) -> bool;

    /// Returns whether both sides have closed and the peer has received everything.
    fn is_finished(&self) -> bool;
}

impl ClientStream for TcpStream {
    fn reset(self) {
        // Fails only if the socket is already closed.
        let _ = self.set_zero_linger();
    }

    fn is_drained(&self) -> bool {
        // The kernel rounds the size up to its minimum, 4.5 KiB.
        SockRef::from(self).set_send_buffer_size(1).is_ok() && self.has_room()
    }

    fn is_finished(&self) -> bool {
        // A connection in state CLOSE has no peer. TCP enters this state when the peer has closed
        // and has acknowledged our FIN, which comes after all data.
        self.peer_addr().is_err()
    }
}

impl ClientStream for UnixStream {
    fn reset(self) {
        // A unix socket has no reset. haproxy sees by the length or the last chunk that data is
        // missing.
    }

    fn is_drained(&self) -> bool {
        // What was sent is in the peer's buffer.
        true
    }

    fn is_finished(&self) -> bool {
        true
    }
}

/// The way in which a connection ended.
enum ConnectionEnd {
    Served(hyper::Result<()>),
    TimedOut(TimeoutKind),
    Drained,
}

impl Proxy {
    /// Serves one connection of `client` until it ends. After `cancel`, only the request in flight
    /// is finished. Closes it at once if the client has too many. Answers the agent itself.
    pub async fn serve_connection<T: ClientStream>(
        self: Arc<Self>,
        stream: T,
        client: ClientAddress,
        cancel: CancellationToken,
    ) {
        let Some(guest) = self.clients.limited(&client) else {
            return own_request::answer(stream, &client).await;
        };
        if let Ok(ticket) = self.admission.admit(guest) {
            self.serve(stream, ClientSource::guest(client, guest), ticket, cancel).await;
        }
    }

    /// Serves one connection of a guest or a haproxy. It counts for the ticket until it is closed.
    pub(super) async fn serve<T: ClientStream>(
        self: Arc<Self>,
        stream: T,
        source: ClientSource,
        ticket: Ticket,
        cancel: CancellationToken,
    ) {
        let activity = Arc::new(ConnectionActivity::new());
        let places = self.large_buffers.of_guest(source.guest_connection().map(|guest| guest.limited().key));
        let handler = RequestHandler::new(Arc::clone(&self), source, Arc::clone(&activity), ticket);
        let handler = Arc::new(handler);
        let requests = Arc::clone(&handler);
        let service = service_fn(move |request| Arc::clone(&requests).handle(request));
        let stream = TokioIo::new(ActivityStream::new(stream, Arc::clone(&activity), places));
        let mut connection = self.http.serve_connection(stream, service);

        let end = self.drive(Pin::new(&mut connection), &handler, &activity, &cancel).await;
        let Parts { io, read_buf, .. } = connection.into_parts();
        let stream = io.into_inner().stream;
        self.finish(stream, end, &handler, &activity, &read_buf, &cancel).await;
        drop(handler);
    }

    /// Runs a connection until it ends, a time-out passes, or the drain time after `cancel` is
    /// over.
    async fn drive<T, S>(
        &self,
        mut connection: Pin<&mut Connection<TokioIo<ActivityStream<T>>, S>>,
        handler: &RequestHandler,
        activity: &ConnectionActivity,
        cancel: &CancellationToken,
    ) -> ConnectionEnd
    where
        T: ClientStream,
        S: Service<Request<Incoming>, Response = Response<ResponseBody>, Error = Infallible>,
    {
        let mut timeouts = self.timeouts(handler);
        // The alarm is never later than any deadline: a deadline that begins after the alarm was
        // set is at least a `pause` away. So most requests come and go without touching the alarm.
        let mut alarm = pin!(sleep_until(Instant::now() + timeouts.shortest()));
        let mut drain_deadline = None;
        loop {
            tokio::select! {
                biased;
                served = connection.as_mut() => return ConnectionEnd::Served(served),
                // Larger buffers have a shorter time-out.
                () = poll_fn(|_| if activity.has_taken_place() { Poll::Ready(()) } else { Poll::Pending }) => {
                    let at = alarm.deadline().min(Instant::now() + LARGE_IDLE);
                    alarm.as_mut().reset(at);
                }
                () = cancel.cancelled(), if drain_deadline.is_none() => {
                    connection.as_mut().graceful_shutdown();
                    let deadline = Instant::now() + self.config.drain_timeout;
                    drain_deadline = Some(deadline);
                    let at = alarm.deadline().min(deadline);
                    alarm.as_mut().reset(at);
                }
                () = &mut alarm => {
                    let now = Instant::now();
                    if drain_deadline.is_some_and(|deadline| now >= deadline) {
                        return ConnectionEnd::Drained;
                    }
                    timeouts = self.timeouts(handler);
                    let next = match activity.deadline(&timeouts) {
                        Some((at, _)) if now >= at && handler.awaits_haproxy_head() => {
                            return ConnectionEnd::TimedOut(TimeoutKind::Head);
                        }
                        Some((at, kind)) if now >= at => return ConnectionEnd::TimedOut(kind),
                        Some((at, _)) => at,
                        None => now + timeouts.shortest(),
                    };
                    let next = next.min(now + activity.pause(&timeouts));
                    alarm.as_mut().reset(drain_deadline.map_or(next, |deadline| next.min(deadline)));
                }
            }
        }
    }

    fn timeouts(&self, handler: &RequestHandler) -> Timeouts {
        let (idle, head) = (self.config.keep_alive_timeout, self.config.request_head_timeout);
        let blocked = self.config.write_timeout;
        if handler.awaits_haproxy_head() {
            let limit = HAPROXY_HEAD_TIMEOUT;
            Timeouts { idle: idle.min(limit), head: head.min(limit), blocked }
        } else {
            Timeouts { idle, head, blocked }
        }
    }

    /// Closes a connection as its end requires. `read_buf` holds bytes of a request that was not
    /// begun.
    async fn finish<T: ClientStream>(
        &self,
        mut stream: T,
        end: ConnectionEnd,
        handler: &RequestHandler,
        activity: &ConnectionActivity,
        read_buf: &Bytes,
        cancel: &CancellationToken,
    ) {
        let attachment = handler.attachment();
        let may_linger = handler.may_linger();
        match end {
            ConnectionEnd::Served(Ok(())) if activity.is_request_unread() => {}
            ConnectionEnd::Served(Ok(())) if stream.is_drained() => return,
            ConnectionEnd::Served(Ok(())) => {}
            // A truncated response.
            ConnectionEnd::Served(Err(error)) if error.is_user() => return stream.reset(),
            // hyper leaves the preface of HTTP/2 to its caller.
            ConnectionEnd::Served(Err(error)) if error.is_parse_version_h2() => {
                self.metrics.rejected_request(RejectionLabel::Malformed);
                if write_response(&mut stream, MALFORMED_RESPONSE).await.is_err() {
                    return stream.reset();
                }
            }
            // hyper has answered any other malformed request.
            ConnectionEnd::Served(Err(error)) if error.is_parse() => {
                self.metrics.rejected_request(if error.is_parse_too_large() {
                    RejectionLabel::HeadTooLarge
                } else {
                    RejectionLabel::Malformed
                });
            }
            ConnectionEnd::Served(Err(error)) => {
                let error = &error as &dyn Error;
                let attachment = attachment.map(tracing::field::display);
                tracing::debug!(attachment, error, "client connection ended");
                if stream.is_drained() {
                    return;
                }
            }
            ConnectionEnd::TimedOut(TimeoutKind::Idle) if read_buf.is_empty() => {
                if stream.is_drained() {
                    return;
                }
            }
            // A pipelined head that partly arrived with the previous request counts as a slow head.
            ConnectionEnd::TimedOut(TimeoutKind::Idle | TimeoutKind::Head) => {
                self.metrics.rejected_request(RejectionLabel::HeadTimeout);
                if write_response(&mut stream, HEAD_TIMEOUT_RESPONSE).await.is_err() {
                    return stream.reset();
                }
            }
            ConnectionEnd::TimedOut(TimeoutKind::Blocked) => {
                self.metrics.rejected_connection(RejectionLabel::WriteTimeout);
                return stream.reset();
            }
            ConnectionEnd::Drained => {
                self.metrics.rejected_connection(RejectionLabel::DrainTimeout);
                return stream.reset();
            }
        }
        if !may_linger {
            return;
        }
        // haproxy may keep a connection open until its client has sent the whole request.
        let patience = if attachment.is_some() { self.config.write_timeout } else { LINGER };
        let patience = async {
            tokio::select! {
                () = sleep(patience) => {}
                () = cancel.cancelled() => sleep(LINGER).await,
            }
        };
        deliver(stream, patience).await;
    }
}

/// Writes a response that no request waits for.
async fn write_response<T: ClientStream>(stream: &mut T, response: &[u8]) -> io::Result<()> {
    timeout(LINGER, stream.write_all(response)).await?
}

/// Closes the sending side, and waits until the peer has received everything and has closed
/// (RFC 9112, section 9.6). Resets the connection if that takes longer than `patience`.
async fn deliver<T: ClientStream>(mut stream: T, patience: impl Future<Output = ()>) {
    let delivered = tokio::select! {
        biased;
        delivered = wait_until_delivered(&mut stream) => delivered,
        () = patience => false,
    };
    if !delivered {
        stream.reset();
    }
}

/// Returns false if the peer sends too much meanwhile.
async fn wait_until_delivered<T: ClientStream>(stream: &mut T) -> bool {
    // Fails harmlessly if the peer has left.
    let _ = stream.shutdown().await;
    let mut discarded = [0; 4096];
    let mut budget = LINGER_BYTES;
    while let Ok(read @ 1..) = stream.read(&mut discarded).await {
        budget = budget.saturating_sub(read);
        if budget == 0 {
            return false;
        }
    }
    // The peer has closed its side. No event follows when it has received the rest.
    let mut pause = FIRST_PAUSE;
    while !stream.is_finished() {
        sleep(pause).await;
        pause = LONGEST_PAUSE.min(pause * 2);
    }
    true
}
