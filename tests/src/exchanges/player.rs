//! The side of a guest, or of its haproxy: plays exchanges on real connections.

use std::fmt;
use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use socket2::{Domain, SockAddr, Socket, Type};

use super::oracle::KnownGuest;
use super::received::{check_answers, check_owner, check_protocol, first_answer};
use super::{Ending, Exchange, Step, Violation};

/// Longer than any time-out of the agent in a fuzzer's run.
const PATIENCE: Duration = Duration::from_secs(20);
/// More than any exchange is answered with.
const MAX_RECEIVED: usize = 8 * 1024 * 1024;

/// The other end of a player's connections.
#[derive(Clone, Debug)]
pub enum Entrance {
    /// An address of the metadata service.
    Address(SocketAddr),
    /// The agent's socket for haproxies.
    Socket(PathBuf),
}

impl fmt::Display for Entrance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Socket(path) => path.display().fmt(f),
        }
    }
}

/// Plays exchanges. With an address, it must be used in the guest's namespace.
#[derive(Debug)]
pub struct Player<'a> {
    pub entrance: &'a Entrance,
    /// The guests whose requests are on the connection.
    pub clients: &'a [KnownGuest],
    pub others: &'a [KnownGuest],
    /// The other end is a haproxy, which answers some requests itself.
    pub is_before_haproxy: bool,
}

impl Player<'_> {
    /// Plays an exchange on a new connection.
    ///
    /// # Errors
    /// The answers are not those of the clients, not the expected ones, or do not end.
    pub fn play(&self, exchange: &Exchange) -> Result<(), Violation> {
        let stream = self.connect().map_err(|error| Violation(format!("no connection: {error}")))?;
        let mut conversation = Conversation { stream, received: Vec::new(), answered: 0 };
        let end = conversation.run(exchange);
        let received = &conversation.received;
        check_owner(received, self.clients, self.others)?;
        if !self.is_before_haproxy {
            check_protocol(received)?;
        }
        match (&exchange.expected, exchange.ending) {
            (Some(expected), Ending::Finish | Ending::Wait) => {
                end.map_err(|error| Violation(format!("the connection broke: {error}")))?;
                check_answers(received, expected, self.clients)
            }
            // A mutated request may be answered, rejected or reset, but not left hanging.
            (_, Ending::Finish | Ending::Wait) => match end {
                Err(error) if is_timeout(&error) => {
                    Err(Violation(format!("no end after {PATIENCE:?}: {}", received.escape_ascii())))
                }
                Ok(()) | Err(_) => Ok(()),
            },
            (_, Ending::Abandon | Ending::Reset) => Ok(()),
        }
    }

    fn connect(&self) -> io::Result<Socket> {
        let socket = match self.entrance {
            Entrance::Address(address) => {
                let socket = Socket::new(Domain::for_address(*address), Type::STREAM, None)?;
                socket.connect_timeout(&(*address).into(), PATIENCE)?;
                socket.set_tcp_nodelay(true)?;
                socket
            }
            Entrance::Socket(path) => {
                let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
                socket.connect(&SockAddr::unix(path)?)?;
                socket
            }
        };
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        Ok(socket)
    }
}

struct Conversation {
    stream: Socket,
    received: Vec<u8>,
    /// The end of the answers that were awaited.
    answered: usize,
}

impl Conversation {
    fn run(&mut self, exchange: &Exchange) -> io::Result<()> {
        let mut expected = exchange.expected.iter().flatten();
        for step in &exchange.steps {
            match step {
                // If the agent has closed, its answer says why.
                Step::Send(bytes) => {
                    if self.stream.write_all(bytes).is_err() {
                        break;
                    }
                }
                Step::Receive => {
                    let Some(next) = expected.next() else { continue };
                    self.receive(next.is_head)?;
                }
            }
        }
        match exchange.ending {
            Ending::Finish => {
                // Fails if the agent has closed.
                let _ = self.stream.shutdown(Shutdown::Write);
                self.read_to_end()
            }
            Ending::Wait => self.read_to_end(),
            Ending::Abandon => Ok(()),
            Ending::Reset => self.stream.set_linger(Some(Duration::ZERO)),
        }
    }

    fn receive(&mut self, is_head: bool) -> io::Result<()> {
        loop {
            if let Some((_, length)) = first_answer(&self.received[self.answered..], is_head) {
                self.answered += length;
                return Ok(());
            }
            if self.read()? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    fn read_to_end(&mut self) -> io::Result<()> {
        while self.read()? > 0 {
            if self.received.len() > MAX_RECEIVED {
                return Err(io::Error::other("the answer does not end"));
            }
        }
        Ok(())
    }

    fn read(&mut self) -> io::Result<usize> {
        let mut buffer = [0; 16 * 1024];
        let length = self.stream.read(&mut buffer)?;
        self.received.extend_from_slice(&buffer[..length]);
        Ok(length)
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}
