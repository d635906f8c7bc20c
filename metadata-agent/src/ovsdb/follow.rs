//! How a reader stays with a database: one conversation with one server at a time, with the next server when that one is
//! lost, and with a pause when all of them were tried, which grows as long as no server holds.
//!
//! Where in the list to begin is a matter of chance, so that the hosts of a cloud spread over a cluster.

use std::convert::Infallible;
use std::future::{Future, pending};
use std::time::Duration;

use tokio::time::{Instant, timeout};
use uuid::Uuid;

use super::backoff::Backoff;
use super::remote::OvsdbRemote;
use super::session::{Dial, SessionError};

/// Nobody takes any more what is read.
#[derive(Debug)]
pub(crate) struct NobodyListens;

/// Why a conversation ended.
#[derive(Debug)]
pub(crate) enum End {
    /// The server is lost, or does not do.
    Lost(SessionError),
    /// There is nothing to go on for.
    NobodyListens,
}

impl<E: Into<SessionError>> From<E> for End {
    fn from(error: E) -> Self {
        Self::Lost(error.into())
    }
}

impl From<NobodyListens> for End {
    fn from(NobodyListens: NobodyListens) -> Self {
        Self::NobodyListens
    }
}

/// A reader of a database.
pub(crate) trait Reader: Send {
    /// Reads from a server for as long as that goes well.
    fn converse(&mut self, server: &OvsdbRemote) -> impl Future<Output = Result<Infallible, End>> + Send;

    /// Hears why there is nothing to be read from a server.
    fn lose(&mut self, server: &OvsdbRemote, error: &SessionError);

    /// Lets a pause pass, in which there is no server.
    fn rest(&mut self, pause: Duration) -> impl Future<Output = Result<(), NobodyListens>> + Send;
}

/// Reads from these servers until nobody listens. No pause is longer than `longest_pause`.
pub(crate) async fn follow(
    mut reader: impl Reader,
    servers: &[OvsdbRemote],
    longest_pause: Duration,
) -> NobodyListens {
    let [chance, ..] = *Uuid::new_v4().as_bytes();
    let mut backoff = Backoff::new(longest_pause);
    let mut tried = 0;
    for server in servers.iter().cycle().skip(usize::from(chance) % servers.len().max(1)) {
        let begin = Instant::now();
        let Err(end) = reader.converse(server).await;
        let End::Lost(error) = end else { return NobodyListens };
        reader.lose(server, &error);
        tried = if backoff.held(begin.elapsed()) { 1 } else { tried + 1 };
        if tried < servers.len() {
            continue;
        }
        tried = 0;
        if let Err(end) = reader.rest(backoff.pause()).await {
            return end;
        }
    }
    // Only without any server.
    pending().await
}

impl Dial {
    /// The beginning of a conversation, which takes no longer than it may.
    pub(crate) async fn in_time<T>(
        &self,
        beginning: impl Future<Output = Result<T, SessionError>>,
    ) -> Result<T, SessionError> {
        let limit = self.patience;
        timeout(limit, beginning).await.unwrap_or(Err(SessionError::Late { limit }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::sleep;

    /// Tells of each server that it is lost after a while, and how long it rested, until that was often enough.
    struct Log<'a> {
        holds: Duration,
        rests: usize,
        lines: &'a mut Vec<Result<String, Duration>>,
    }

    impl Reader for Log<'_> {
        async fn converse(&mut self, _: &OvsdbRemote) -> Result<Infallible, End> {
            sleep(self.holds).await;
            Err(SessionError::Late { limit: self.holds }.into())
        }

        fn lose(&mut self, server: &OvsdbRemote, error: &SessionError) {
            assert!(matches!(error, SessionError::Late { limit } if *limit == self.holds));
            self.lines.push(Ok(server.to_string()));
        }

        async fn rest(&mut self, pause: Duration) -> Result<(), NobodyListens> {
            self.lines.push(Err(pause));
            self.rests = self.rests.checked_sub(1).ok_or(NobodyListens)?;
            Ok(())
        }
    }

    async fn lines(servers: usize, holds: Duration, rests: usize) -> Vec<Result<String, Duration>> {
        let servers: Vec<_> =
            (0..servers).map(|number| OvsdbRemote::Unix(number.to_string().into())).collect();
        let mut lines = Vec::new();
        follow(Log { holds, rests, lines: &mut lines }, &servers, Duration::from_secs(1)).await;
        lines
    }

    #[tokio::test(start_paused = true)]
    async fn each_server_has_its_turn_before_a_pause_and_pauses_grow() {
        let lines = lines(3, Duration::ZERO, 6).await;
        assert_eq!(lines.len(), 7 * 4);
        let mut last = Duration::ZERO;
        for (number, round) in lines.chunks(4).enumerate() {
            let [first @ .., Err(pause)] = round else { panic!("{lines:?}") };
            let mut servers: Vec<_> = first.iter().map(|server| server.as_ref().unwrap()).collect();
            servers.sort();
            assert_eq!(servers, ["unix:0", "unix:1", "unix:2"], "{lines:?}");
            let due = Duration::from_secs(1).min(super::super::FIRST_PAUSE * (1 << number));
            assert!(*pause >= due / 2 && *pause <= due, "{pause:?} of {due:?}");
            last = *pause;
        }
        assert!(last >= Duration::from_millis(500));
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_held_makes_the_next_loss_the_first_one() {
        let lines = lines(1, Duration::from_secs(2), 4).await;
        assert_eq!(lines.len(), 5 * 2);
        let pauses = lines.iter().filter_map(|line| line.as_ref().err());
        assert!(pauses.max() <= Some(&super::super::FIRST_PAUSE), "{lines:?}");
    }
}
