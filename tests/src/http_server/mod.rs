//! An HTTP server in a namespace that records its requests and fails on demand.
//!
//! It runs a current-thread runtime on one thread until the value is dropped. A function of the
//! recorded request decides the response. The [`Mode`] decides everything else and can be changed
//! by a test at any time.

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc as std_mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use hyper::body::Bytes;
use tokio::runtime;
use tokio::sync::{Semaphore, mpsc, watch};

use crate::netns::Netns;
use crate::wait::PATIENCE;

mod connection;

#[derive(Clone, Debug)]
pub struct Recorded {
    /// The number of its connection, from 0.
    pub connection: u64,
    pub peer: SocketAddr,
    pub method: String,
    /// The request target, undecoded, with its query.
    pub path: String,
    /// The headers in order, with names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body without its framing.
    pub body: Bytes,
}

impl Recorded {
    /// Returns all values of this header, joined as by a WSGI server.
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

/// A response. `Content-Length` and `Date` are added.
#[derive(Clone, Debug)]
pub struct Answer {
    /// [`Answer::NONE`] closes the connection instead.
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Bytes,
}

impl Answer {
    pub const NONE: u16 = 0;

    /// Closes the connection without a response, as uWSGI does after an error of its application.
    #[must_use]
    pub fn none() -> Self {
        Self { status: Self::NONE, headers: Vec::new(), body: Bytes::new() }
    }

    /// Builds a response with one `Content-Type`.
    #[must_use]
    pub fn new(status: u16, content_type: &str, body: impl Into<Bytes>) -> Self {
        let headers = vec![("content-type".to_owned(), content_type.to_owned())];
        Self { status, headers, body: body.into() }
    }

    /// Builds a text response with Nova's content type.
    #[must_use]
    pub fn text(status: u16, text: &str) -> Self {
        Self::new(status, "text/plain; charset=UTF-8", text.to_owned())
    }

    #[must_use]
    pub fn redirect(location: &str) -> Self {
        let headers = vec![("location".to_owned(), location.to_owned())];
        Self { status: 302, headers, body: Bytes::new() }
    }
}

/// The behaviour of the server.
#[derive(Clone, Debug)]
pub enum Mode {
    /// Responds.
    Serve,
    /// Is down: the listener and all connections are closed.
    Refuse,
    /// Accepts and records requests, but responds only once the mode has changed.
    Hold,
    /// Holds requests for this path and responds to all others.
    HoldPath(&'static str),
    /// Responds as slowly as a service with few workers.
    Paced(Pace),
    /// Sends the head and half of the body, then resets the connection.
    ResetMidBody,
    /// Sends this response to every request.
    Fixed(Answer),
    /// Sends these bytes to every request at once, unrecorded; for benches.
    Static(Bytes),
}

/// The capacity of a service: a number of workers, each of which takes the same time for a request.
/// Requests are served in the order of their arrival.
#[derive(Clone, Debug)]
pub struct Pace {
    workers: Arc<Semaphore>,
    each: Duration,
}

impl Pace {
    #[must_use]
    pub fn new(workers: usize, each: Duration) -> Self {
        Self { workers: Arc::new(Semaphore::new(workers)), each }
    }

    /// Waits for a worker and its work.
    async fn work(&self) {
        let worker = self.workers.acquire().await;
        tokio::time::sleep(self.each).await;
        drop(worker);
    }
}

impl Mode {
    fn holds(&self, request: &Recorded) -> bool {
        match self {
            Self::Hold => true,
            Self::HoldPath(path) => request.path == *path,
            Self::Serve
            | Self::Paced(_)
            | Self::Refuse
            | Self::ResetMidBody
            | Self::Fixed(_)
            | Self::Static(_) => false,
        }
    }
}

pub struct HttpServer {
    address: SocketAddr,
    shared: Arc<Shared>,
    // Dropped before the thread is joined, because the runtime ends when this channel closes.
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

/// Opens or closes the listener and signals completion.
enum Command {
    Open(std_mpsc::Sender<()>),
    Close(std_mpsc::Sender<()>),
}

impl HttpServer {
    /// Starts in a namespace. With port 0 the kernel chooses a port.
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
        // The runtime's thread stays in the namespace, so that a reopened listener is in it as
        // well.
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

    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes the mode. It is in force on return. Held requests continue in the new mode.
    pub fn set_mode(&self, mode: Mode) {
        let (done, is_done) = std_mpsc::channel();
        let command = if matches!(mode, Mode::Refuse) { Command::Close(done) } else { Command::Open(done) };
        self.shared.mode.send_replace(mode);
        let commands = self.commands.as_ref().unwrap_or_else(|| unreachable!("taken on drop only"));
        let obeyed = commands.send(command).is_ok() && is_done.recv_timeout(PATIENCE).is_ok();
        assert!(obeyed, "the server on {} has died", self.address);
    }

    /// Returns the requests up to now.
    #[must_use]
    pub fn requests(&self) -> Vec<Recorded> {
        self.shared.log().requests.clone()
    }

    /// Forgets the requests up to now.
    pub fn forget(&self) {
        self.shared.log().requests.clear();
    }

    /// Waits until `count` requests have arrived and returns all requests.
    pub fn wait_for(&self, count: usize, deadline: Duration) -> Vec<Recorded> {
        let (log, timeout) = self
            .shared
            .grown
            .wait_timeout_while(self.shared.log(), deadline, |log| log.requests.len() < count)
            .unwrap_or_else(PoisonError::into_inner);
        assert!(!timeout.timed_out(), "{} of {count} requests after {deadline:?}", log.requests.len());
        log.requests.clone()
    }

    /// Subscribes to all future requests.
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
