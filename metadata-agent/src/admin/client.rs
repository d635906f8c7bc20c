//! Client of the admin socket, with a timeout and a size limit.

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

/// Size limit of a response. The state of a full host is a tenth of it.
const MAX_RESPONSE: usize = 64 * 1024 * 1024;

/// A response of the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct AdminResponse {
    pub status: StatusCode,
    pub body: Bytes,
}

/// The agent did not answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    /// The socket has no listener, or access is denied.
    #[error("cannot reach the agent at {}: {source}", path.display())]
    Connect { path: PathBuf, source: io::Error },
    /// The response is not valid HTTP.
    #[error("cannot get {route} from the agent at {}: {source}", path.display())]
    Http { path: PathBuf, route: &'static str, source: hyper::Error },
    #[error("the agent at {} did not answer {route} within {} s", path.display(), limit.as_secs_f64())]
    Timeout { path: PathBuf, route: &'static str, limit: Duration },
    #[error("the agent at {} answered {route} with more than {MAX_RESPONSE} bytes", path.display())]
    TooLong { path: PathBuf, route: &'static str },
}

/// Requests one route, such as `/state`. The time limit covers everything, from connecting to the
/// last byte of the response.
///
/// # Errors
/// There is no valid response in time. A response with an error status is a valid response.
pub(crate) async fn get(
    path: &Path,
    route: &'static str,
    limit: Duration,
) -> Result<AdminResponse, ClientError> {
    let response = tokio::time::timeout(limit, request(path, route)).await;
    response.unwrap_or_else(|_| Err(ClientError::Timeout { path: path.to_owned(), route, limit }))
}

async fn request(path: &Path, route: &'static str) -> Result<AdminResponse, ClientError> {
    let http = |source| ClientError::Http { path: path.to_owned(), route, source };
    let stream = UnixStream::connect(path)
        .await
        .map_err(|source| ClientError::Connect { path: path.to_owned(), source })?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(http)?;
    let mut request = Request::new(Empty::<Bytes>::new());
    *request.uri_mut() = hyper::Uri::from_static(route);
    request.headers_mut().insert(HOST, hyper::header::HeaderValue::from_static("localhost"));
    let response = async {
        let response = sender.send_request(request).await.map_err(http)?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_RESPONSE).collect().await;
        let body = body.map_err(|error| match error.downcast::<hyper::Error>() {
            Ok(error) => http(*error),
            Err(other) => {
                debug_assert!(other.is::<LengthLimitError>(), "{other}");
                ClientError::TooLong { path: path.to_owned(), route }
            }
        })?;
        Ok(AdminResponse { status, body: body.to_bytes() })
    };
    // The connection makes progress only while it is polled. Its errors show in the response.
    let (response, _) = tokio::join!(response, connection);
    response
}
