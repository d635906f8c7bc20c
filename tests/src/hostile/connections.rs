//! Attacks with connections of a guest's own kernel.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::runtime::Builder;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::running::{LIMIT, Progress};
use crate::load::Style;
use crate::load::answer::Expected;
use crate::load::client::Client;

/// The pause before a closed connection is replaced.
const PAUSE: Duration = Duration::from_millis(10);
/// The time after which a connection counts as in its place, whatever became of it.
const SETTLED: Duration = Duration::from_secs(5);
/// The bytes that a reader takes before it stops. They enlarge the socket buffers of both sides.
const READ_FIRST: usize = 8 << 20;
/// The requests that follow.
const PIPELINED: usize = 400;
/// The pace of a slow reader.
const SIP: usize = 1024;
const SIP_EACH: Duration = Duration::from_millis(100);
const POST: &str =
    "POST /openstack/latest/password HTTP/1.1\r\nHost: 169.254.169.254\r\nContent-Length: 1000\r\n";
const POST_EACH: Duration = Duration::from_millis(500);

/// The use that an attacker makes of a connection.
#[derive(Clone, Debug)]
pub(super) enum Behaviour {
    /// Sends nothing.
    Idle,
    /// Sends a request as soon as the previous one is answered.
    Busy(Arc<Expected>),
    /// Requests answers of this size and reads no more than the first ones.
    Unread { path: String, answer: usize },
    /// The same, but reads on slowly.
    Trickled { path: String, answer: usize },
    /// Sends a request with these further header lines, and its body byte by byte.
    SlowPost(&'static str),
}

/// Connections of one attacker. Those that the server closes are opened again.
#[derive(Clone, Debug)]
pub(super) struct Connections {
    pub target: SocketAddr,
    pub count: usize,
    pub behaviour: Behaviour,
}

/// A connection's contribution to the progress of the attack, which counts once.
struct Place {
    taken: AtomicBool,
    progress: Progress,
}

impl Place {
    fn take(&self) {
        if !self.taken.swap(true, Ordering::Relaxed) {
            self.progress.add(1);
        }
    }
}

impl Connections {
    /// Builds busy connections, whose correct responses have this body.
    pub fn busy(target: SocketAddr, count: usize, path: &str, body: Vec<u8>) -> Self {
        let expected = Expected::new(path, Style::KeepAlive, None, body);
        Self { target, count, behaviour: Behaviour::Busy(Arc::new(expected)) }
    }

    /// Keeps all connections until `stop`.
    pub fn run(&self, stop: &CancellationToken, progress: &Progress) {
        let runtime = Builder::new_current_thread().enable_all().build();
        let runtime = runtime.unwrap_or_else(|e| panic!("start a runtime: {e}"));
        runtime.block_on(async {
            let mut connections = JoinSet::new();
            for _ in 0..self.count {
                let place = Place { taken: AtomicBool::new(false), progress: progress.clone() };
                connections.spawn(self.clone().keep_one(place));
            }
            let all = async { while connections.join_next().await.is_some() {} };
            tokio::select! {
                () = stop.cancelled() => {}
                () = sleep(LIMIT) => {}
                () = all => unreachable!("connections are kept for ever"),
            }
        });
    }

    async fn keep_one(self, place: Place) {
        let settle = async {
            sleep(SETTLED).await;
            place.take();
        };
        tokio::join!(settle, self.keep_open(&place));
    }

    async fn keep_open(&self, place: &Place) {
        loop {
            // The attack goes on, however the server defends itself.
            let _: io::Result<Infallible> = match &self.behaviour {
                Behaviour::Idle => self.be_idle(place).await,
                Behaviour::Busy(expected) => self.be_busy(Arc::clone(expected), place).await,
                Behaviour::Unread { path, answer } => self.stop_reading(path, *answer, place).await,
                Behaviour::Trickled { path, answer } => self.read_slowly(path, *answer, place).await,
                Behaviour::SlowPost(lines) => self.post_slowly(lines, place).await,
            };
            sleep(PAUSE).await;
        }
    }

    async fn be_idle(&self, place: &Place) -> io::Result<Infallible> {
        let mut stream = TcpStream::connect(self.target).await?;
        place.take();
        stream.read_exact(&mut [0; 1024]).await?;
        Err(io::ErrorKind::InvalidData.into())
    }

    async fn be_busy(&self, expected: Arc<Expected>, place: &Place) -> io::Result<Infallible> {
        let mut client = Client::new(self.target, Style::KeepAlive, expected);
        loop {
            client.ask().await.map_err(|(failure, _)| io::Error::other(failure.to_string()))?;
            place.take();
        }
    }

    async fn stop_reading(&self, path: &str, answer: usize, place: &Place) -> io::Result<Infallible> {
        let stream = self.request_much(path, answer).await?;
        place.take();
        loop {
            // A reset is noticed although nothing is read.
            sleep(SETTLED).await;
            stream.peer_addr()?;
        }
    }

    async fn read_slowly(&self, path: &str, answer: usize, place: &Place) -> io::Result<Infallible> {
        let mut stream = self.request_much(path, answer).await?;
        place.take();
        loop {
            stream.read_exact(&mut [0; SIP]).await?;
            sleep(SIP_EACH).await;
        }
    }

    /// Reads some answers, then requests many more.
    async fn request_much(&self, path: &str, answer: usize) -> io::Result<TcpStream> {
        let request = format!("GET {path} HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n");
        let mut stream = TcpStream::connect(self.target).await?;
        stream.write_all(request.repeat(READ_FIRST / answer).as_bytes()).await?;
        let (mut buffer, mut left) = (vec![0; 1 << 16], READ_FIRST);
        while left > 0 {
            match stream.read(&mut buffer).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => left = left.saturating_sub(read),
            }
        }
        // A server that reads no more requests at this point is under attack all the same.
        let pipelined = request.repeat(PIPELINED);
        if let Ok(written) = timeout(SIP_EACH, stream.write_all(pipelined.as_bytes())).await {
            written?;
        }
        Ok(stream)
    }

    async fn post_slowly(&self, lines: &str, place: &Place) -> io::Result<Infallible> {
        let mut stream = TcpStream::connect(self.target).await?;
        stream.write_all(format!("{POST}{lines}\r\nx").as_bytes()).await?;
        place.take();
        let mut response = [0; 1024];
        loop {
            tokio::select! {
                // A response is no reason to stop.
                read = stream.read(&mut response) => {
                    if read? == 0 {
                        return Err(io::ErrorKind::ConnectionAborted.into());
                    }
                }
                () = sleep(POST_EACH) => stream.write_all(b"x").await?,
            }
        }
    }
}
