//! One connection of the load and its possible failures.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::Style;
use super::answer::Expected;

/// A request without a correct response.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Failure {
    /// The connection could not be established.
    Connect,
    /// The connection broke, or was closed before the response was complete.
    Broken,
    /// The status is not 200.
    Status,
    /// The length differs from the expected or announced one.
    Length,
    /// The bytes differ from the expected ones.
    Body,
    /// The server did not close the connection, although requested.
    NotClosed,
    /// No response arrived until long after the end of the load.
    NoAnswer,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connect => "no connection",
            Self::Broken => "broken connection",
            Self::Status => "other status",
            Self::Length => "other length",
            Self::Body => "other body",
            Self::NotClosed => "not closed",
            Self::NoAnswer => "no answer",
        })
    }
}

/// One connection at a time.
#[derive(Debug)]
pub(crate) struct Client {
    target: SocketAddr,
    style: Style,
    expected: Arc<Expected>,
    kept: Option<TcpStream>,
    buffer: Vec<u8>,
}

impl Client {
    pub fn new(target: SocketAddr, style: Style, expected: Arc<Expected>) -> Self {
        Self { target, style, expected, kept: None, buffer: Vec::new() }
    }

    /// Sends one request. Returns when the response was complete. A connection with a failure is
    /// given up.
    pub async fn ask(&mut self) -> Result<Instant, (Failure, Detail)> {
        let mut stream = match self.kept.take() {
            Some(stream) => stream,
            None => connect(self.target).await.map_err(|e| (Failure::Connect, e.into()))?,
        };
        self.exchange(&mut stream).await?;
        let finished = Instant::now();
        match self.style {
            Style::KeepAlive => self.kept = Some(stream),
            Style::NewConnection => wait_until_closed(&mut stream).await?,
        }
        Ok(finished)
    }

    async fn exchange(&mut self, stream: &mut TcpStream) -> Result<(), (Failure, Detail)> {
        stream.write_all(&self.expected.question).await.map_err(broken)?;
        self.buffer.clear();
        loop {
            if stream.read_buf(&mut self.buffer).await.map_err(broken)? == 0 {
                return Err((Failure::Broken, Detail::Read(self.buffer.clone())));
            }
            if let Some(verdict) = self.expected.judge(&self.buffer) {
                return verdict.map_err(|failure| (failure, Detail::Read(self.buffer.clone())));
            }
        }
    }
}

async fn connect(target: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(target).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Waits for the server to close first, so that this side does not run out of ports in TIME-WAIT.
async fn wait_until_closed(stream: &mut TcpStream) -> Result<(), (Failure, Detail)> {
    let mut more = [0; 64];
    match stream.read(&mut more).await.map_err(broken)? {
        0 => Ok(()),
        read => Err((Failure::NotClosed, Detail::Read(more[..read].to_vec()))),
    }
}

fn broken(error: io::Error) -> (Failure, Detail) {
    (Failure::Broken, error.into())
}

/// The details of a failure.
#[derive(Debug)]
pub(crate) enum Detail {
    Io(io::Error),
    Read(Vec<u8>),
}

impl From<io::Error> for Detail {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl fmt::Display for Detail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(error) => error.fmt(f),
            Self::Read(bytes) => write!(f, "read {:?}", String::from_utf8_lossy(bytes)),
        }
    }
}
