//! One HTTP question and its whole answer, over http or https: with a deadline for all of it and a limit on its length.
//!
//! Connections are kept for the next question. Nothing of the environment is read, and no redirect is followed: an
//! answer that points elsewhere is an answer.

use std::error::Error;
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

/// How long a connection is kept without use: Apache in front of the APIs closes after 5 s.
const IDLE: Duration = Duration::from_secs(4);
/// By which the operators of Keystone and Neutron know us.
const OURSELVES: HeaderValue =
    HeaderValue::from_static(concat!("metadata-agent/", env!("CARGO_PKG_VERSION")));
/// For TCP alone; the deadline holds for all of a question.
const CONNECT: Duration = Duration::from_secs(5);

/// Why there is no HTTP client.
#[derive(Debug, thiserror::Error)]
#[error("{} (neutron_cafile)", error_chain(.0))]
pub struct HttpSetupError(#[source] TlsSetupError);

/// Why a question has no answer.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// Nobody there, nobody whom we believe, or no HTTP.
    #[error("cannot be asked: {}", error_chain(.0))]
    Unreachable(#[source] hyper_util::client::legacy::Error),
    /// The answer broke off.
    #[error("broke off its answer: {}", error_chain(.0.as_ref()))]
    Broken(#[source] Box<dyn Error + Send + Sync>),
    /// The answer is longer than any answer to this question.
    #[error("answers with more than {limit} bytes")]
    TooLong {
        /// What would have been taken.
        limit: usize,
    },
    /// No whole answer in time.
    #[error("has not answered within {} s (neutron_timeout)", limit.as_secs_f64())]
    Late {
        /// How long was waited.
        limit: Duration,
    },
}

/// Whom to believe.
#[derive(Clone, Debug, Default)]
pub(super) struct Trust {
    pub(super) authorities: Option<PathBuf>,
    pub(super) insecure: bool,
}

type Connections = Client<HttpsConnector<HttpConnector>, Full<Bytes>>;

/// An HTTP client.
#[derive(Debug)]
pub(super) struct Http {
    trust: Trust,
    patience: Duration,
    tasks: TaskTracker,
    client: ArcSwap<Connections>,
}

impl Http {
    /// Whoever drops it and all answers ends all connections; `tasks` tells when they have ended.
    pub(super) fn new(trust: Trust, patience: Duration, tasks: TaskTracker) -> Result<Self, HttpSetupError> {
        let client = ArcSwap::from_pointee(client(&trust, patience, &tasks)?);
        Ok(Self { trust, patience, tasks, client })
    }

    /// Asks, and takes an answer of at most `limit` bytes.
    pub(super) async fn ask(
        &self,
        mut request: Request<Full<Bytes>>,
        limit: usize,
    ) -> Result<(response::Parts, Bytes), HttpError> {
        request.headers_mut().insert(header::USER_AGENT, OURSELVES);
        let answer = self.ask_once(request, limit).await;
        // Whom to believe may have changed since it was read.
        if let (Err(HttpError::Unreachable(_)), Ok(anew)) =
            (&answer, client(&self.trust, self.patience, &self.tasks))
        {
            self.client.store(Arc::new(anew));
        }
        answer
    }

    async fn ask_once(
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
        timeout(self.patience, whole).await.unwrap_or(Err(HttpError::Late { limit: self.patience }))
    }
}

fn client(trust: &Trust, patience: Duration, tasks: &TaskTracker) -> Result<Connections, HttpSetupError> {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(CONNECT.min(patience)));
    let tls = client_config(trust)?;
    let connector =
        HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1().wrap_connector(tcp);
    Ok(Client::builder(Tracked(tasks.clone()))
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(IDLE)
        .build(connector))
}

/// Runs the client's connections as tasks that somebody keeps count of.
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

fn client_config(trust: &Trust) -> Result<ClientConfig, HttpSetupError> {
    let believed = match &trust.authorities {
        _ if trust.insecure => ServerTrust::Unverified,
        Some(path) => ServerTrust::Ca(path),
        None => ServerTrust::SystemCa,
    };
    tls_files::client_config(believed, None).map_err(HttpSetupError)
}
