//! One HTTP question and its whole answer, over http or https: with a deadline for all of it and a limit on its length.
//!
//! Connections are kept for the next question. Nothing of the environment is read, and no redirect is followed: an
//! answer that points elsewhere is an answer.

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Bytes;
use hyper::header::HeaderValue;
use hyper::http::response;
use hyper::rt::Executor;
use hyper::{Request, Response, header};
use hyper_rustls::{ConfigBuilderExt, HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioTimer;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

/// How long a connection is kept without use: Apache in front of the APIs closes after 5 s.
const IDLE: Duration = Duration::from_secs(4);
/// By which the operators of Keystone and Neutron know us.
const OURSELVES: HeaderValue =
    HeaderValue::from_static(concat!("metadata-agent/", env!("CARGO_PKG_VERSION")));
/// For TCP alone; the deadline holds for all of a question.
const CONNECT: Duration = Duration::from_secs(5);

/// Why there is no HTTP client.
#[derive(Debug, thiserror::Error)]
pub enum HttpSetupError {
    /// The authorities' file cannot be read.
    #[error("cannot read {} (neutron_cafile): {source}", path.display())]
    Pem {
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: pem::Error,
    },
    /// The authorities' file has no certificate that can be used.
    #[error("there is no usable certificate in {} (neutron_cafile)", path.display())]
    NoCertificate {
        /// Which file.
        path: PathBuf,
    },
    /// The host's certificate store cannot be read.
    #[error("cannot read the host's certificate store: {0}; neutron_cafile names another")]
    HostAuthorities(#[source] io::Error),
    /// The TLS library refused its own defaults.
    #[error("the TLS provider supports no protocol version: {0}")]
    Versions(#[source] rustls::Error),
}

/// Why a question has no answer.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// Nobody there, nobody whom we believe, or no HTTP.
    #[error("cannot be asked: {}", causes(.0))]
    Unreachable(#[source] hyper_util::client::legacy::Error),
    /// The answer broke off.
    #[error("broke off its answer: {}", causes(.0.as_ref()))]
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

/// What an error says, and what each cause of it adds.
fn causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
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
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(HttpSetupError::Versions)?;
    let builder = match &trust.authorities {
        _ if trust.insecure => {
            builder.dangerous().with_custom_certificate_verifier(Arc::new(Anybody(provider)))
        }
        Some(path) => builder.with_root_certificates(authorities(path)?),
        None => builder.with_native_roots().map_err(HttpSetupError::HostAuthorities)?,
    };
    Ok(builder.with_no_client_auth())
}

fn authorities(path: &Path) -> Result<RootCertStore, HttpSetupError> {
    let fault = |source| HttpSetupError::Pem { path: path.to_owned(), source };
    let certificates = CertificateDer::pem_file_iter(path).map_err(fault)?;
    let certificates = certificates.collect::<Result<Vec<_>, _>>().map_err(fault)?;
    let mut roots = RootCertStore::empty();
    let (usable, _unusable) = roots.add_parsable_certificates(certificates);
    if usable == 0 { Err(HttpSetupError::NoCertificate { path: path.to_owned() }) } else { Ok(roots) }
}

/// Believes anybody, but not that a broken signature is one.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
