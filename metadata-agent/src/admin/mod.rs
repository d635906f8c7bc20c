//! The admin socket: HTTP on a unix socket with `/live`, `/ready`, `/metrics` and `/state`. It is
//! for operators, probes and Prometheus. Guests cannot reach it.
//!
//! The server reads from an [`AdminState`] and owns only the file of the socket, which it removes
//! at its end. A client cannot delay others: the number of connections is limited, each is short
//! and serves one request.

pub(crate) mod client;
pub(crate) mod logging;
pub(crate) mod readiness;
pub(crate) mod state;
pub(crate) mod state_log;

use std::convert::Infallible;
use std::io;
use std::path::Path;
use std::pin::Pin;
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

use crate::net::damage::{DamageReports, Part};
use crate::net::socket_file::{SocketFile, SocketFileError};

/// Access for the owner and the group.
const SOCKET_MODE: u32 = 0o660;
/// Limit of concurrent connections. More connections wait to be accepted.
const MAX_CONNECTIONS: usize = 16;
/// Time limits for a client.
const TIMEOUTS: RequestTimeouts =
    RequestTimeouts { head: Duration::from_secs(5), connection: Duration::from_secs(10) };
/// Size limit of a request's headers.
const MAX_HEAD: usize = 16 * 1024;
/// Pause after a failed `accept`. It would fail again at once while the process has no free
/// descriptor.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

const OPENMETRICS: HeaderValue =
    HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
const JSON: HeaderValue = HeaderValue::from_static("application/json");
const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");

#[derive(Clone, Copy)]
struct RequestTimeouts {
    /// For the request's headers.
    head: Duration,
    /// For the whole connection.
    connection: Duration,
}

/// The path of the state, which waits until it is in force.
const STATE: &str = "/state";

type Settled<'a> = Pin<Box<dyn Future<Output = ()> + Send + 'a>>;

/// The state that the admin socket shows. It is read at each request.
pub(crate) trait AdminState: Send + Sync {
    /// Reports whether the agent works. If not, it needs a restart.
    fn live(&self) -> bool;

    /// Returns the steps that start-up still waits for. The list is empty once guests are served.
    fn waiting_for(&self) -> Vec<String>;

    /// Returns all metrics as OpenMetrics text 1.0.
    fn metrics(&self) -> String;

    /// Returns the state as JSON, for people and bug reports. It contains no secret.
    fn state(&self) -> serde_json::Value;

    /// Waits until what is shown is in force, but not for long.
    fn settled(&self) -> Settled<'_> {
        Box::pin(std::future::ready(()))
    }
}

/// The bound admin socket.
#[derive(Debug)]
pub(crate) struct AdminSocket {
    file: SocketFile,
}

impl AdminSocket {
    /// Binds the socket. Clients can connect, and wait until it is served.
    ///
    /// # Errors
    /// Those of [`SocketFile::bind`].
    pub(crate) fn bind(path: &Path) -> Result<Self, SocketFileError> {
        Ok(Self { file: SocketFile::bind(path, SOCKET_MODE)? })
    }

    /// Serves until cancelled, also if other software removes the file meanwhile. Then closes all
    /// connections and removes the socket.
    ///
    /// # Errors
    /// The runtime cannot poll the socket.
    pub(crate) async fn serve(
        self,
        state: Arc<dyn AdminState>,
        damage: DamageReports,
        cancel: CancellationToken,
    ) -> io::Result<()> {
        self.serve_with(TIMEOUTS, state, damage, cancel).await
    }

    async fn serve_with(
        mut self,
        timeouts: RequestTimeouts,
        state: Arc<dyn AdminState>,
        damage: DamageReports,
        cancel: CancellationToken,
    ) -> io::Result<()> {
        let tasks = TaskTracker::new();
        loop {
            let listener = UnixListener::from_std(self.file.listener())?;
            tokio::select! {
                () = cancel.cancelled() => break,
                () = accept(listener, timeouts, Arc::clone(&state), &tasks, &cancel) => {}
                () = self.file.restored(Part::AdminSocket, &damage) => {}
            }
        }
        tasks.close();
        tasks.wait().await;
        Ok(())
    }
}

async fn accept(
    listener: UnixListener,
    timeouts: RequestTimeouts,
    state: Arc<dyn AdminState>,
    tasks: &TaskTracker,
    cancel: &CancellationToken,
) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else {
            unreachable!("this semaphore is never closed");
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let (state, cancel) = (Arc::clone(&state), cancel.clone());
                tasks.spawn(async move {
                    let conversation = serve_stream(stream, timeouts.head, state);
                    let connection = tokio::time::timeout(timeouts.connection, conversation);
                    if let Some(Err(_)) = cancel.run_until_cancelled(connection).await {
                        tracing::debug!("admin connection timed out");
                    }
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept admin connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve_stream(stream: UnixStream, head: Duration, state: Arc<dyn AdminState>) {
    let service = service_fn(move |request: Request<Incoming>| {
        let state = Arc::clone(&state);
        async move {
            if request.uri().path() == STATE {
                state.settled().await;
            }
            Ok::<_, Infallible>(answer(request.method(), request.uri().path(), state.as_ref()))
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(head)
        .max_buf_size(MAX_HEAD)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = connection.await {
        tracing::debug!(%error, "admin connection failed");
    }
}

fn answer(method: &Method, path: &str, state: &dyn AdminState) -> Response<Full<Bytes>> {
    let route: fn(&dyn AdminState) -> (StatusCode, HeaderValue, String) = match path {
        "/live" => live,
        "/ready" => ready,
        "/metrics" => |state| (StatusCode::OK, OPENMETRICS, state.metrics()),
        STATE => |state| (StatusCode::OK, JSON, format!("{:#}\n", state.state())),
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

/// Lists the unfinished start-up steps, one per line.
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
