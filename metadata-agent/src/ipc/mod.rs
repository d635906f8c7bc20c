//! Messages between the agent's processes, over one unix socket that the child inherits.
//!
//! A frame is the length of its body in 4 bytes (big-endian), the number of descriptors that came
//! with it in 1 byte, and a body in postcard's format. Both ends are the same program, so there is
//! no version. A reader limits the length, because its peer may be in the hands of a guest.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd as _, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::Interest;
use tokio::net::UnixStream;

use crate::sys;

/// Length of a frame's head.
const HEAD: usize = 5;

/// Most bytes to read at once.
const READ: usize = 64 * 1024;

/// The other process broke the protocol, or has ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IpcError {
    #[error("cannot send: {0}")]
    Send(Errno),
    #[error("cannot receive: {0}")]
    Receive(Errno),
    #[error("cannot set up the socket: {0}")]
    SetUp(io::Error),
    #[error("a message has {length} bytes; at most {limit} are allowed")]
    TooLong { length: usize, limit: usize },
    #[error("a message cannot be read: {0}")]
    Malformed(postcard::Error),
    #[error("a message cannot be written: {0}")]
    Unwritable(postcard::Error),
    #[error("a message lacks a descriptor")]
    NoDescriptor,
    #[error("the other process has ended")]
    Ended,
}

/// A message, and the descriptors that belong to it.
#[derive(Debug)]
pub(crate) struct Message<T> {
    pub(crate) body: T,
    pub(crate) descriptors: VecDeque<OwnedFd>,
}

impl<T> Message<T> {
    pub(crate) fn new(body: T, descriptors: impl IntoIterator<Item = OwnedFd>) -> Self {
        Self { body, descriptors: descriptors.into_iter().collect() }
    }

    /// Takes the next descriptor.
    ///
    /// # Errors
    /// There is none.
    pub(crate) fn descriptor(&mut self) -> Result<OwnedFd, IpcError> {
        self.descriptors.pop_front().ok_or(IpcError::NoDescriptor)
    }
}

/// One end of the socket, before it is in use.
#[derive(Debug)]
pub(crate) struct Connection {
    socket: net::UnixStream,
    frames: Frames,
}

impl Connection {
    /// Allows received messages of up to `limit` bytes.
    pub(crate) fn new(socket: net::UnixStream, limit: usize) -> Self {
        Self { socket, frames: Frames::new(limit) }
    }

    /// Receives a message, and blocks until it is there.
    ///
    /// # Errors
    /// Those of [`Receiver::receive`].
    pub(crate) fn receive_blocking<T: DeserializeOwned>(&mut self) -> Result<Message<T>, IpcError> {
        loop {
            if let Some(message) = self.frames.next()? {
                return Ok(message);
            }
            if self.frames.read(self.socket.as_fd()).map_err(IpcError::Receive)? == 0 {
                return Err(IpcError::Ended);
            }
        }
    }

    /// Splits the connection, on the runtime of the caller.
    ///
    /// # Errors
    /// The runtime cannot poll the socket.
    pub(crate) fn split(self) -> Result<(Sender, Receiver), IpcError> {
        let Self { socket, frames } = self;
        socket.set_nonblocking(true).map_err(IpcError::SetUp)?;
        let stream = Arc::new(UnixStream::from_std(socket).map_err(IpcError::SetUp)?);
        Ok((Sender(Arc::clone(&stream)), Receiver { stream, frames }))
    }
}

/// The sending half.
#[derive(Debug)]
pub(crate) struct Sender(Arc<UnixStream>);

impl Sender {
    /// Sends a message whole. Must not be cancelled.
    ///
    /// # Errors
    /// The other process has ended.
    pub(crate) async fn send<T: Serialize>(&mut self, message: &Message<T>) -> Result<(), IpcError> {
        let frame = frame(message)?;
        let mut descriptors: Vec<BorrowedFd<'_>> =
            message.descriptors.iter().map(|descriptor| descriptor.as_fd()).collect();
        let mut left = frame.as_slice();
        while !left.is_empty() {
            let sent = self.0.async_io(Interest::WRITABLE, || Ok(send(self.0.as_fd(), left, &descriptors)?));
            let sent = sent.await.map_err(|error| IpcError::Send(errno(&error)))?;
            // They travel with the first bytes.
            descriptors.clear();
            left = &left[sent..];
        }
        Ok(())
    }
}

/// The receiving half.
#[derive(Debug)]
pub(crate) struct Receiver {
    stream: Arc<UnixStream>,
    frames: Frames,
}

impl Receiver {
    /// Receives the next message. Cancelling the wait loses nothing.
    ///
    /// # Errors
    /// The other process has ended, or broke the protocol.
    pub(crate) async fn receive<T: DeserializeOwned>(&mut self) -> Result<Message<T>, IpcError> {
        loop {
            if let Some(message) = self.frames.next()? {
                return Ok(message);
            }
            let read = || Ok(self.frames.read(self.stream.as_fd())?);
            let read = self.stream.async_io(Interest::READABLE, read).await;
            if read.map_err(|error| IpcError::Receive(errno(&error)))? == 0 {
                return Err(IpcError::Ended);
            }
        }
    }
}

fn frame<T: Serialize>(message: &Message<T>) -> Result<Vec<u8>, IpcError> {
    let mut frame = postcard::to_extend(&message.body, vec![0; HEAD]).map_err(IpcError::Unwritable)?;
    let length = frame.len() - HEAD;
    let too_long = || IpcError::TooLong { length, limit: u32::MAX as usize };
    frame[..4].copy_from_slice(&u32::try_from(length).map_err(|_| too_long())?.to_be_bytes());
    frame[4] = u8::try_from(message.descriptors.len()).map_err(|_| too_long())?;
    Ok(frame)
}

fn send(socket: BorrowedFd<'_>, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
    let numbers: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&numbers)];
    let control = if numbers.is_empty() { &[][..] } else { &rights[..] };
    // The end of the other process is an error, not a signal.
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None)
}

fn errno(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

/// Bytes and descriptors that have arrived, as frames.
#[derive(Debug)]
struct Frames {
    limit: usize,
    bytes: Vec<u8>,
    descriptors: VecDeque<OwnedFd>,
}

impl Frames {
    fn new(limit: usize) -> Self {
        Self { limit, bytes: Vec::new(), descriptors: VecDeque::new() }
    }

    /// Reads what is there, or what a message still lacks if that is more.
    fn read(&mut self, socket: BorrowedFd<'_>) -> Result<usize, Errno> {
        let used = self.bytes.len();
        self.bytes.resize(used + READ, 0);
        let received = sys::receive(socket, &mut self.bytes[used..]);
        let length = received.as_ref().map_or(0, |(length, _)| *length);
        self.bytes.truncate(used + length);
        let (length, descriptors) = received?;
        self.descriptors.extend(descriptors);
        Ok(length)
    }

    fn next<T: DeserializeOwned>(&mut self) -> Result<Option<Message<T>>, IpcError> {
        let Some((head, rest)) = self.bytes.split_first_chunk::<HEAD>() else { return Ok(None) };
        let [a, b, c, d, count] = *head;
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        if length > self.limit {
            return Err(IpcError::TooLong { length, limit: self.limit });
        }
        let Some(body) = rest.get(..length) else { return Ok(None) };
        let body = postcard::from_bytes(body).map_err(IpcError::Malformed)?;
        let count = usize::from(count);
        if self.descriptors.len() < count {
            return Err(IpcError::NoDescriptor);
        }
        let descriptors = self.descriptors.drain(..count).collect();
        self.bytes.drain(..HEAD + length);
        Ok(Some(Message { body, descriptors }))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read as _, Seek as _, Write as _};

    use super::*;

    const LIMIT: usize = 1 << 20;

    fn connections() -> (Connection, Connection) {
        let (ours, theirs) = net::UnixStream::pair().unwrap();
        (Connection::new(ours, LIMIT), Connection::new(theirs, LIMIT))
    }

    fn file(text: &str) -> OwnedFd {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file.rewind().unwrap();
        file.into()
    }

    fn text(descriptor: OwnedFd) -> String {
        let mut text = String::new();
        File::from(descriptor).read_to_string(&mut text).unwrap();
        text
    }

    #[tokio::test]
    async fn messages_arrive_whole_in_order_with_their_descriptors() {
        let (ours, theirs) = connections();
        let (mut sender, _) = ours.split().unwrap();
        let (_, mut receiver) = theirs.split().unwrap();
        // Longer than the socket's buffer.
        let long = "x".repeat(LIMIT - 10);
        let sending = async {
            sender.send(&Message::new("a", [])).await.unwrap();
            sender.send(&Message::new("b", [file("one"), file("two")])).await.unwrap();
            sender.send(&Message::new(long.as_str(), [file("three")])).await.unwrap();
            sender.send(&Message::new("d", [])).await.unwrap();
        };
        let receiving = async {
            let mut all = Vec::new();
            for _ in 0..4 {
                let Message { body, descriptors } = receiver.receive::<String>().await.unwrap();
                all.push((body, descriptors.into_iter().map(text).collect::<Vec<_>>()));
            }
            all
        };
        let ((), arrived) = tokio::join!(sending, receiving);
        let want: [(&str, &[&str]); 4] =
            [("a", &[]), ("b", &["one", "two"]), (&long, &["three"]), ("d", &[])];
        for ((body, files), (want, want_files)) in arrived.iter().zip(want) {
            assert!(body == want && files == want_files, "{files:?} {want_files:?}");
        }
    }

    #[tokio::test]
    async fn a_message_that_is_too_long_is_refused_before_it_arrives() {
        let (ours, theirs) = connections();
        (&ours.socket).write_all(&[0, 0x10, 0, 1, 0]).unwrap();
        let (_, mut receiver) = theirs.split().unwrap();
        let error = receiver.receive::<String>().await.unwrap_err();
        assert!(
            matches!(error, IpcError::TooLong { length, limit: LIMIT } if length == LIMIT + 1),
            "{error}"
        );
    }

    #[tokio::test]
    async fn malformed_messages_and_missing_descriptors_are_errors() {
        for (bytes, want) in
            [(&[0, 0, 0, 1, 0, 9][..], "cannot be read"), (&[0, 0, 0, 1, 1, 0], "lacks a descriptor")]
        {
            let (ours, theirs) = connections();
            (&ours.socket).write_all(bytes).unwrap();
            let (_, mut receiver) = theirs.split().unwrap();
            let error = receiver.receive::<String>().await.unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        }
    }

    #[tokio::test]
    async fn messages_are_received_before_and_after_the_split() {
        let (ours, mut theirs) = connections();
        let (mut sender, ours_received) = ours.split().unwrap();
        sender.send(&Message::new("a", [file("one")])).await.unwrap();
        sender.send(&Message::new("b", [])).await.unwrap();
        let mut message: Message<String> = theirs.receive_blocking().unwrap();
        let file = message.descriptor().unwrap();
        assert_eq!((message.body.as_str(), text(file)), ("a", "one".to_owned()));
        assert!(matches!(message.descriptor(), Err(IpcError::NoDescriptor)));
        let (_, mut receiver) = theirs.split().unwrap();
        assert_eq!(receiver.receive::<String>().await.unwrap().body, "b");
        drop((sender, ours_received));
        assert!(matches!(receiver.receive::<String>().await, Err(IpcError::Ended)));
    }
}
