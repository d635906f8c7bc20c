//! The internals of the server: its listener, its connections and its responses on the wire.

use std::error::Error;
use std::future;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsFd as _;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http_body_util::BodyExt as _;
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use socket2::{Domain, Socket, Type};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::{Answer, Command, Mode, Recorded, Shared};

/// More than any burst of a test.
const BACKLOG: i32 = 4096;

pub(super) fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// Accepts and serves connections until the command channel closes.
pub(super) async fn serve(
    listener: TcpListener,
    address: SocketAddr,
    shared: &Arc<Shared>,
    mut commands: mpsc::UnboundedReceiver<Command>,
) {
    let adopt = |listener: io::Result<TcpListener>| {
        listener
            .and_then(tokio::net::TcpListener::from_std)
            .unwrap_or_else(|e| panic!("listen on {address}: {e}"))
    };
    let mut listener = Some(adopt(Ok(listener)));
    let mut connections = JoinSet::new();
    let mut number = 0;
    loop {
        tokio::select! {
            biased;
            command = commands.recv() => {
                // The sender may no longer wait for `done`.
                match command {
                    Some(Command::Open(done)) => {
                        if listener.is_none() {
                            listener = Some(adopt(listen(address)));
                        }
                        done.send(()).ok();
                    }
                    Some(Command::Close(done)) => {
                        listener = None;
                        connections.shutdown().await;
                        done.send(()).ok();
                    }
                    None => return,
                }
            }
            Some(_) = connections.join_next() => {}
            accepted = accept(listener.as_ref()) => {
                // A peer may have closed before it is accepted.
                if let Ok((stream, peer)) = accepted {
                    connections.spawn(connection(stream, peer, number, Arc::clone(shared)));
                    number += 1;
                }
            }
        }
    }
}

async fn accept(listener: Option<&tokio::net::TcpListener>) -> io::Result<(TcpStream, SocketAddr)> {
    match listener {
        Some(listener) => listener.accept().await,
        None => future::pending().await,
    }
}

async fn connection(stream: TcpStream, peer: SocketAddr, number: u64, shared: Arc<Shared>) {
    // A second handle of the socket, because hyper owns the first one.
    let socket = stream.as_fd().try_clone_to_owned().map(Socket::from);
    let socket = socket.unwrap_or_else(|e| panic!("duplicate the socket of {peer}: {e}"));
    if let Err(e) = socket.set_tcp_nodelay(true) {
        panic!("set TCP_NODELAY for {peer}: {e}");
    }
    let service = service_fn(|request| answer(request, number, peer, &socket, &shared));
    // The client judges how a connection ended.
    drop(http1::Builder::new().serve_connection(TokioIo::new(stream), service).await);
}

async fn answer(
    request: Request<Incoming>,
    connection: u64,
    peer: SocketAddr,
    socket: &Socket,
    shared: &Shared,
) -> Result<Response<AnswerBody>, Box<dyn Error + Send + Sync>> {
    if let Mode::Static(bytes) = &*shared.mode.borrow() {
        return Ok(Response::new(AnswerBody::whole(bytes.clone())));
    }
    let request = record(request, connection, peer).await?;
    shared.record(request.clone());
    let mut modes = shared.mode.subscribe();
    let mode = modes.wait_for(|mode| !mode.holds(&request)).await;
    let mode = mode.map_or(Mode::Refuse, |mode| mode.clone());
    match mode {
        Mode::Serve | Mode::HoldPath(_) => respond((shared.respond)(&request), AnswerBody::whole),
        Mode::Paced(pace) => {
            pace.work().await;
            respond((shared.respond)(&request), AnswerBody::whole)
        }
        Mode::Fixed(answer) => respond(answer, AnswerBody::whole),
        Mode::Static(bytes) => Ok(Response::new(AnswerBody::whole(bytes))),
        Mode::ResetMidBody => {
            if let Err(e) = socket.set_linger(Some(Duration::ZERO)) {
                panic!("reset the connection of {peer}: {e}");
            }
            respond((shared.respond)(&request), AnswerBody::torn)
        }
        // The connection is about to be shut down with all others.
        Mode::Refuse | Mode::Hold => future::pending().await,
    }
}

async fn record(request: Request<Incoming>, connection: u64, peer: SocketAddr) -> hyper::Result<Recorded> {
    let (head, body) = request.into_parts();
    let body = body.collect().await?.to_bytes();
    let headers = head
        .headers
        .iter()
        .map(|(name, value)| (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned()));
    Ok(Recorded {
        connection,
        peer,
        method: head.method.to_string(),
        path: head.uri.to_string(),
        headers: headers.collect(),
        body,
    })
}

/// Builds a response. After an error, the connection is closed without one.
fn respond(
    answer: Answer,
    body: impl FnOnce(Bytes) -> AnswerBody,
) -> Result<Response<AnswerBody>, Box<dyn Error + Send + Sync>> {
    let Answer { status, headers, body: bytes } = answer;
    if status == Answer::NONE {
        return Err("the application has failed".into());
    }
    let status = StatusCode::from_u16(status).unwrap_or_else(|e| panic!("status {status}: {e}"));
    let mut response = Response::builder().status(status);
    for (name, value) in headers {
        response = response.header(name, value);
    }
    Ok(response.body(body(bytes)).unwrap_or_else(|e| panic!("the response is not HTTP: {e}")))
}

/// A body that is sent completely or breaks off halfway.
struct AnswerBody {
    length: u64,
    next: Option<Bytes>,
    end: End,
}

enum End {
    Clean,
    /// Flushes what was sent, then breaks off.
    BreakSoon,
    Break,
}

impl AnswerBody {
    fn whole(bytes: Bytes) -> Self {
        Self {
            length: bytes.len() as u64,
            next: Some(bytes).filter(|bytes| !bytes.is_empty()),
            end: End::Clean,
        }
    }

    fn torn(mut bytes: Bytes) -> Self {
        let length = bytes.len() as u64;
        bytes.truncate(bytes.len() / 2);
        Self { length, next: Some(bytes), end: End::BreakSoon }
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        if let Some(bytes) = self.next.take() {
            return Poll::Ready(Some(Ok(Frame::data(bytes))));
        }
        match self.end {
            End::Clean => Poll::Ready(None),
            End::BreakSoon => {
                // hyper flushes its buffer while a body is pending.
                self.end = End::Break;
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            End::Break => Poll::Ready(Some(Err(io::ErrorKind::ConnectionReset.into()))),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.next.is_none() && matches!(self.end, End::Clean)
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.length)
    }
}
