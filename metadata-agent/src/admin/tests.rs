use std::fs;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinHandle;

use super::client::{AdminResponse, ClientError, get};
use super::*;

/// Far longer than anything here takes, and shorter than a test runner's timeouts.
const LIMIT: Duration = Duration::from_mins(1);

#[derive(Default)]
struct FakeAgent {
    dead: AtomicBool,
    ready: AtomicBool,
}

impl AdminState for FakeAgent {
    fn live(&self) -> bool {
        !self.dead.load(Ordering::SeqCst)
    }

    fn waiting_for(&self) -> Vec<String> {
        if self.ready.load(Ordering::SeqCst) {
            Vec::new()
        } else {
            vec!["libvirt".to_owned(), "portal".to_owned()]
        }
    }

    fn metrics(&self) -> String {
        "# EOF\n".to_owned()
    }

    fn state(&self) -> serde_json::Value {
        serde_json::json!({ "ports": 3 })
    }
}

/// A served socket, in a directory of its own.
struct Served {
    _dir: TempDir,
    path: PathBuf,
    agent: Arc<FakeAgent>,
    cancel: CancellationToken,
    task: JoinHandle<io::Result<()>>,
}

impl Served {
    fn start() -> Self {
        Self::start_with(TIMEOUTS)
    }

    fn start_with(timeouts: RequestTimeouts) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/admin.sock");
        let (agent, cancel) = (Arc::new(FakeAgent::default()), CancellationToken::new());
        let socket = AdminSocket::bind(&path).unwrap();
        let task = tokio::spawn(socket.serve_with(
            timeouts,
            Arc::clone(&agent) as Arc<dyn AdminState>,
            DamageReports::default(),
            cancel.clone(),
        ));
        Self { _dir: dir, path, agent, cancel, task }
    }

    async fn get(&self, route: &'static str) -> (u16, String) {
        let AdminResponse { status, body } = get(&self.path, route, LIMIT).await.unwrap();
        (status.as_u16(), String::from_utf8(body.to_vec()).unwrap())
    }

    /// Sends bytes and reads until the agent closes.
    async fn exchange(&self, request: &str) -> String {
        let mut stream = UnixStream::connect(&self.path).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        tokio::time::timeout(LIMIT, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
        answer
    }

    async fn stop(self) {
        self.cancel.cancel();
        tokio::time::timeout(LIMIT, self.task).await.unwrap().unwrap().unwrap();
        assert!(!self.path.exists(), "the socket is removed");
    }
}

#[tokio::test]
async fn each_route_tells_what_the_agent_knows() {
    let served = Served::start();
    assert_eq!(served.get("/live").await, (200, "live\n".to_owned()));
    assert_eq!(served.get("/ready").await, (503, "libvirt\nportal\n".to_owned()));
    served.agent.ready.store(true, Ordering::SeqCst);
    assert_eq!(served.get("/ready").await, (200, "ready\n".to_owned()));
    served.agent.dead.store(true, Ordering::SeqCst);
    assert_eq!(served.get("/live").await, (503, "not live\n".to_owned()));
    assert_eq!(served.get("/metrics").await, (200, "# EOF\n".to_owned()));
    let (status, state) = served.get("/state").await;
    assert_eq!(
        (status, state.parse::<serde_json::Value>().unwrap()),
        (200, serde_json::json!({ "ports": 3 }))
    );
    assert_eq!(served.get("/secret").await.0, 404);
    served.stop().await;
}

#[tokio::test]
async fn metrics_say_that_they_are_openmetrics() {
    let served = Served::start();
    let answer = served.exchange("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
    let kind = "\r\ncontent-type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n";
    assert!(answer.contains(kind), "{answer}");
    served.stop().await;
}

#[tokio::test]
async fn only_reading_is_allowed() {
    let served = Served::start();
    let answer = served.exchange("POST /state HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 405 ") && answer.contains("\r\nallow: GET, HEAD\r\n"), "{answer}");
    let answer = served.exchange("HEAD /live HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(answer.contains("\r\ncontent-length: 5\r\n") && answer.ends_with("\r\n\r\n"), "{answer}");
    served.stop().await;
}

#[tokio::test]
async fn a_request_head_over_the_limit_is_refused() {
    let served = Served::start();
    // As long as the limit and without its end. A byte more could be left unread and reset the
    // connection.
    let request = format!("{:a<MAX_HEAD$}", "GET /live HTTP/1.1\r\nHost: x\r\nX: ");
    let answer = served.exchange(&request).await;
    assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
    served.stop().await;
}

/// Fills every place with clients that say no more than `first`, and waits for one that asks.
async fn outlast_silent_clients(timeouts: RequestTimeouts, first: &str) -> Duration {
    let served = Served::start_with(timeouts);
    let mut silent = Vec::new();
    let before = Instant::now();
    for _ in 0..MAX_CONNECTIONS {
        let mut stream = UnixStream::connect(&served.path).await.unwrap();
        stream.write_all(first.as_bytes()).await.unwrap();
        silent.push(stream);
    }
    assert_eq!(served.get("/live").await.0, 200);
    let waited = before.elapsed();
    served.stop().await;
    waited
}

#[tokio::test]
async fn slow_clients_cannot_keep_others_out() {
    let timeouts = RequestTimeouts { head: Duration::from_millis(50), connection: LIMIT };
    let waited = outlast_silent_clients(timeouts, "GET /live HTTP/1.1\r\n").await;
    assert!(waited >= timeouts.head, "there was no room before: {waited:?}");
}

#[tokio::test]
async fn no_connection_outlives_its_time() {
    let timeouts = RequestTimeouts { head: LIMIT, connection: Duration::from_millis(50) };
    let waited = outlast_silent_clients(timeouts, "").await;
    assert!(waited >= timeouts.connection, "there was no room before: {waited:?}");
}

#[tokio::test]
async fn cancelling_does_not_wait_for_open_connections() {
    let served = Served::start();
    let mut stream = UnixStream::connect(&served.path).await.unwrap();
    stream.write_all(b"GET /li").await.unwrap();
    assert_eq!(served.get("/live").await.0, 200, "the connection before it has been accepted too");
    let before = Instant::now();
    served.stop().await;
    assert!(before.elapsed() < TIMEOUTS.head);
}

#[test]
fn a_new_socket_is_restricted_to_its_group() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a/admin.sock");
    let _socket = AdminSocket::bind(&path).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o660, 0o755));
}

#[test]
fn a_stale_socket_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("admin.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(fs::metadata(&path).unwrap().file_type().is_socket());
    let _socket = AdminSocket::bind(&path).unwrap();
    std::os::unix::net::UnixStream::connect(&path).unwrap();
}

#[test]
fn a_socket_that_answers_is_left_to_its_agent() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("admin.sock");
    let first = AdminSocket::bind(&path).unwrap();
    let error = AdminSocket::bind(&path).unwrap_err();
    assert!(matches!(&error, SocketFileError::AnotherAgent { path: at } if *at == path), "{error}");
    drop(first);
    assert!(!path.exists());
}

#[test]
fn what_is_no_socket_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("admin.sock");
    fs::write(&path, "mine").unwrap();
    assert!(matches!(AdminSocket::bind(&path).unwrap_err(), SocketFileError::NotASocket { .. }));
    assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
}

#[test]
fn an_agent_does_not_remove_its_successors_socket() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("admin.sock");
    let old = AdminSocket::bind(&path).unwrap();
    fs::rename(&path, dir.path().join("old")).unwrap();
    let _new = AdminSocket::bind(&path).unwrap();
    drop(old);
    std::os::unix::net::UnixStream::connect(&path).unwrap();
}

#[tokio::test]
async fn a_client_names_a_socket_without_a_listener() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("admin.sock");
    let error = get(&path, "/live", LIMIT).await.unwrap_err();
    assert!(matches!(error, ClientError::Connect { .. }), "{error}");
    assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
}

#[tokio::test]
async fn a_client_gives_up_on_an_agent_that_hangs() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("admin.sock");
    // Bound, so that clients connect, but never served.
    let _socket = AdminSocket::bind(&path).unwrap();
    let error = get(&path, "/ready", Duration::from_millis(50)).await.unwrap_err();
    assert!(matches!(error, ClientError::Timeout { route: "/ready", .. }), "{error}");
}
