//! A stand-in for the socket of Neutron's metadata agent: a unix socket with an accept queue of
//! five connections. It handles one request at a time, reads each with a single `recv(4096)` and
//! closes the connection after the response (neutron/common/metadata.py and `socketserver` below
//! it).

use std::fmt;
use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use socket2::{Domain, SockAddr, Socket, Type};

use crate::http_server::Answer;

pub mod cleanup;
mod original;
mod ovn;
mod script;

pub use original::OriginalAgent;
pub use ovn::{OvnAgent, OvnRelease};

/// `request_queue_size` of `socketserver`.
const BACKLOG: i32 = 5;
/// The size of the single `recv`.
const RECV: usize = 4096;

/// A request as read by its single `recv`.
#[derive(Clone, Debug)]
pub struct ReadRequest {
    pub line: String,
    /// The headers, sorted, with names in lower case.
    pub headers: Vec<(String, String)>,
    /// The part of the body that the `recv` read.
    pub body: Vec<u8>,
}

impl ReadRequest {
    fn parse(bytes: &[u8]) -> Self {
        let text = String::from_utf8_lossy(bytes);
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("incomplete head: {text:?}"));
        let mut lines = head.lines();
        let line =
            lines.next().and_then(|line| line.strip_suffix(" HTTP/1.1")).unwrap_or_default().to_owned();
        let header = |line: &str| {
            let (name, value) = line.split_once(':').unwrap_or_else(|| panic!("invalid header: {line:?}"));
            (name.to_lowercase(), value.trim().to_owned())
        };
        let mut headers: Vec<_> = lines.map(header).collect();
        headers.sort();
        Self { line, headers, body: body.as_bytes().to_vec() }
    }

    /// Returns the value of a header.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(have, _)| have == name).map(|(_, value)| value.as_str())
    }
}

/// A running stand-in.
pub struct NeutronAgent {
    path: PathBuf,
    asked: Arc<Mutex<Vec<ReadRequest>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl NeutronAgent {
    /// Listens at this path. `respond` chooses each response.
    #[must_use]
    pub fn start(path: &Path, respond: impl Fn(&ReadRequest) -> Answer + Send + 'static) -> Self {
        let listener = listen(path);
        let (asked, stop) = (Arc::<Mutex<Vec<ReadRequest>>>::default(), Arc::new(AtomicBool::new(false)));
        let (log, stopped) = (Arc::clone(&asked), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                if stopped.load(Ordering::Acquire) {
                    return;
                }
                serve(stream, &log, &respond);
            }
        });
        Self { path: path.to_owned(), asked, stop, thread: Some(thread) }
    }

    /// Returns the requests up to now.
    #[must_use]
    pub fn requests(&self) -> Vec<ReadRequest> {
        lock(&self.asked).clone()
    }
}

impl fmt::Debug for NeutronAgent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NeutronAgent").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Drop for NeutronAgent {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // Wakes the thread from `accept`.
        drop(UnixStream::connect(&self.path));
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            eprintln!("the stand-in for Neutron's metadata agent panicked");
        }
        if let Err(e) = std::fs::remove_file(&self.path) {
            eprintln!("remove {}: {e}", self.path.display());
        }
    }
}

fn listen(path: &Path) -> UnixListener {
    let bound = Socket::new(Domain::UNIX, Type::STREAM, None).and_then(|socket| {
        socket.bind(&SockAddr::unix(path)?)?;
        socket.listen(BACKLOG)?;
        Ok(UnixListener::from(std::os::fd::OwnedFd::from(socket)))
    });
    bound.unwrap_or_else(|e| panic!("listen on {}: {e}", path.display()))
}

fn serve(mut stream: UnixStream, log: &Mutex<Vec<ReadRequest>>, respond: &impl Fn(&ReadRequest) -> Answer) {
    let mut buffer = [0; RECV];
    let Ok(read @ 1..) = stream.read(&mut buffer) else { return };
    let asked = ReadRequest::parse(&buffer[..read]);
    let answer = respond(&asked);
    lock(log).push(asked);
    let mut text = format!("HTTP/1.0 {} X\r\nContent-Length: {}\r\n", answer.status, answer.body.len());
    for (name, value) in &answer.headers {
        text.extend([name, ": ", value, "\r\n"]);
    }
    text.push_str("\r\n");
    // The client may have disconnected.
    drop(stream.write_all(&[text.as_bytes(), &answer.body].concat()));
}

fn lock(log: &Mutex<Vec<ReadRequest>>) -> MutexGuard<'_, Vec<ReadRequest>> {
    log.lock().unwrap_or_else(PoisonError::into_inner)
}
