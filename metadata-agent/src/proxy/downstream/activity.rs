//! Tracks the activity of a client connection, for its time-outs.
//!
//! A guest that reads too slowly is treated like one that does not read. For each millisecond for
//! which its connection is blocked, it owes [`MIN_RATE`] bytes. So a guest that trickles cannot
//! hold its buffers for much longer than one that stops.
//!
//! hyper has one time-out for idle time and request head together, allocates a timer for each head,
//! and has no time-out for a guest that does not read. So the stream and the request record mark
//! what happens here, and [`connection`](super::connection) checks it with one timer per
//! connection. A request needs neither an allocation nor a timer.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use std::{cmp, io};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use super::request_line::FragmentDetector;
use crate::proxy::large_buffers::{GuestPlaces, LARGE_IDLE, LARGE_SEND_BUFFER, Place, SendBuffer};

/// Bytes per millisecond that a guest must read of its responses while its connection is blocked.
const MIN_RATE: u64 = 16;

/// Pause between two checks of a connection whose time is nearly over.
const MIN_PAUSE: Duration = Duration::from_millis(50);

/// How long a connection may stay in each state.
#[derive(Debug, Clone, Copy)]
pub(super) struct Timeouts {
    pub(super) idle: Duration,
    pub(super) head: Duration,
    pub(super) blocked: Duration,
}

impl Timeouts {
    /// Returns the least time to any deadline of a new connection.
    pub(super) fn shortest(&self) -> Duration {
        self.idle.min(self.head).min(self.blocked)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TimeoutKind {
    /// No request arrived.
    Idle,
    /// A request head began and did not end.
    Head,
    /// The guest does not read its response, or too slowly.
    Blocked,
}

const BUSY: u64 = 0;
const IDLE: u64 = 1;
const HEAD: u64 = 2;
const PHASES: u64 = 4;
const NOT_BLOCKED: u64 = u64::MAX;

/// The state of one connection. Only the connection's own task writes it; atomics make it
/// shareable.
#[derive(Debug)]
pub(crate) struct ConnectionActivity {
    began: Instant,
    /// Milliseconds since `began`, times [`PHASES`], plus the phase.
    phase: AtomicU64,
    /// Milliseconds since `began` when the guest stopped reading.
    blocked: AtomicU64,
    /// Bytes that the guest should have read while it was blocked before, less those that it read.
    debt: AtomicU64,
    /// Bytes of a request may still arrive that will not be read.
    unread: AtomicBool,
    /// The last request line has a `#`.
    fragment: AtomicBool,
    /// The response is long, or the last one was.
    long: AtomicBool,
    /// The stream has a place for larger buffers.
    has_place: AtomicBool,
    /// The stream has taken that place a moment ago.
    took_place: AtomicBool,
}

impl ConnectionActivity {
    pub(super) fn new() -> Self {
        Self {
            began: Instant::now(),
            phase: AtomicU64::new(IDLE),
            blocked: AtomicU64::new(NOT_BLOCKED),
            debt: AtomicU64::new(0),
            unread: AtomicBool::new(false),
            fragment: AtomicBool::new(false),
            long: AtomicBool::new(false),
            has_place: AtomicBool::new(false),
            took_place: AtomicBool::new(false),
        }
    }

    /// Marks a complete request head. Idle and head time-outs stop until the response has been
    /// sent.
    pub(crate) fn set_busy(&self) {
        self.phase.store(BUSY, Ordering::Relaxed);
    }

    /// Marks that the response has been sent, so that the next request may arrive.
    pub(crate) fn set_idle(&self) {
        self.phase.store(self.now() * PHASES + IDLE, Ordering::Relaxed);
    }

    /// Marks that the guest takes a long response.
    pub(crate) fn set_long(&self) {
        self.long.store(true, Ordering::Relaxed);
    }

    /// Marks that a response was short.
    pub(crate) fn set_short(&self) {
        self.long.store(false, Ordering::Relaxed);
    }

    /// Returns whether the stream has larger buffers, and keeps them for this response.
    pub(crate) fn has_large_buffers(&self) -> bool {
        self.has_place.load(Ordering::Relaxed) && self.long.load(Ordering::Relaxed)
    }

    /// Returns whether the stream has taken a place since the last call.
    pub(super) fn has_taken_place(&self) -> bool {
        self.took_place.load(Ordering::Relaxed) && self.took_place.swap(false, Ordering::Relaxed)
    }

    /// Returns whether no request has come for as long as a place is kept.
    fn is_place_idle(&self) -> bool {
        let phase = self.phase.load(Ordering::Relaxed);
        let idle = Duration::from_millis(self.now().saturating_sub(phase / PHASES));
        phase % PHASES == IDLE && idle >= LARGE_IDLE
    }

    /// Marks that the request was answered before it was read to its end.
    pub(crate) fn set_request_unread(&self) {
        self.unread.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_request_unread(&self) -> bool {
        self.unread.load(Ordering::Relaxed)
    }

    /// Returns whether the current request line has a fragment, and resets the mark.
    pub(crate) fn take_fragment(&self) -> bool {
        self.fragment.load(Ordering::Relaxed) && self.fragment.swap(false, Ordering::Relaxed)
    }

    /// Returns the nearest deadline, if any is running.
    pub(super) fn deadline(&self, timeouts: &Timeouts) -> Option<(Instant, TimeoutKind)> {
        let at = |millis, limit| self.began + Duration::from_millis(millis) + limit;
        let phase = self.phase.load(Ordering::Relaxed);
        let waits = match phase % PHASES {
            IDLE => Some((at(phase / PHASES, timeouts.idle), TimeoutKind::Idle)),
            HEAD => Some((at(phase / PHASES, timeouts.head), TimeoutKind::Head)),
            _ => None,
        };
        let blocked = match self.blocked.load(Ordering::Relaxed) {
            NOT_BLOCKED => None,
            since => Some((at(since, self.patience(timeouts)), TimeoutKind::Blocked)),
        };
        match (waits, blocked) {
            (Some(waits), Some(blocked)) => Some(cmp::min_by_key(waits, blocked, |(at, _)| *at)),
            (waits, blocked) => waits.or(blocked),
        }
    }

    /// Returns the least time to any deadline that begins from now on.
    pub(super) fn pause(&self, timeouts: &Timeouts) -> Duration {
        let pause = timeouts.shortest().min(self.patience(timeouts).max(MIN_PAUSE));
        if self.has_place.load(Ordering::Relaxed) { pause.min(LARGE_IDLE) } else { pause }
    }

    /// Returns how long the guest may stop reading.
    fn patience(&self, timeouts: &Timeouts) -> Duration {
        let late = Duration::from_millis(self.debt.load(Ordering::Relaxed) / MIN_RATE);
        timeouts.blocked.saturating_sub(late)
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX / PHASES)
    }

    fn received(&self, detector: &mut FragmentDetector, bytes: &[u8]) {
        let phase = self.phase.load(Ordering::Relaxed) % PHASES;
        if phase == BUSY {
            return detector.skip();
        }
        if phase == IDLE {
            self.phase.store(self.now() * PHASES + HEAD, Ordering::Relaxed);
        }
        if detector.read(phase == IDLE, bytes) {
            self.fragment.store(true, Ordering::Relaxed);
        }
    }

    fn wrote(&self, result: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        let blocked = self.blocked.load(Ordering::Relaxed);
        match result {
            Poll::Pending if blocked == NOT_BLOCKED => self.blocked.store(self.now(), Ordering::Relaxed),
            Poll::Ready(Ok(bytes)) => {
                let mut debt = self.debt.load(Ordering::Relaxed);
                if blocked == NOT_BLOCKED && debt == 0 {
                    return result;
                }
                if blocked != NOT_BLOCKED {
                    self.blocked.store(NOT_BLOCKED, Ordering::Relaxed);
                    debt += self.now().saturating_sub(blocked) * MIN_RATE;
                }
                self.debt.store(debt.saturating_sub(bytes as u64), Ordering::Relaxed);
            }
            Poll::Ready(Err(_)) | Poll::Pending => {}
        }
        result
    }
}

/// A client stream that marks its activity, and has a larger buffer for long responses.
#[derive(Debug)]
pub(super) struct ActivityStream<T> {
    pub(super) stream: T,
    activity: Arc<ConnectionActivity>,
    detector: FragmentDetector,
    places: GuestPlaces,
    place: Option<Place>,
    /// Size of the send buffer before it was enlarged.
    usual_buffer: Option<usize>,
}

impl<T> ActivityStream<T> {
    pub(super) fn new(stream: T, activity: Arc<ConnectionActivity>, places: GuestPlaces) -> Self {
        let detector = FragmentDetector::default();
        Self { stream, activity, detector, places, place: None, usual_buffer: None }
    }
}

impl<T: SendBuffer> ActivityStream<T> {
    /// Enlarges the send buffer for a long response, and restores it after a short one.
    fn fit_buffer(&mut self) {
        let is_long = self.activity.long.load(Ordering::Relaxed);
        if is_long == self.usual_buffer.is_some() {
            return;
        }
        if self.usual_buffer.is_some() {
            return self.restore_buffer();
        }
        let Some(socket) = self.stream.socket() else { return };
        self.place = self.place.take().or_else(|| self.places.take());
        if self.place.is_some()
            && let Ok(doubled) = socket.send_buffer_size()
        {
            self.usual_buffer = Some(doubled / 2);
            let _still_usual = socket.set_send_buffer_size(LARGE_SEND_BUFFER);
            if !self.activity.has_place.swap(true, Ordering::Relaxed) {
                self.activity.took_place.store(true, Ordering::Relaxed);
            }
        }
    }

    fn restore_buffer(&mut self) {
        if let Some(usual) = self.usual_buffer.take()
            && let Some(socket) = self.stream.socket()
        {
            let _still_large = socket.set_send_buffer_size(usual);
        }
    }

    fn free_place(&mut self) {
        if self.place.take().is_some() {
            self.activity.has_place.store(false, Ordering::Relaxed);
        }
    }

    /// Frees the place of a connection that is idle, as far as the guest has read. hyper reads
    /// whenever its task runs, and [`connection`](super::connection) runs it in time.
    fn give_up_idle_place(&mut self) {
        if self.place.is_some() && self.activity.is_place_idle() {
            self.activity.set_short();
            self.restore_buffer();
            if self.stream.has_room() {
                self.free_place();
            }
        }
    }

    /// Frees the place once a write shows that what is left of a long response fits the usual
    /// buffer. Until then a guest could keep the rest of the response unread without a place.
    fn wrote(&mut self, result: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if self.usual_buffer.is_none() && matches!(result, Poll::Ready(Ok(1..))) {
            self.free_place();
        }
        self.activity.wrote(result)
    }
}

impl<T: AsyncRead + SendBuffer + Unpin> AsyncRead for ActivityStream<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.give_up_idle_place();
        let before = buf.filled().len();
        let Self { stream, activity, detector, .. } = &mut *self;
        let result = Pin::new(stream).poll_read(cx, buf);
        let new = &buf.filled()[before..];
        if !new.is_empty() {
            activity.received(detector, new);
        }
        result
    }
}

impl<T: AsyncWrite + SendBuffer + Unpin> AsyncWrite for ActivityStream<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.fit_buffer();
        let result = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.wrote(result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.fit_buffer();
        let result = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.wrote(result)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    /// Leaves the stream open. [`connection`](super::connection) closes it, and first looks at what
    /// the guest has received.
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::client::GuestKey;
    use crate::proxy::large_buffers::LargeBuffers;
    use metadata_ebpf::identity::AttachmentId;
    use socket2::SockRef;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpSocket, TcpStream};
    use tokio::time::timeout;

    impl SendBuffer for tokio::io::DuplexStream {}

    impl ConnectionActivity {
        /// Pretends that the connection became idle before this long.
        fn set_idle_since(&self, millis: u64) {
            self.phase.store((self.now() - millis) * PHASES + IDLE, Ordering::Relaxed);
        }
    }

    const TIMEOUTS: Timeouts = Timeouts {
        idle: Duration::from_secs(10),
        head: Duration::from_secs(20),
        blocked: Duration::from_secs(40),
    };

    #[tokio::test(start_paused = true)]
    async fn deadlines_follow_the_activity() {
        let activity = Arc::new(ConnectionActivity::new());
        let began = Instant::now();
        let second = Duration::from_secs;
        let (mut guest, ours) = tokio::io::duplex(4);
        let mut ours = ActivityStream::new(ours, Arc::clone(&activity), LargeBuffers::new().of_guest(None));
        assert_eq!(activity.deadline(&TIMEOUTS), Some((began + second(10), TimeoutKind::Idle)));

        // The time for the head begins with its first byte; more bytes do not renew it.
        for _ in 0..2 {
            tokio::time::advance(second(1)).await;
            guest.write_all(b"G").await.unwrap();
            ours.read_u8().await.unwrap();
            assert_eq!(activity.deadline(&TIMEOUTS), Some((began + second(21), TimeoutKind::Head)));
        }

        activity.set_busy();
        assert_eq!(activity.deadline(&TIMEOUTS), None);

        // A guest that does not read blocks the connection until it reads again.
        ours.write_all(b"full").await.unwrap();
        let (wrote, ()) = tokio::join!(ours.write_all(b"more"), async {
            assert_eq!(activity.deadline(&TIMEOUTS), Some((began + second(42), TimeoutKind::Blocked)));
            guest.read_exact(&mut [0; 8]).await.unwrap();
        });
        wrote.unwrap();
        assert_eq!(activity.deadline(&TIMEOUTS), None);

        activity.set_idle();
        assert_eq!(activity.deadline(&TIMEOUTS), Some((began + second(12), TimeoutKind::Idle)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_guest_that_trickles_is_as_late_as_one_that_stops() {
        let activity = Arc::new(ConnectionActivity::new());
        let (mut guest, ours) = tokio::io::duplex(1);
        let mut ours = ActivityStream::new(ours, Arc::clone(&activity), LargeBuffers::new().of_guest(None));
        activity.set_busy();
        ours.write_all(b"x").await.unwrap();
        // Ten seconds for each byte.
        for patience in [40, 30, 20, 10] {
            let blocked = Instant::now();
            let (wrote, ()) = tokio::join!(ours.write_all(b"x"), async {
                // One byte is less than a millisecond's worth.
                let deadline = blocked + Duration::from_secs(patience);
                let (at, kind) = activity.deadline(&TIMEOUTS).unwrap();
                assert_eq!(kind, TimeoutKind::Blocked);
                assert!(at >= deadline && at < deadline + MIN_PAUSE, "{:?}", at - blocked);
                tokio::time::advance(Duration::from_secs(10)).await;
                guest.read_u8().await.unwrap();
            });
            wrote.unwrap();
            let pause = activity.pause(&TIMEOUTS);
            assert!(pause <= Duration::from_secs(patience - 10) + MIN_PAUSE, "{pause:?}");
        }
        // A guest that reads on time makes up for it.
        let whole = vec![b'x'; 40_000 * 16];
        let read = async {
            for _ in 0..whole.len() {
                guest.read_u8().await.unwrap();
            }
        };
        let (wrote, ()) = tokio::join!(ours.write_all(&whole), read);
        wrote.unwrap();
        assert_eq!(activity.pause(&TIMEOUTS), TIMEOUTS.shortest());
    }

    /// Returns a guest, and the stream to it with its activity.
    async fn connected(places: &LargeBuffers) -> (TcpStream, ActivityStream<TcpStream>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let guest = TcpSocket::new_v4().unwrap().connect(listener.local_addr().unwrap()).await.unwrap();
        let (ours, _) = listener.accept().await.unwrap();
        SockRef::from(&ours).set_send_buffer_size(USUAL).unwrap();
        let places = places.of_guest(AttachmentId::new(1).map(GuestKey::Attachment));
        let began = Instant::now() - Duration::from_secs(10);
        let activity = ConnectionActivity { began, ..ConnectionActivity::new() };
        (guest, ActivityStream::new(ours, Arc::new(activity), places))
    }

    fn send_buffer(stream: &ActivityStream<TcpStream>) -> usize {
        SockRef::from(&stream.stream).send_buffer_size().unwrap() / 2
    }

    const USUAL: usize = 64 * 1024;

    #[tokio::test]
    async fn a_long_response_has_a_larger_buffer_while_there_is_a_place() {
        let places = LargeBuffers::with_places(1);
        let (mut guest, mut ours) = connected(&places).await;
        let (_other_guest, mut other) = connected(&places).await;
        for stream in [&mut ours, &mut other] {
            stream.write_all(b"short").await.unwrap();
            assert_eq!(send_buffer(stream), USUAL);
            stream.activity.set_long();
            stream.write_all(b"long").await.unwrap();
        }
        assert!(send_buffer(&ours) > USUAL && ours.activity.has_large_buffers());
        assert!(send_buffer(&other) == USUAL && !other.activity.has_large_buffers());

        // The next response may be long as well.
        ours.activity.set_idle();
        ours.activity.set_busy();
        ours.write_all(b"next").await.unwrap();
        assert!(send_buffer(&ours) > USUAL && ours.activity.has_large_buffers());

        // The guest stops reading, and the next response is short.
        let written = fill(&mut ours).await;
        ours.activity.set_short();
        ours.activity.set_idle();
        assert!(!ours.activity.has_large_buffers());
        assert!(timeout(Duration::from_millis(50), ours.write(b"next")).await.is_err());
        assert_eq!(send_buffer(&ours), USUAL);
        other.write_all(b"more").await.unwrap();
        assert_eq!(send_buffer(&other), USUAL, "the rest of the response still needs the place");

        guest.read_exact(&mut vec![0; "shortlongnext".len() + written]).await.unwrap();
        ours.write_all(b"next").await.unwrap();
        other.write_all(b"more").await.unwrap();
        assert!(send_buffer(&other) > USUAL, "the place is free");
    }

    #[tokio::test]
    async fn an_idle_connection_gives_its_place_back_once_it_was_read() {
        let places = LargeBuffers::with_places(1);
        let (mut guest, mut ours) = connected(&places).await;
        let (_other_guest, mut other) = connected(&places).await;
        ours.activity.set_busy();
        ours.activity.set_long();
        let written = fill(&mut ours).await;
        assert!(send_buffer(&ours) > USUAL && ours.activity.has_taken_place());
        assert!(!ours.activity.has_taken_place() && ours.activity.pause(&TIMEOUTS) <= LARGE_IDLE);
        ours.activity.set_idle();
        assert!(!is_read(&mut ours).await && ours.activity.has_large_buffers());

        // The guest has not read everything.
        ours.activity.set_idle_since(1000);
        assert!(!is_read(&mut ours).await && !ours.activity.has_large_buffers());
        assert_eq!(send_buffer(&ours), USUAL);
        assert!(ours.activity.pause(&TIMEOUTS) <= LARGE_IDLE, "it is looked at again");
        other.activity.set_long();
        other.write_all(b"long").await.unwrap();
        assert_eq!(send_buffer(&other), USUAL, "the rest of the response still needs the place");

        guest.read_exact(&mut vec![0; written]).await.unwrap();
        // Its kernel may acknowledge the last bytes a moment later.
        let given_back = async {
            while ours.activity.pause(&TIMEOUTS) <= LARGE_IDLE {
                assert!(!is_read(&mut ours).await);
            }
        };
        timeout(Duration::from_secs(10), given_back).await.unwrap();
        other.write_all(b"long").await.unwrap();
        assert!(send_buffer(&other) > USUAL, "the place is free");
    }

    /// Writes until the guest's side takes no more. Returns the number of bytes.
    async fn fill(stream: &mut ActivityStream<TcpStream>) -> usize {
        let unread = vec![0; 4096];
        let mut written = 0;
        while let Ok(result) = timeout(Duration::from_millis(50), stream.write(&unread)).await {
            written += result.unwrap();
        }
        written
    }

    /// Returns whether a byte of the guest arrived.
    async fn is_read(stream: &mut ActivityStream<TcpStream>) -> bool {
        timeout(Duration::from_millis(1), stream.read_u8()).await.is_ok()
    }
}
