//! A guest that sends a request at fixed times, however long the responses take.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Builder;
use tokio::task::JoinSet;
use tokio::time::{Instant, interval, timeout_at};

use super::answer::Expected;
use super::client::Client;
use super::{Failure, Style, Tally};
use crate::netns::Netns;

/// Requests at fixed times, each on a connection of its own.
#[derive(Clone, Debug)]
pub struct Steady {
    pub target: SocketAddr,
    pub path: String,
    /// The body of the only correct response.
    pub body: Vec<u8>,
    /// The time between two requests.
    pub interval: Duration,
    pub requests: u32,
    /// The time limit of a request, from the time when it is due.
    pub patience: Duration,
}

impl Steady {
    /// Sends all requests from inside `netns` and waits for their responses. Latencies begin when a
    /// request is due, so that a delay of one request does not hide that of the next.
    #[must_use]
    pub fn run(&self, netns: &Netns) -> Tally {
        netns.enter(|| {
            let runtime = Builder::new_current_thread().enable_all().build();
            let runtime = runtime.unwrap_or_else(|e| panic!("start a runtime: {e}"));
            let mut tally = runtime.block_on(self.send());
            tally.latencies.sort_unstable();
            Tally { cpu: super::thread_cpu(), ..tally }
        })
    }

    async fn send(&self) -> Tally {
        let expected = Arc::new(Expected::new(&self.path, Style::NewConnection, None, self.body.clone()));
        let mut ticks = interval(self.interval);
        let mut requests = JoinSet::new();
        for _ in 0..self.requests {
            let due = ticks.tick().await;
            let client = Client::new(self.target, Style::NewConnection, Arc::clone(&expected));
            requests.spawn(ask_once(client, due, due + self.patience));
        }
        let mut total = Tally::default();
        while let Some(joined) = requests.join_next().await {
            total = total.and(joined.unwrap_or_else(|e| panic!("a request's task: {e}")));
        }
        total
    }
}

async fn ask_once(mut client: Client, due: Instant, end: Instant) -> Tally {
    let mut tally = Tally::default();
    match timeout_at(end, client.ask()).await {
        Ok(Ok(finished)) => {
            tally.in_time += 1;
            tally.latencies.push(finished.saturating_duration_since(due.into_std()));
        }
        Ok(Err((failure, detail))) => tally.fail(failure, &detail),
        Err(_) => tally.fail(Failure::NoAnswer, &format_args!("nothing for {:?}", end - due)),
    }
    tally
}
