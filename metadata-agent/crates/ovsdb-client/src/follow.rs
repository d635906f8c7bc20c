//! Failover between the servers of one database.
//!
//! One server is used at a time. After a failure the next server is tried; after a failure of all
//! servers there is a pause, which grows until a connection is stable. The first server is chosen
//! at random, so that many clients spread over the members of a cluster.

use std::convert::Infallible;
use std::future::{Future, pending};
use std::time::Duration;

use tokio::time::{Instant, timeout};
use uuid::Uuid;

use crate::backoff::Backoff;
use crate::remote::Remote;
use crate::session::{ConnectOptions, SessionError};

/// The receiver of what is read no longer exists.
#[derive(Debug)]
pub struct ReceiverDropped;

/// Reason for which [`DatabaseReader::read`] returned.
#[derive(Debug)]
pub enum Disconnect {
    /// The server failed or is not acceptable. The next one is tried.
    Failed(SessionError),
    /// Reading is pointless. No other server is tried.
    ReceiverDropped,
}

impl<E: Into<SessionError>> From<E> for Disconnect {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

impl From<ReceiverDropped> for Disconnect {
    fn from(ReceiverDropped: ReceiverDropped) -> Self {
        Self::ReceiverDropped
    }
}

/// User of a database, driven by [`follow`].
pub trait DatabaseReader: Send {
    /// Connects to a server and reads from it until something fails.
    fn read(&mut self, server: &Remote) -> impl Future<Output = Result<Infallible, Disconnect>> + Send;

    /// Handles the failure of a server.
    fn failed(&mut self, server: &Remote, error: &SessionError);

    /// Waits while no server is connected.
    fn wait(&mut self, pause: Duration) -> impl Future<Output = Result<(), ReceiverDropped>> + Send;
}

/// Reads from these servers until the receiver is dropped. No pause is longer than `longest_pause`.
pub async fn follow(
    mut reader: impl DatabaseReader,
    servers: &[Remote],
    longest_pause: Duration,
) -> ReceiverDropped {
    let [random, ..] = *Uuid::new_v4().as_bytes();
    let mut backoff = Backoff::new(longest_pause);
    let mut tried = 0;
    for server in servers.iter().cycle().skip(usize::from(random) % servers.len().max(1)) {
        // Read from this server until it fails.
        let begin = Instant::now();
        let Err(disconnect) = reader.read(server).await;
        let Disconnect::Failed(error) = disconnect else { return ReceiverDropped };
        reader.failed(server, &error);
        // Try every server once before pausing.
        tried = if backoff.reset_if_stable(begin.elapsed()) { 1 } else { tried + 1 };
        if tried < servers.len() {
            continue;
        }
        tried = 0;
        if let Err(dropped) = reader.wait(backoff.pause()).await {
            return dropped;
        }
    }
    // Reached only without any server.
    pending().await
}

impl ConnectOptions {
    /// Limits the time of a connection's first steps, up to and including the initial rows.
    ///
    /// # Errors
    /// The steps failed or took too long.
    pub async fn within_timeout<T>(
        &self,
        steps: impl Future<Output = Result<T, SessionError>>,
    ) -> Result<T, SessionError> {
        let limit = self.timeout;
        timeout(limit, steps).await.unwrap_or(Err(SessionError::Timeout { limit }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::FIRST_PAUSE;
    use tokio::time::sleep;

    /// Fails with each server after a while, and logs servers and pauses until the last pause.
    struct Log<'a> {
        stable_for: Duration,
        pauses: usize,
        lines: &'a mut Vec<Result<String, Duration>>,
    }

    impl DatabaseReader for Log<'_> {
        async fn read(&mut self, _: &Remote) -> Result<Infallible, Disconnect> {
            sleep(self.stable_for).await;
            Err(SessionError::Timeout { limit: self.stable_for }.into())
        }

        fn failed(&mut self, server: &Remote, error: &SessionError) {
            assert!(matches!(error, SessionError::Timeout { limit } if *limit == self.stable_for));
            self.lines.push(Ok(server.to_string()));
        }

        async fn wait(&mut self, pause: Duration) -> Result<(), ReceiverDropped> {
            self.lines.push(Err(pause));
            self.pauses = self.pauses.checked_sub(1).ok_or(ReceiverDropped)?;
            Ok(())
        }
    }

    async fn lines(servers: usize, stable_for: Duration, pauses: usize) -> Vec<Result<String, Duration>> {
        let servers: Vec<_> = (0..servers).map(|number| Remote::Unix(number.to_string().into())).collect();
        let mut lines = Vec::new();
        follow(Log { stable_for, pauses, lines: &mut lines }, &servers, Duration::from_secs(1)).await;
        lines
    }

    #[tokio::test(start_paused = true)]
    async fn all_servers_are_tried_before_a_pause_and_pauses_grow() {
        let lines = lines(3, Duration::ZERO, 6).await;
        assert_eq!(lines.len(), 7 * 4);
        let mut last = Duration::ZERO;
        for (number, round) in lines.chunks(4).enumerate() {
            let [first @ .., Err(pause)] = round else { panic!("{lines:?}") };
            let mut servers: Vec<_> = first.iter().map(|server| server.as_ref().unwrap()).collect();
            servers.sort();
            assert_eq!(servers, ["unix:0", "unix:1", "unix:2"], "{lines:?}");
            let due = Duration::from_secs(1).min(FIRST_PAUSE * (1 << number));
            assert!(*pause >= due / 2 && *pause <= due, "{pause:?} of {due:?}");
            last = *pause;
        }
        assert!(last >= Duration::from_millis(500));
    }

    #[tokio::test(start_paused = true)]
    async fn a_stable_connection_resets_the_pause() {
        let lines = lines(1, Duration::from_secs(2), 4).await;
        assert_eq!(lines.len(), 5 * 2);
        let pauses = lines.iter().filter_map(|line| line.as_ref().err());
        assert!(pauses.max() <= Some(&FIRST_PAUSE), "{lines:?}");
    }
}
