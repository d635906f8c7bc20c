//! A raw-byte Nova, an agent in front of it, and a raw-byte guest. Time-outs here only turn a hang
//! into a failure.

use std::future::Future;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use metadata_agent::ids::MacAddress;
use metadata_agent::nova_access::{self, NovaTls};
use metadata_agent::proxy::metrics::Metrics;
use metadata_agent::proxy::{
    ClientDirectory, ClientIdentity, ClientLookup, ClientQuery, Endpoint, LookupFuture, LookupOutcome,
    LookupState, Proxy, ProxyConfig, Scheme, SecretStatus, Upstream, UpstreamAccess, UpstreamConfig,
    serve_guests,
};
use metadata_agent::secrets::Signer;
use metadata_ebpf::identity::{AttachmentId, ClientAddress};
use prometheus_client::registry::Registry;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub const INSTANCE: &str = "3b0e5c6e-9a1f-4d0a-8f0b-1c2d3e4f5a6b";
pub const SIGNATURE: &str = "8030f3b14d8b9256158b93785c622be3b4c20daf8bbc1deacd3051b3fedbdf90";

/// Fails a test that hangs.
pub async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    let Ok(output) = tokio::time::timeout(Duration::from_mins(1), future).await else {
        panic!("{what} took too long")
    };
    output
}

/// The reaction of the Nova to one request.
pub enum Act {
    /// Responds and keeps the connection.
    Say(Vec<u8>),
    /// Responds, perhaps in part, and closes.
    SayAndClose(Vec<u8>),
    /// Responds in part and resets the connection.
    SayAndReset(Vec<u8>),
    /// Responds in part, then waits until the agent closes.
    SayAndHang(Vec<u8>),
}

/// The number of a connection, and the request that arrived on it.
pub type Seen = (usize, Vec<u8>);

pub struct Nova {
    pub port: u16,
    pub seen: mpsc::UnboundedReceiver<Seen>,
    /// Gets the number of each connection that was closed.
    pub closed: mpsc::UnboundedReceiver<usize>,
}

impl Nova {
    /// `act` gets the number of the connection, the number of the request on it, and the request.
    pub async fn start(act: impl Fn(usize, usize, &[u8]) -> Act + Send + Sync + 'static) -> Self {
        Self::start_with(act, |stream| async { Some(stream) }).await
    }

    pub async fn start_with<S, F>(
        act: impl Fn(usize, usize, &[u8]) -> Act + Send + Sync + 'static,
        wrap: impl Fn(TcpStream) -> F + Send + 'static,
    ) -> Self
    where
        S: Stream,
        F: Future<Output = Option<S>> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (report, seen) = mpsc::unbounded_channel();
        let (report_closed, closed) = mpsc::unbounded_channel();
        let act = Arc::new(act);
        tokio::spawn(async move {
            for connection in 0.. {
                let Ok((stream, _)) = listener.accept().await else { return };
                let stream = wrap(stream);
                let (act, report, report_closed) = (Arc::clone(&act), report.clone(), report_closed.clone());
                tokio::spawn(async move {
                    if let Some(stream) = stream.await {
                        converse(stream, connection, &*act, &report).await;
                        let _ = report_closed.send(connection);
                    }
                });
            }
        });
        Self { port, seen, closed }
    }

    /// Starts a Neutron metadata agent on a unix socket, in Nova's place.
    pub fn on_socket(path: &Path, act: impl Fn(usize, usize, &[u8]) -> Act + Send + Sync + 'static) -> Self {
        let listener = UnixListener::bind(path).unwrap();
        let (report, seen) = mpsc::unbounded_channel();
        let (report_closed, closed) = mpsc::unbounded_channel();
        let act = Arc::new(act);
        tokio::spawn(async move {
            for connection in 0.. {
                let Ok((stream, _)) = listener.accept().await else { return };
                let (act, report, report_closed) = (Arc::clone(&act), report.clone(), report_closed.clone());
                tokio::spawn(async move {
                    converse(stream, connection, &*act, &report).await;
                    let _ = report_closed.send(connection);
                });
            }
        });
        Self { port: 0, seen, closed }
    }

    /// Starts a Nova that answers everything with the same bytes.
    pub async fn saying(answer: impl Into<Vec<u8>>) -> Self {
        let answer = answer.into();
        Self::start(move |_, _, _| Act::Say(answer.clone())).await
    }

    pub async fn next(&mut self) -> Seen {
        soon("a request at Nova", self.seen.recv()).await.unwrap()
    }

    /// Returns the next request as text.
    pub async fn next_text(&mut self) -> String {
        String::from_utf8(self.next().await.1).unwrap()
    }
}

pub trait Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static {
    fn reset(self);
}

impl Stream for TcpStream {
    fn reset(self) {
        self.set_zero_linger().unwrap();
    }
}

impl Stream for UnixStream {
    fn reset(self) {}
}

async fn converse<S: Stream>(
    mut stream: S,
    connection: usize,
    act: &(impl Fn(usize, usize, &[u8]) -> Act + Sync),
    report: &mpsc::UnboundedSender<Seen>,
) {
    let mut buffer = Vec::new();
    for number in 0.. {
        let Some(request) = read_message(&mut stream, &mut buffer).await else { return };
        let _ = report.send((connection, request.clone()));
        match act(connection, number, &request) {
            Act::Say(answer) => {
                if stream.write_all(&answer).await.is_err() {
                    return;
                }
            }
            Act::SayAndClose(answer) => {
                let _ = stream.write_all(&answer).await;
                let _ = stream.shutdown().await;
                return;
            }
            Act::SayAndReset(answer) => {
                let _ = stream.write_all(&answer).await;
                return stream.reset();
            }
            Act::SayAndHang(answer) => {
                let _ = stream.write_all(&answer).await;
                let _ = stream.read_to_end(&mut buffer).await;
                return;
            }
        }
    }
}

/// Reads one message with a `Content-Length` body, byte for byte.
pub async fn read_message(stream: &mut (impl AsyncRead + Unpin), buffer: &mut Vec<u8>) -> Option<Vec<u8>> {
    loop {
        if let Some(head) = find(buffer, b"\r\n\r\n").map(|at| at + 4) {
            let length: usize = header(&buffer[..head], "content-length").map_or(0, |v| v.parse().unwrap());
            while buffer.len() < head + length {
                if stream.read_buf(buffer).await.ok()? == 0 {
                    return None;
                }
            }
            return Some(buffer.drain(..head + length).collect());
        }
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    }
}

pub fn find(text: &[u8], what: &[u8]) -> Option<usize> {
    text.windows(what.len()).position(|window| window == what)
}

pub fn header(head: &[u8], name: &str) -> Option<String> {
    let head = String::from_utf8_lossy(head);
    head.lines().skip(1).find_map(|line| {
        let (own, value) = line.split_once(':')?;
        own.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
    })
}

/// The directory of an agent with one client.
#[derive(Debug)]
pub struct FakeDirectory {
    state: Mutex<LookupState>,
    version: watch::Sender<u64>,
    held: watch::Sender<u64>,
}

impl FakeDirectory {
    pub fn new(state: LookupState) -> Arc<Self> {
        let (version, held) = (watch::Sender::new(0), watch::Sender::new(0));
        Arc::new(Self { state: Mutex::new(state), version, held })
    }

    pub fn set(&self, state: LookupState) {
        *self.state.lock().unwrap() = state;
        self.version.send_modify(|version| *version += 1);
    }

    /// Waits until a request waits for its port to become known.
    pub async fn held(&self) {
        soon("a request", self.held.subscribe().wait_for(|held| *held > 0)).await.unwrap();
    }
}

impl ClientDirectory for FakeDirectory {
    fn lookup(&self, client: &ClientAddress) -> LookupState {
        assert_eq!(*client, CLIENT());
        self.state.lock().unwrap().clone()
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.held.send_modify(|held| *held += 1);
        self.version.subscribe()
    }

    fn guest_mac(&self, _: &ClientAddress) -> Option<MacAddress> {
        None
    }

    fn secrets(&self) -> Arc<SecretStatus> {
        Arc::default()
    }
}

/// Finds no client.
#[derive(Debug)]
pub struct NoLookup;

impl ClientLookup for NoLookup {
    fn find<'a>(&'a self, _: &'a ClientQuery) -> LookupFuture<'a> {
        Box::pin(std::future::ready(LookupOutcome::NotFound))
    }
}

#[expect(non_snake_case, reason = "a constant but for Option::unwrap")]
pub fn CLIENT() -> ClientAddress {
    ClientAddress::ipv4(AttachmentId::new(7).unwrap(), [10, 0, 0, 5])
}

pub fn known() -> LookupState {
    LookupState::Known(Arc::new(identity(&Signer::new("secret".into()))))
}

/// Returns the guest's identity, signed with the secrets in force.
pub fn identity(signer: &Signer) -> ClientIdentity {
    let instance = INSTANCE.parse().unwrap();
    let fixed_ips = vec!["10.0.0.5".parse().unwrap()];
    ClientIdentity::new(instance, &"acme".parse().unwrap(), fixed_ips, signer.sign(&instance))
}

pub fn pending() -> LookupState {
    LookupState::Pending { since: Instant::now() }
}

pub struct Agent {
    pub port: u16,
    pub cancel: CancellationToken,
    pub tracker: TaskTracker,
    registry: Registry,
    front_port: u16,
}

impl Agent {
    pub async fn before(nova: &Nova) -> Self {
        Self::with(ProxyConfig::default(), upstream(nova.port), FakeDirectory::new(known())).await
    }

    pub async fn with(
        config: ProxyConfig,
        upstream: UpstreamConfig,
        directory: Arc<dyn ClientDirectory>,
    ) -> Self {
        Self::with_lookup(config, upstream, directory, Arc::new(NoLookup)).await
    }

    pub async fn with_lookup(
        config: ProxyConfig,
        upstream: UpstreamConfig,
        directory: Arc<dyn ClientDirectory>,
        lookup: Arc<dyn ClientLookup>,
    ) -> Self {
        Self::start(config, upstream, NovaTls::default(), directory, lookup).await
    }

    /// Keeps the TLS files, as in production, until `cancel`.
    pub async fn with_tls(
        config: ProxyConfig,
        upstream: UpstreamConfig,
        tls: NovaTls,
        directory: Arc<dyn ClientDirectory>,
    ) -> Self {
        Self::start(config, upstream, tls, directory, Arc::new(NoLookup)).await
    }

    async fn start(
        config: ProxyConfig,
        upstream: UpstreamConfig,
        tls: NovaTls,
        directory: Arc<dyn ClientDirectory>,
        lookup: Arc<dyn ClientLookup>,
    ) -> Self {
        let mut registry = Registry::default();
        let metrics = Metrics::register(&mut registry);
        let (access, files) = nova_access::open(&upstream, tls).unwrap();
        let upstream = Upstream::new(upstream, access, Arc::clone(&metrics), TaskTracker::new()).unwrap();
        let proxy = Proxy::new(directory, lookup, Arc::new(upstream), config, metrics);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (cancel, tracker) = (CancellationToken::new(), TaskTracker::new());
        if let Some(files) = files {
            tracker.spawn(files.keep(cancel.clone()));
        }
        // One listener works as in production and rejects loopback peers. On the other, every peer
        // is CLIENT.
        let front = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let front_port = front.local_addr().unwrap().port();
        tokio::spawn(serve_guests(front, Arc::clone(&proxy), cancel.clone(), tracker.clone()));
        let (token, tasks) = (cancel.clone(), tracker.clone());
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                stream.set_nodelay(true).unwrap();
                tasks.spawn(Arc::clone(&proxy).serve_connection(stream, CLIENT(), token.clone()));
            }
        });
        Self { port, cancel, tracker, registry, front_port }
    }

    pub async fn guest(&self) -> Guest {
        Self::connect(self.port).await
    }

    /// Connects as a peer that has bypassed the eBPF program.
    pub async fn stranger(&self) -> Guest {
        Self::connect(self.front_port).await
    }

    async fn connect(port: u16) -> Guest {
        let stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Guest { stream, buffer: Vec::new() }
    }

    /// Sends one request on a new connection.
    pub async fn ask(&self, request: impl AsRef<[u8]>) -> String {
        let mut guest = self.guest().await;
        guest.send(request).await;
        guest.answer().await
    }

    pub fn metrics(&self) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        text
    }

    #[track_caller]
    pub fn assert_counted(&self, line: &str) {
        let text = self.metrics();
        assert!(text.lines().any(|l| l == line), "{line} in\n{text}");
    }
}

pub fn upstream(port: u16) -> UpstreamConfig {
    UpstreamConfig::new(vec![Endpoint::new(Scheme::Http, "127.0.0.1", port).unwrap()])
}

/// Returns the access to an upstream without TLS.
pub fn access(upstream: &UpstreamConfig) -> UpstreamAccess {
    nova_access::open(upstream, NovaTls::default()).unwrap().0
}

/// Returns a port without a listener.
pub async fn closed_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port()
}

pub struct Guest {
    pub stream: TcpStream,
    buffer: Vec<u8>,
}

impl Guest {
    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).await.unwrap();
    }

    pub async fn answer_bytes(&mut self) -> Vec<u8> {
        soon("an answer", read_message(&mut self.stream, &mut self.buffer)).await.expect("an answer")
    }

    /// Reads the next response by its `Content-Length`.
    pub async fn answer(&mut self) -> String {
        String::from_utf8(self.answer_bytes().await).unwrap()
    }

    /// Reads everything until the agent closes. A reset is an error.
    pub async fn rest(&mut self) -> std::io::Result<Vec<u8>> {
        let mut rest = std::mem::take(&mut self.buffer);
        soon("the end", self.stream.read_to_end(&mut rest)).await?;
        Ok(rest)
    }
}

pub const GET: &str = "GET /latest HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n";
pub const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

#[track_caller]
pub fn assert_status(answer: &str, status: u16) {
    assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{status} wanted: {answer}");
}
