//! The load generator: connections that send the next request as soon as they have read a response.
//! [`Steady`] sends requests at fixed times instead.
//!
//! It uses one thread per core, up to the number of connections, in the namespace of the load,
//! because a single thread would become the bottleneck. Every response is compared byte by byte.
//! Any difference is a [`Failure`] and does not count as a response.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::num::NonZero;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{panic, thread};

use nix::time::{ClockId, clock_gettime};
use tokio::runtime::Builder;
use tokio::task::JoinSet;
use tokio::time::timeout_at;

use crate::netns::Netns;
use crate::wait::PATIENCE;

pub(crate) mod answer;
pub(crate) mod client;
mod steady;

pub use client::Failure;
pub use steady::Steady;

use answer::Expected;
use client::Client;

/// The use of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// One request after the other.
    KeepAlive,
    /// One request, after which the server is asked to close.
    NewConnection,
}

/// The requests to send, the way to send them, and for how long.
#[derive(Clone, Debug)]
pub struct Load {
    pub target: SocketAddr,
    pub path: String,
    /// The body to post. Without it, the request is a GET.
    pub post: Option<Vec<u8>>,
    /// The body of the only correct response.
    pub body: Vec<u8>,
    /// The number of concurrent connections.
    pub connections: usize,
    pub style: Style,
    /// The period in which new requests are sent.
    pub duration: Duration,
}

/// The result of a [`Load`].
#[derive(Debug, Default)]
pub struct Tally {
    /// Correct responses that were complete at the end of the period.
    pub in_time: u64,
    /// Sorted times from the request to the end of its correct response. If each request has its
    /// own connection, the time starts with the connection.
    pub latencies: Vec<Duration>,
    /// The number of each kind of failure.
    pub failures: BTreeMap<Failure, u64>,
    /// The details of the first failure.
    pub first_failure: Option<String>,
    /// The CPU time of the generator itself.
    pub cpu: Duration,
}

impl Load {
    /// Sends requests from inside `netns` until the end of the period, then waits for the last
    /// responses.
    #[must_use]
    pub fn run(&self, netns: &Netns) -> Tally {
        let threads = thread::available_parallelism().map_or(1, NonZero::get).min(self.connections);
        let end = Instant::now() + self.duration;
        // Threads start in the namespace of the thread that spawns them.
        let mut total = netns.enter(|| {
            thread::scope(|scope| {
                let shares = (0..threads).map(|thread| (thread..self.connections).step_by(threads).len());
                let drivers: Vec<_> =
                    shares.map(|share| scope.spawn(move || self.drive(share, end))).collect();
                drivers.into_iter().fold(Tally::default(), |total, driver| {
                    total.and(driver.join().unwrap_or_else(|panic| panic::resume_unwind(panic)))
                })
            })
        });
        total.latencies.sort_unstable();
        total
    }

    /// Runs the work of one thread.
    fn drive(&self, connections: usize, end: Instant) -> Tally {
        let runtime = Builder::new_current_thread().enable_all().build();
        let runtime = runtime.unwrap_or_else(|e| panic!("start a runtime: {e}"));
        let tally = runtime.block_on(self.send_until(connections, end));
        // The thread runs nothing else, so its CPU time is that of the load.
        Tally { cpu: thread_cpu(), ..tally }
    }

    async fn send_until(&self, connections: usize, end: Instant) -> Tally {
        let expected =
            Arc::new(Expected::new(&self.path, self.style, self.post.as_deref(), self.body.clone()));
        let mut clients = JoinSet::new();
        for _ in 0..connections {
            let client = Client::new(self.target, self.style, Arc::clone(&expected));
            clients.spawn(ask_until(end, client));
        }
        let mut total = Tally::default();
        while let Some(joined) = clients.join_next().await {
            total = total.and(joined.unwrap_or_else(|e| panic!("a connection's task: {e}")));
        }
        total
    }
}

async fn ask_until(end: Instant, mut client: Client) -> Tally {
    let mut tally = Tally::default();
    let asking = ask_again_and_again(end, &mut client, &mut tally);
    if timeout_at((end + PATIENCE).into(), asking).await.is_err() {
        tally.fail(Failure::NoAnswer, &format_args!("nothing for {PATIENCE:?}"));
    }
    tally
}

async fn ask_again_and_again(end: Instant, client: &mut Client, tally: &mut Tally) {
    loop {
        let began = Instant::now();
        if began >= end {
            return;
        }
        match client.ask().await {
            Ok(finished) => {
                tally.in_time += u64::from(finished <= end);
                tally.latencies.push(finished - began);
            }
            Err((failure, detail)) => {
                tally.fail(failure, &detail);
                // A connection that is refused at once never waits, so give others a turn.
                tokio::task::yield_now().await;
            }
        }
    }
}

impl Tally {
    /// Returns the correct responses per second of `duration`.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "far fewer than 2^52 answers")]
    pub fn rate(&self, duration: Duration) -> f64 {
        self.in_time as f64 / duration.as_secs_f64()
    }

    /// Returns the latency that this share of the responses did not exceed, or zero without
    /// responses.
    #[must_use]
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "an index into a vector, from a share of its length"
    )]
    pub fn quantile(&self, share: f64) -> Duration {
        let rank = (self.latencies.len() as f64 * share).ceil() as usize;
        self.latencies.get(rank.saturating_sub(1)).copied().unwrap_or_default()
    }

    #[must_use]
    pub fn failed(&self) -> u64 {
        self.failures.values().sum()
    }

    fn fail(&mut self, failure: Failure, detail: &dyn std::fmt::Display) {
        *self.failures.entry(failure).or_default() += 1;
        self.first_failure.get_or_insert_with(|| detail.to_string());
    }

    fn and(mut self, other: Self) -> Self {
        self.in_time += other.in_time;
        self.latencies.extend(other.latencies);
        for (failure, count) in other.failures {
            *self.failures.entry(failure).or_default() += count;
        }
        self.first_failure = self.first_failure.or(other.first_failure);
        self.cpu += other.cpu;
        self
    }
}

fn thread_cpu() -> Duration {
    let used = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID);
    used.unwrap_or_else(|e| panic!("read the thread's CPU time: {e}")).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_latencies_that_occurred() {
        let tally = Tally { latencies: (1..=200).map(Duration::from_micros).collect(), ..Tally::default() };
        assert_eq!(tally.quantile(0.5), Duration::from_micros(100));
        assert_eq!(tally.quantile(0.99), Duration::from_micros(198));
        assert_eq!(tally.quantile(1.0), Duration::from_micros(200));
        assert_eq!(tally.quantile(0.0), Duration::from_micros(1));
        assert_eq!(Tally::default().quantile(0.5), Duration::ZERO);
    }
}
