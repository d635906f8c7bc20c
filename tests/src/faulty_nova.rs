//! Servers in Nova's place that break the rules of HTTP. A proxy that shares their connections
//! among guests would give one guest's bytes to another.
//!
//! Each answer names the instance of the request and its path, so that an answer in the wrong place
//! shows. Requests whose path begins with [`ATTACK`] are the attacker's.

use std::collections::HashSet;
use std::net::{Ipv4Addr, SocketAddr, TcpListener as StdListener};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::OwnedWriteHalf;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime;
use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep;

use crate::netns::Netns;

/// The prefix of the paths that an attacker requests.
pub const ATTACK: &str = "/attack";

/// How long after the first answer each second one follows, in turn.
const LATE: [Duration; 4] =
    [Duration::ZERO, Duration::from_micros(300), Duration::from_millis(2), Duration::from_millis(20)];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Never reads a body, and takes its bytes for the next request. Ignores `Connection: close`.
    LeavesBodiesUnread,
    /// Sends a second answer to each request of the attacker, a little later.
    AnswersLate,
    /// Sends the first answer to each instance twice, in one segment.
    AnswersTwice,
}

/// State that the connections of one server share.
#[derive(Debug)]
struct Shared {
    fault: Fault,
    /// The instances that were answered twice.
    answered_twice: Mutex<HashSet<String>>,
    /// Requests on a connection that had carried one before.
    reuses: AtomicU64,
}

/// A running server. It stops when it is dropped.
#[derive(Debug)]
pub struct FaultyNova {
    address: SocketAddr,
    shared: Arc<Shared>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl FaultyNova {
    /// Starts on a port of 127.0.0.1 in this namespace.
    #[must_use]
    pub fn start(netns: &Netns, fault: Fault) -> Self {
        let listener = netns.enter(|| StdListener::bind((Ipv4Addr::LOCALHOST, 0)));
        let listener = listener.unwrap_or_else(|e| panic!("listen in {}: {e}", netns.name()));
        let address = listener.local_addr().unwrap_or_else(|e| panic!("address of a listener: {e}"));
        listener.set_nonblocking(true).unwrap_or_else(|e| panic!("prepare a listener: {e}"));
        let shared = Arc::new(Shared { fault, answered_twice: Mutex::default(), reuses: AtomicU64::new(0) });
        let state = Arc::clone(&shared);
        let (stop, stopped) = oneshot::channel();
        let thread = thread::spawn(move || {
            let runtime = runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.unwrap_or_else(|e| panic!("start a runtime: {e}"));
            runtime.block_on(async {
                tokio::select! {
                    () = accept(listener, state) => {}
                    _ = stopped => {}
                }
            });
        });
        Self { address, shared, stop: Some(stop), thread: Some(thread) }
    }

    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns the number of requests on a connection that had carried one before.
    #[must_use]
    pub fn reuses(&self) -> u64 {
        self.shared.reuses.load(Ordering::Relaxed)
    }

    /// Returns the body of the answer to a request for `path` on behalf of `instance`.
    #[must_use]
    pub fn document(instance: &str, path: &str) -> String {
        format!("{instance} {path}\n")
    }
}

impl Drop for FaultyNova {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been printed.
            drop(thread.join());
        }
    }
}

async fn accept(listener: StdListener, shared: Arc<Shared>) {
    let listener = TcpListener::from_std(listener).unwrap_or_else(|e| panic!("adopt a listener: {e}"));
    while let Ok((stream, _)) = listener.accept().await {
        tokio::spawn(converse(stream, Arc::clone(&shared)));
    }
}

/// Serves one connection until the client closes it.
async fn converse(stream: TcpStream, shared: Arc<Shared>) {
    let fault = shared.fault;
    // A second answer must not wait for the acknowledgement of the first.
    stream.set_nodelay(true).unwrap_or_else(|e| panic!("set TCP_NODELAY: {e}"));
    let (mut from_client, to_client) = stream.into_split();
    let (answers, queue) = mpsc::unbounded_channel();
    tokio::spawn(write(to_client, queue));
    let mut buffer = Vec::new();
    let mut delays = LATE.iter().cycle();
    for number in 0_u64.. {
        // Read the head of a request.
        let head = loop {
            if let Some(end) = buffer.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
                let head: Vec<u8> = buffer.drain(..end + 4).collect();
                break Head::parse(&head);
            }
            if !matches!(from_client.read_buf(&mut buffer).await, Ok(1..)) {
                return;
            }
        };

        // Read its body, or do not.
        if fault != Fault::LeavesBodiesUnread {
            while buffer.len() < head.length {
                if !matches!(from_client.read_buf(&mut buffer).await, Ok(1..)) {
                    return;
                }
            }
            buffer.drain(..head.length);
        }

        // Answer once, or more often.
        shared.reuses.fetch_add(u64::from(number > 0), Ordering::Relaxed);
        let answer = head.answer();
        let is_repeated = fault == Fault::AnswersTwice && shared.is_first_answer(&head.instance);
        let bytes = if is_repeated { answer.repeat(2) } else { answer.clone() };
        if answers.send(bytes).is_err() {
            return;
        }
        if fault == Fault::AnswersLate && head.path.starts_with(ATTACK) {
            let (answers, delay) = (answers.clone(), *delays.next().unwrap_or(&Duration::ZERO));
            tokio::spawn(async move {
                sleep(delay).await;
                // The client may have closed meanwhile.
                let _ = answers.send(answer);
            });
        }
    }
}

impl Shared {
    fn is_first_answer(&self, instance: &str) -> bool {
        let mut answered = self.answered_twice.lock().unwrap_or_else(PoisonError::into_inner);
        answered.insert(instance.to_owned())
    }
}

async fn write(mut to_client: OwnedWriteHalf, mut queue: mpsc::UnboundedReceiver<Vec<u8>>) {
    while let Some(bytes) = queue.recv().await {
        if to_client.write_all(&bytes).await.is_err() {
            return;
        }
    }
}

struct Head {
    path: String,
    instance: String,
    length: usize,
}

impl Head {
    /// Reads what it can. An attacker's bytes need not be a request.
    fn parse(head: &[u8]) -> Self {
        let text = String::from_utf8_lossy(head);
        // The first of several headers counts, because the attacker's half request comes first.
        let header = |name: &str| {
            text.lines().skip(1).find_map(|line| {
                let (have, value) = line.split_once(':')?;
                have.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
            })
        };
        Self {
            path: text.split(' ').nth(1).unwrap_or_default().to_owned(),
            instance: header("x-instance-id").unwrap_or_default(),
            length: header("content-length").and_then(|length| length.parse().ok()).unwrap_or_default(),
        }
    }

    fn answer(&self) -> Vec<u8> {
        let body = FaultyNova::document(&self.instance, &self.path);
        format!("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\r\n{body}", body.len())
            .into_bytes()
    }
}
