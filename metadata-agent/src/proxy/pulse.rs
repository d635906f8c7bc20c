//! Where a guest connection stands, for its deadlines.
//!
//! hyper has one time-out for idle time and head together, allocates a timer for each head, and has none for a guest
//! that does not read. So the stream and the service mark here what happens, and [`super::connection`] looks with one
//! timer a connection: no allocation and no timer a request.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use std::{cmp, io};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use super::fragment::RequestLineReader;

/// How long a connection may stay in each state.
#[derive(Debug, Clone, Copy)]
pub(super) struct Allowance {
    pub(super) idle: Duration,
    pub(super) head: Duration,
    pub(super) blocked: Duration,
}

impl Allowance {
    /// No deadline that begins from now on is nearer than this.
    pub(super) fn shortest(&self) -> Duration {
        self.idle.min(self.head).min(self.blocked)
    }
}

/// Which deadline is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Expiry {
    /// No request came.
    Idle,
    /// A request head began and did not end.
    Head,
    /// The guest does not read its answer.
    Blocked,
}

const BUSY: u64 = 0;
const IDLE: u64 = 1;
const HEAD: u64 = 2;
const PHASES: u64 = 4;
const NOT_BLOCKED: u64 = u64::MAX;

/// The state of one connection. Written by the connection's own task alone; atomics only make it shareable.
#[derive(Debug)]
pub(super) struct Pulse {
    began: Instant,
    /// Milliseconds since `began`, times [`PHASES`], plus the phase.
    phase: AtomicU64,
    /// Milliseconds since `began` when the guest ceased to read.
    blocked: AtomicU64,
    /// Bytes of a request may still come that nobody will read.
    unread: AtomicBool,
    /// The request line that was read last holds a `#`.
    fragment: AtomicBool,
}

impl Pulse {
    pub(super) fn new() -> Self {
        Self {
            began: Instant::now(),
            phase: AtomicU64::new(IDLE),
            blocked: AtomicU64::new(NOT_BLOCKED),
            unread: AtomicBool::new(false),
            fragment: AtomicBool::new(false),
        }
    }

    /// A request head is complete: other deadlines hold until its answer is handed over.
    pub(super) fn busy(&self) {
        self.phase.store(BUSY, Ordering::Relaxed);
    }

    /// The answer is handed over; the next request may come.
    pub(super) fn idle(&self) {
        self.phase.store(self.now() * PHASES + IDLE, Ordering::Relaxed);
    }

    /// The request was answered before it was read to its end.
    pub(super) fn leave_unread(&self) {
        self.unread.store(true, Ordering::Relaxed);
    }

    pub(super) fn left_unread(&self) -> bool {
        self.unread.load(Ordering::Relaxed)
    }

    /// Whether the request now answered came with a fragment.
    pub(super) fn takes_fragment(&self) -> bool {
        self.fragment.load(Ordering::Relaxed) && self.fragment.swap(false, Ordering::Relaxed)
    }

    /// The nearest deadline, if any runs.
    pub(super) fn deadline(&self, allowance: &Allowance) -> Option<(Instant, Expiry)> {
        let at = |millis, allowed| self.began + Duration::from_millis(millis) + allowed;
        let phase = self.phase.load(Ordering::Relaxed);
        let waits = match phase % PHASES {
            IDLE => Some((at(phase / PHASES, allowance.idle), Expiry::Idle)),
            HEAD => Some((at(phase / PHASES, allowance.head), Expiry::Head)),
            _ => None,
        };
        let blocked = match self.blocked.load(Ordering::Relaxed) {
            NOT_BLOCKED => None,
            since => Some((at(since, allowance.blocked), Expiry::Blocked)),
        };
        match (waits, blocked) {
            (Some(waits), Some(blocked)) => Some(cmp::min_by_key(waits, blocked, |(at, _)| *at)),
            (waits, blocked) => waits.or(blocked),
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX / PHASES)
    }

    fn received(&self, line: &mut RequestLineReader, bytes: &[u8]) {
        let phase = self.phase.load(Ordering::Relaxed) % PHASES;
        if phase == BUSY {
            return line.pass();
        }
        if phase == IDLE {
            self.phase.store(self.now() * PHASES + HEAD, Ordering::Relaxed);
        }
        if line.read(phase == IDLE, bytes) {
            self.fragment.store(true, Ordering::Relaxed);
        }
    }

    fn wrote<T>(&self, result: Poll<T>) -> Poll<T> {
        let blocked = self.blocked.load(Ordering::Relaxed);
        if result.is_ready() {
            if blocked != NOT_BLOCKED {
                self.blocked.store(NOT_BLOCKED, Ordering::Relaxed);
            }
        } else if blocked == NOT_BLOCKED {
            self.blocked.store(self.now(), Ordering::Relaxed);
        }
        result
    }
}

/// A guest's stream that marks what passes.
#[derive(Debug)]
pub(super) struct Watched<T> {
    pub(super) stream: T,
    pulse: Arc<Pulse>,
    line: RequestLineReader,
}

impl<T> Watched<T> {
    pub(super) fn new(stream: T, pulse: Arc<Pulse>) -> Self {
        Self { stream, pulse, line: RequestLineReader::default() }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Watched<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let Self { stream, pulse, line } = &mut *self;
        let result = Pin::new(stream).poll_read(cx, buf);
        let new = &buf.filled()[before..];
        if !new.is_empty() {
            pulse.received(line, new);
        }
        result
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Watched<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.pulse.wrote(result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.pulse.wrote(result)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    const ALLOWANCE: Allowance = Allowance {
        idle: Duration::from_secs(10),
        head: Duration::from_secs(20),
        blocked: Duration::from_secs(40),
    };

    #[tokio::test(start_paused = true)]
    async fn deadlines_follow_what_passes() {
        let pulse = Arc::new(Pulse::new());
        let began = Instant::now();
        let second = Duration::from_secs;
        let (mut guest, ours) = tokio::io::duplex(4);
        let mut ours = Watched::new(ours, Arc::clone(&pulse));
        assert_eq!(pulse.deadline(&ALLOWANCE), Some((began + second(10), Expiry::Idle)));

        // The head's time begins with its first byte and more bytes do not renew it.
        for _ in 0..2 {
            tokio::time::advance(second(1)).await;
            guest.write_all(b"G").await.unwrap();
            ours.read_u8().await.unwrap();
            assert_eq!(pulse.deadline(&ALLOWANCE), Some((began + second(21), Expiry::Head)));
        }

        pulse.busy();
        assert_eq!(pulse.deadline(&ALLOWANCE), None);

        // A guest that does not read blocks us; one that reads again frees us.
        ours.write_all(b"full").await.unwrap();
        let (wrote, ()) = tokio::join!(ours.write_all(b"more"), async {
            assert_eq!(pulse.deadline(&ALLOWANCE), Some((began + second(42), Expiry::Blocked)));
            guest.read_exact(&mut [0; 8]).await.unwrap();
        });
        wrote.unwrap();
        assert_eq!(pulse.deadline(&ALLOWANCE), None);

        pulse.idle();
        assert_eq!(pulse.deadline(&ALLOWANCE), Some((began + second(12), Expiry::Idle)));
    }
}
