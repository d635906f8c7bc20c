//! Calls of the data plane to the control process: look-ups of clients and names, and connections
//! to unix sockets. The data plane itself may open no path and query no server but Nova.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::messages::{Answer, Query, Report};
use crate::proxy::{
    ClientLookup, ClientQuery, LookupFuture, LookupOutcome, NameLookup, NameLookupFuture, SocketConnector,
    SocketFuture,
};

/// The longest wait for an answer. The control process limits each call itself, so this ends only
/// calls to one that hangs.
const LONGEST_CALL: Duration = Duration::from_secs(30);

type Reply = (Answer, Option<OwnedFd>);

/// Calls that wait for their answers.
#[derive(Debug)]
pub(super) struct Calls {
    reports: mpsc::Sender<Report>,
    last: AtomicU64,
    waiting: Mutex<HashMap<u64, oneshot::Sender<Reply>>>,
}

impl Calls {
    pub(super) fn new(reports: mpsc::Sender<Report>) -> Arc<Self> {
        Arc::new(Self { reports, last: AtomicU64::new(0), waiting: Mutex::default() })
    }

    /// Hands an answer to the call that waits for it. It may have been given up.
    pub(super) fn answer(&self, call: u64, answer: Answer, descriptor: Option<OwnedFd>) {
        let waiting = self.waiting().remove(&call);
        if let Some(waiting) = waiting {
            let _ = waiting.send((answer, descriptor));
        }
    }

    async fn call(&self, query: Query) -> io::Result<Reply> {
        let call = self.last.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        self.waiting().insert(call, answer);
        // Also if the request ends before its answer.
        let _forgotten = Forget { calls: self, call };
        let exchange = async {
            let sent = self.reports.send(Report::Call { call, query }).await;
            sent.map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
            answered.await.map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))
        };
        match timeout(LONGEST_CALL, exchange).await?? {
            (Answer::Failed(error), _) => Err(error.into()),
            reply => Ok(reply),
        }
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<u64, oneshot::Sender<Reply>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Forget<'a> {
    calls: &'a Calls,
    call: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.calls.waiting().remove(&self.call);
    }
}

impl ClientLookup for Calls {
    fn find<'a>(&'a self, query: &'a ClientQuery) -> LookupFuture<'a> {
        Box::pin(async move {
            match self.call(Query::Client(*query)).await {
                Ok((Answer::Client(outcome), _)) => outcome,
                Ok(_) => LookupOutcome::Unavailable,
                Err(error) => {
                    tracing::debug!(%error, "client look-up in the control process failed");
                    LookupOutcome::Unavailable
                }
            }
        })
    }
}

impl NameLookup for Calls {
    fn look_up<'a>(&'a self, host: &'a str, port: u16) -> NameLookupFuture<'a> {
        Box::pin(async move {
            match self.call(Query::Name { host: host.to_owned(), port }).await? {
                (Answer::Name(addresses), _) => Ok(addresses),
                _ => Err(another_answer()),
            }
        })
    }
}

impl SocketConnector for Calls {
    fn connect<'a>(&'a self, path: &'a Path) -> SocketFuture<'a> {
        Box::pin(async move {
            match self.call(Query::Socket { path: path.to_owned() }).await? {
                (Answer::Socket, Some(descriptor)) => {
                    let stream = net::UnixStream::from(descriptor);
                    stream.set_nonblocking(true)?;
                    UnixStream::from_std(stream)
                }
                _ => Err(another_answer()),
            }
        })
    }
}

fn another_answer() -> io::Error {
    io::Error::other("the control process answered another call")
}
