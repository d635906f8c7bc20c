//! An HTTP server in a namespace that records what it gets and fails as told.
//!
//! One thread, one current-thread runtime, until the value is dropped. What it answers is decided by a function of
//! the recorded request; how it behaves around that, by its [`Mode`], which a test may change at any time.

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc as std_mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use hyper::body::Bytes;
use tokio::runtime;
use tokio::sync::{mpsc, watch};

use crate::netns::Netns;
use crate::wait::PATIENCE;

mod connection;

/// A request as it arrived.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// Number of the connection it came on, from 0.
    pub connection: u64,
    /// Where that connection came from.
    pub peer: SocketAddr,
    /// The method.
    pub method: String,
    /// The request target, undecoded, with its query.
    pub path: String,
    /// Names in lower case with their values, in order.
    pub headers: Vec<(String, String)>,
    /// The body, without its framing.
    pub body: Bytes,
}

impl Recorded {
    /// All values of this header, joined as a WSGI server joins them.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<String> {
        let values: Vec<&str> = self
            .headers
            .iter()
            .filter(|(have, _)| have.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
            .collect();
        if values.is_empty() { None } else { Some(values.join(",")) }
    }
}

/// What to answer. `Content-Length` and `Date` are added.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// Headers, in order.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Bytes,
}

impl Answer {
    /// An answer with one `Content-Type`.
    #[must_use]
    pub fn new(status: u16, content_type: &str, body: impl Into<Bytes>) -> Self {
        let headers = vec![("content-type".to_owned(), content_type.to_owned())];
        Self { status, headers, body: body.into() }
    }

    /// A text as Nova labels it.
    #[must_use]
    pub fn text(status: u16, text: &str) -> Self {
        Self::new(status, "text/plain; charset=UTF-8", text.to_owned())
    }

    /// A redirect.
    #[must_use]
    pub fn redirect(location: &str) -> Self {
        let headers = vec![("location".to_owned(), location.to_owned())];
        Self { status: 302, headers, body: Bytes::new() }
    }
}

/// How the server behaves.
#[derive(Clone, Debug)]
pub enum Mode {
    /// Answers.
    Serve,
    /// Is down: the listener and all connections are closed.
    Refuse,
    /// Accepts and records, but answers only once the mode is another one.
    Hold,
    /// Holds requests for this path, and answers all others.
    HoldPath(&'static str),
    /// Sends the head and half of the body of its answer, then resets the connection.
    ResetMidBody,
    /// Answers this to everything.
    Fixed(Answer),
    /// Answers these bytes to everything at once, unrecorded: for benches.
    Static(Bytes),
}

impl Mode {
    fn holds(&self, request: &Recorded) -> bool {
        match self {
            Self::Hold => true,
            Self::HoldPath(path) => request.path == *path,
            Self::Serve | Self::Refuse | Self::ResetMidBody | Self::Fixed(_) | Self::Static(_) => false,
        }
    }
}

/// A running server.
pub struct HttpServer {
    address: SocketAddr,
    shared: Arc<Shared>,
    // Dropped before the thread is joined: the end of the commands is the end of the runtime.
    commands: Option<mpsc::UnboundedSender<Command>>,
    thread: Option<JoinHandle<()>>,
}

type Respond = dyn Fn(&Recorded) -> Answer + Send + Sync;

struct Shared {
    mode: watch::Sender<Mode>,
    log: Mutex<Log>,
    grown: Condvar,
    respond: Box<Respond>,
}

#[derive(Default)]
struct Log {
    requests: Vec<Recorded>,
    subscribers: Vec<mpsc::UnboundedSender<Recorded>>,
}

/// Opens or closes the listener and says when that is done.
enum Command {
    Open(std_mpsc::Sender<()>),
    Close(std_mpsc::Sender<()>),
}

impl HttpServer {
    /// Starts in a namespace; port 0 lets the kernel choose.
    pub fn start(
        netns: &Netns,
        listen: SocketAddr,
        respond: impl Fn(&Recorded) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let listener = netns.enter(|| connection::listen(listen));
        let listener = listener.unwrap_or_else(|e| panic!("listen on {listen} in {}: {e}", netns.name()));
        let address = listener.local_addr().unwrap_or_else(|e| panic!("address of a listener: {e}"));
        let shared = Arc::new(Shared {
            mode: watch::Sender::new(Mode::Serve),
            log: Mutex::default(),
            grown: Condvar::new(),
            respond: Box::new(respond),
        });
        let (commands, inbox) = mpsc::unbounded_channel();
        // The runtime's thread stays inside, so that a reopened listener is in the same namespace.
        let thread = netns.enter(|| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                let runtime = runtime::Builder::new_current_thread().enable_all().build();
                let runtime = runtime.unwrap_or_else(|e| panic!("start a runtime: {e}"));
                runtime.block_on(connection::serve(listener, address, &shared, inbox));
            })
        });
        Self { address, shared, commands: Some(commands), thread: Some(thread) }
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes the mode; in force when this returns. Held requests go on in the new mode.
    pub fn set_mode(&self, mode: Mode) {
        let (done, is_done) = std_mpsc::channel();
        let command = if matches!(mode, Mode::Refuse) { Command::Close(done) } else { Command::Open(done) };
        self.shared.mode.send_replace(mode);
        let commands = self.commands.as_ref().unwrap_or_else(|| unreachable!("taken on drop only"));
        let obeyed = commands.send(command).is_ok() && is_done.recv_timeout(PATIENCE).is_ok();
        assert!(obeyed, "the server on {} has died", self.address);
    }

    /// What arrived so far.
    #[must_use]
    pub fn requests(&self) -> Vec<Recorded> {
        self.shared.log().requests.clone()
    }

    /// Forgets what arrived so far.
    pub fn forget(&self) {
        self.shared.log().requests.clear();
    }

    /// Waits until `count` requests have arrived and returns all there are.
    pub fn wait_for(&self, count: usize, deadline: Duration) -> Vec<Recorded> {
        let (log, timeout) = self
            .shared
            .grown
            .wait_timeout_while(self.shared.log(), deadline, |log| log.requests.len() < count)
            .unwrap_or_else(PoisonError::into_inner);
        assert!(!timeout.timed_out(), "{} of {count} requests after {deadline:?}", log.requests.len());
        log.requests.clone()
    }

    /// Every request from now on.
    #[must_use]
    pub fn subscribe(&self) -> mpsc::UnboundedReceiver<Recorded> {
        let (sender, receiver) = mpsc::unbounded_channel();
        self.shared.log().subscribers.push(sender);
        receiver
    }
}

impl fmt::Debug for HttpServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpServer").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        self.commands = None;
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            eprintln!("the server on {} panicked", self.address);
        }
    }
}

impl Shared {
    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn record(&self, request: Recorded) {
        let mut log = self.log();
        log.subscribers.retain(|subscriber| subscriber.send(request.clone()).is_ok());
        log.requests.push(request);
        drop(log);
        self.grown.notify_all();
    }
}
