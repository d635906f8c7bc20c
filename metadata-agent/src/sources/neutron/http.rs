//! HTTP client for whole responses, over http or https, with a deadline and a length limit.
//!
//! Connections are reused. Environment variables are ignored, and redirects are not followed.

use std::error::Error;
use std::future::pending;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Bytes;
use hyper::header::HeaderValue;
use hyper::http::response;
use hyper::rt::Executor;
use hyper::{Request, Response, header};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioTimer;
use rustls::ClientConfig;
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

use tls_files::{ServerTrust, TlsSetupError};

use crate::error_chain::error_chain;
use crate::process::blocking::blocking;

/// Lifetime of idle connections. Apache, which serves the APIs, closes them after 5 s.
const IDLE: Duration = Duration::from_secs(4);
/// Identifies the agent to operators of Keystone and Neutron.
const USER_AGENT: HeaderValue =
    HeaderValue::from_static(concat!("metadata-agent/", env!("CARGO_PKG_VERSION")));
/// Limit for the TCP handshake. The deadline applies to the whole request.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The HTTP client cannot be created.
#[derive(Debug, thiserror::Error)]
#[error("{} (neutron_cafile)", error_chain(.0))]
pub(crate) struct HttpSetupError(#[source] TlsSetupError);

/// A request failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HttpError {
    /// No connection, no trusted server, or no HTTP.
    #[error("cannot send request: {}", error_chain(.0))]
    Unreachable(#[source] hyper_util::client::legacy::Error),
    #[error("response ended early: {}", error_chain(.0.as_ref()))]
    Broken(#[source] Box<dyn Error + Send + Sync>),
    #[error("response is longer than {limit} bytes")]
    TooLong { limit: usize },
    #[error("no complete response within {} s (neutron_timeout)", limit.as_secs_f64())]
    Timeout { limit: Duration },
}

/// Servers to trust.
#[derive(Clone, Debug, Default)]
pub(super) struct HttpTrust {
    pub(super) ca_certificates: Option<PathBuf>,
    pub(super) insecure: bool,
}

type Connections = Client<HttpsConnector<HttpConnector>, Full<Bytes>>;

/// An HTTP client.
#[derive(Debug)]
pub(super) struct Http {
    trust: HttpTrust,
    timeout: Duration,
    tasks: TaskTracker,
    client: ArcSwap<Connections>,
}

impl Http {
    /// Creates a client. `tasks` tracks its connections, which end after the client is dropped.
    pub(super) async fn new(
        trust: HttpTrust,
        timeout: Duration,
        tasks: TaskTracker,
    ) -> Result<Self, HttpSetupError> {
        let client = ArcSwap::from_pointee(client(&trust, timeout, &tasks).await?);
        Ok(Self { trust, timeout, tasks, client })
    }

    /// Sends a request and receives a response of at most `limit` bytes.
    pub(super) async fn send(
        &self,
        mut request: Request<Full<Bytes>>,
        limit: usize,
    ) -> Result<(response::Parts, Bytes), HttpError> {
        request.headers_mut().insert(header::USER_AGENT, USER_AGENT);
        let response = self.send_once(request, limit).await;
        // The trusted certificates may have changed since they were read.
        if let Err(HttpError::Unreachable(_)) = &response
            && let Ok(Ok(renewed)) =
                timeout(self.timeout, client(&self.trust, self.timeout, &self.tasks)).await
        {
            self.client.store(Arc::new(renewed));
        }
        response
    }

    async fn send_once(
        &self,
        request: Request<Full<Bytes>>,
        limit: usize,
    ) -> Result<(response::Parts, Bytes), HttpError> {
        let client = self.client.load_full();
        let whole = async {
            let (head, body) =
                client.request(request).await.map_err(HttpError::Unreachable).map(Response::into_parts)?;
            let body = Limited::new(body, limit).collect().await.map_err(|error| {
                if error.is::<LengthLimitError>() {
                    HttpError::TooLong { limit }
                } else {
                    HttpError::Broken(error)
                }
            })?;
            Ok((head, body.to_bytes()))
        };
        timeout(self.timeout, whole).await.unwrap_or(Err(HttpError::Timeout { limit: self.timeout }))
    }
}

async fn client(
    trust: &HttpTrust,
    timeout: Duration,
    tasks: &TaskTracker,
) -> Result<Connections, HttpSetupError> {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(CONNECT_TIMEOUT.min(timeout)));
    let trust = trust.clone();
    let Some(tls) = blocking(move || client_config(&trust)).await else {
        // The runtime drops this task.
        return pending().await;
    };
    let tls = tls?;
    let connector =
        HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1().wrap_connector(tcp);
    Ok(Client::builder(Tracked(tasks.clone()))
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(IDLE)
        .build(connector))
}

/// Runs the client's connections as tracked tasks.
#[derive(Clone)]
struct Tracked(TaskTracker);

impl<F> Executor<F> for Tracked
where
    F: Future<Output: Send + 'static> + Send + 'static,
{
    fn execute(&self, connection: F) {
        self.0.spawn(connection);
    }
}

fn client_config(trust: &HttpTrust) -> Result<ClientConfig, HttpSetupError> {
    let trusted = match &trust.ca_certificates {
        _ if trust.insecure => ServerTrust::Unverified,
        Some(path) => ServerTrust::Ca(path),
        None => ServerTrust::SystemCa,
    };
    tls_files::client_config(trusted, None).map_err(HttpSetupError)
}
