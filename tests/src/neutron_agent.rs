//! A stand-in for Neutron's metadata agent, as those who forward to it meet it: a unix socket with an accept queue of five
//! connections, one request at a time, each read by a single `recv(4096)` and answered on a connection that is closed then
//! (neutron/common/metadata.py and the `socketserver` under it).

use std::fmt;
use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use socket2::{Domain, SockAddr, Socket, Type};

use crate::http_server::Answer;

mod original;
mod ovn;
mod script;

pub use original::OriginalAgent;
pub use ovn::{OvnAgent, OvnRelease};

/// `request_queue_size` of `socketserver`.
const BACKLOG: i32 = 5;
/// What one `recv` reads.
const RECV: usize = 4096;

/// A request as its one `recv` showed it.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Method and target.
    pub line: String,
    /// Names in lower case with their values, in order of names.
    pub headers: Vec<(String, String)>,
    /// What of the body came along.
    pub body: Vec<u8>,
}

impl Asked {
    fn parse(bytes: &[u8]) -> Self {
        let text = String::from_utf8_lossy(bytes);
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("half a head: {text:?}"));
        let mut lines = head.lines();
        let line =
            lines.next().and_then(|line| line.strip_suffix(" HTTP/1.1")).unwrap_or_default().to_owned();
        let header = |line: &str| {
            let (name, value) = line.split_once(':').unwrap_or_else(|| panic!("no header: {line:?}"));
            (name.to_lowercase(), value.trim().to_owned())
        };
        let mut headers: Vec<_> = lines.map(header).collect();
        headers.sort();
        Self { line, headers, body: body.as_bytes().to_vec() }
    }

    /// The value of a header.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(have, _)| have == name).map(|(_, value)| value.as_str())
    }
}

/// A running stand-in.
pub struct NeutronAgent {
    path: PathBuf,
    asked: Arc<Mutex<Vec<Asked>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl NeutronAgent {
    /// Listens at this path; `respond` decides about each answer.
    #[must_use]
    pub fn start(path: &Path, respond: impl Fn(&Asked) -> Answer + Send + 'static) -> Self {
        let listener = listen(path);
        let (asked, stop) = (Arc::<Mutex<Vec<Asked>>>::default(), Arc::new(AtomicBool::new(false)));
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

    /// What it was asked so far.
    #[must_use]
    pub fn asked(&self) -> Vec<Asked> {
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
        // Wakes it from `accept`.
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

fn serve(mut stream: UnixStream, log: &Mutex<Vec<Asked>>, respond: &impl Fn(&Asked) -> Answer) {
    let mut buffer = [0; RECV];
    let Ok(read @ 1..) = stream.read(&mut buffer) else { return };
    let asked = Asked::parse(&buffer[..read]);
    let answer = respond(&asked);
    lock(log).push(asked);
    let mut text = format!("HTTP/1.0 {} X\r\nContent-Length: {}\r\n", answer.status, answer.body.len());
    for (name, value) in &answer.headers {
        text.extend([name, ": ", value, "\r\n"]);
    }
    text.push_str("\r\n");
    // Whoever asked may be gone.
    drop(stream.write_all(&[text.as_bytes(), &answer.body].concat()));
}

fn lock(log: &Mutex<Vec<Asked>>) -> MutexGuard<'_, Vec<Asked>> {
    log.lock().unwrap_or_else(PoisonError::into_inner)
}
