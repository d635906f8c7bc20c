//! Asks a running agent over its admin socket, with a deadline and a limit for the answer.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Empty, LengthLimitError, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::HOST;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

/// What an agent may answer at most. Its state with every port of a full host is a tenth of that.
const MAX_ANSWER: usize = 64 * 1024 * 1024;

/// The agent's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The status.
    pub status: StatusCode,
    /// The body.
    pub body: Bytes,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens, or we may not ask.
    #[error("cannot reach the agent at {}: {source}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// What answers does not speak HTTP as the agent does.
    #[error("cannot get {route} from the agent at {}: {source}", path.display())]
    Http {
        /// The socket.
        path: PathBuf,
        /// What was asked for.
        route: &'static str,
        /// What is wrong.
        source: hyper::Error,
    },
    /// The answer did not end in time.
    #[error("the agent at {} did not answer {route} within {} s", path.display(), limit.as_secs_f64())]
    Timeout {
        /// The socket.
        path: PathBuf,
        /// What was asked for.
        route: &'static str,
        /// The time it had.
        limit: Duration,
    },
    /// The answer is too long.
    #[error("the agent at {} answered {route} with more than {MAX_ANSWER} bytes", path.display())]
    TooLong {
        /// The socket.
        path: PathBuf,
        /// What was asked for.
        route: &'static str,
    },
}

/// Asks for one route, like `/state`. The limit is for all of it, from connecting to the answer's last byte.
///
/// # Errors
/// Nobody answers, or not in time, or not as the agent does. An answer of any status is an answer.
pub async fn get(path: &Path, route: &'static str, limit: Duration) -> Result<Answer, ClientError> {
    let asked = tokio::time::timeout(limit, ask(path, route)).await;
    asked.unwrap_or_else(|_| Err(ClientError::Timeout { path: path.to_owned(), route, limit }))
}

async fn ask(path: &Path, route: &'static str) -> Result<Answer, ClientError> {
    let http = |source| ClientError::Http { path: path.to_owned(), route, source };
    let stream = UnixStream::connect(path)
        .await
        .map_err(|source| ClientError::Connect { path: path.to_owned(), source })?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(http)?;
    let mut request = Request::new(Empty::<Bytes>::new());
    *request.uri_mut() = hyper::Uri::from_static(route);
    request.headers_mut().insert(HOST, hyper::header::HeaderValue::from_static("localhost"));
    let answer = async {
        let response = sender.send_request(request).await.map_err(http)?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
        let body = body.map_err(|error| match error.downcast::<hyper::Error>() {
            Ok(error) => http(*error),
            Err(other) => {
                debug_assert!(other.is::<LengthLimitError>(), "{other}");
                ClientError::TooLong { path: path.to_owned(), route }
            }
        })?;
        Ok(Answer { status, body: body.to_bytes() })
    };
    // The connection only moves while it is polled. What breaks it shows in the answer.
    let (answer, _) = tokio::join!(answer, connection);
    answer
}
