//! The agent's own face, as HTTP on a unix socket: `/live`, `/ready`, `/metrics` and `/state`. For operators, probes
//! and Prometheus; guests never reach it.
//!
//! In: an [`AdminState`] to read from. The server owns nothing but the socket's file, and takes that away when it
//! ends. One client cannot hold up the others: connections are few, short, and serve one request each.

pub mod client;
pub mod logging;
pub mod state;

use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::net::socket_file::{SocketFile, SocketFileError};

/// Root and its group may ask.
const SOCKET_MODE: u32 = 0o660;
/// Connections served at once; more wait to be accepted.
const MAX_CONNECTIONS: usize = 16;
/// What a client may take its time for.
const PATIENCE: Patience = Patience { head: Duration::from_secs(5), connection: Duration::from_secs(10) };
/// Bytes of a request's headers.
const MAX_HEAD: usize = 16 * 1024;
/// Pause after a failed `accept`, which fails again at once while the process has no descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

const OPENMETRICS: HeaderValue =
    HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
const JSON: HeaderValue = HeaderValue::from_static("application/json");
const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");

#[derive(Clone, Copy)]
struct Patience {
    /// The request's headers.
    head: Duration,
    /// The connection from its beginning to its end.
    connection: Duration,
}

/// What the admin socket tells about. Read on each request.
pub trait AdminState: Send + Sync {
    /// Whether the agent does its work, however slowly: false asks for a restart.
    fn live(&self) -> bool;

    /// What start-up still waits for; nothing once guests are served.
    fn waiting_for(&self) -> Vec<String>;

    /// All metrics as OpenMetrics text 1.0, which `prometheus_client::encoding::text` writes.
    fn metrics(&self) -> String;

    /// What the agent knows, for people and for bug reports. Holds no secret.
    fn state(&self) -> serde_json::Value;
}

/// The bound admin socket.
#[derive(Debug)]
pub struct AdminSocket {
    file: SocketFile,
}

/// Binds the socket and serves it until cancelled.
///
/// # Errors
/// Those of [`AdminSocket::bind`] and [`AdminSocket::serve`].
pub async fn serve(
    path: &Path,
    state: Arc<dyn AdminState>,
    cancel: CancellationToken,
) -> Result<(), SocketFileError> {
    AdminSocket::bind(path)?.serve(state, cancel).await
}

impl AdminSocket {
    /// Binds it. Clients can connect from here on, and wait to be served.
    ///
    /// # Errors
    /// Those of [`SocketFile::bind`].
    pub fn bind(path: &Path) -> Result<Self, SocketFileError> {
        Ok(Self { file: SocketFile::bind(path, SOCKET_MODE)? })
    }

    /// Serves until cancelled, then closes what is open and removes the socket.
    ///
    /// # Errors
    /// The runtime does not take the socket.
    pub async fn serve(
        self,
        state: Arc<dyn AdminState>,
        cancel: CancellationToken,
    ) -> Result<(), SocketFileError> {
        self.serve_with(PATIENCE, state, cancel).await
    }

    async fn serve_with(
        mut self,
        patience: Patience,
        state: Arc<dyn AdminState>,
        cancel: CancellationToken,
    ) -> Result<(), SocketFileError> {
        let listener = self.file.listener()?;
        let tasks = TaskTracker::new();
        let accepting = accept(listener, patience, state, &tasks, &cancel);
        cancel.run_until_cancelled(accepting).await;
        tasks.close();
        tasks.wait().await;
        Ok(())
    }
}

async fn accept(
    listener: UnixListener,
    patience: Patience,
    state: Arc<dyn AdminState>,
    tasks: &TaskTracker,
    cancel: &CancellationToken,
) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else {
            unreachable!("nobody closes this semaphore");
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let (state, cancel) = (Arc::clone(&state), cancel.clone());
                tasks.spawn(async move {
                    let conversation = converse(stream, patience.head, state);
                    let connection = tokio::time::timeout(patience.connection, conversation);
                    if let Some(Err(_)) = cancel.run_until_cancelled(connection).await {
                        tracing::debug!("an admin connection took too long and was closed");
                    }
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept an admin connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn converse(stream: UnixStream, head: Duration, state: Arc<dyn AdminState>) {
    let service = service_fn(move |request: Request<Incoming>| {
        let answer = answer(request.method(), request.uri().path(), state.as_ref());
        async move { Ok::<_, Infallible>(answer) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(head)
        .max_buf_size(MAX_HEAD)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = connection.await {
        tracing::debug!(%error, "an admin connection broke");
    }
}

fn answer(method: &Method, path: &str, state: &dyn AdminState) -> Response<Full<Bytes>> {
    let route: fn(&dyn AdminState) -> (StatusCode, HeaderValue, String) = match path {
        "/live" => live,
        "/ready" => ready,
        "/metrics" => |state| (StatusCode::OK, OPENMETRICS, state.metrics()),
        "/state" => |state| (StatusCode::OK, JSON, format!("{:#}\n", state.state())),
        _ => return response(StatusCode::NOT_FOUND, TEXT, "/live, /ready, /metrics, /state\n".to_owned()),
    };
    if !matches!(*method, Method::GET | Method::HEAD) {
        let mut refusal = response(StatusCode::METHOD_NOT_ALLOWED, TEXT, String::new());
        refusal.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return refusal;
    }
    let (status, kind, body) = route(state);
    response(status, kind, body)
}

fn live(state: &dyn AdminState) -> (StatusCode, HeaderValue, String) {
    if state.live() {
        (StatusCode::OK, TEXT, "live\n".to_owned())
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, TEXT, "not live\n".to_owned())
    }
}

/// What is waited for, one item a line.
fn ready(state: &dyn AdminState) -> (StatusCode, HeaderValue, String) {
    let waiting = state.waiting_for();
    if waiting.is_empty() {
        return (StatusCode::OK, TEXT, "ready\n".to_owned());
    }
    let list = waiting.iter().flat_map(|item| [item.as_str(), "\n"]).collect();
    (StatusCode::SERVICE_UNAVAILABLE, TEXT, list)
}

fn response(status: StatusCode, kind: HeaderValue, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

#[cfg(test)]
mod tests;
