//! Look-ups of ports on other hosts, whose requests arrive here through a router's or a DHCP
//! server's namespace.
//!
//! Queries are those of Neutron's own agent (neutron/agent/metadata/agent.py,
//! `_get_ports_for_remote_address` and `_get_router_networks`): the networks of the router, then
//! the ports with the address in these networks. Several ports are an ambiguous result.
//!
//! # Caching
//!
//! An address may move to another instance, and no event reports changes of remote ports. So an
//! instance is cached only if the guest sends from the MAC address of the found port, which is
//! unique in its network. It is cached for [`FRESH`], which covers the requests of one boot. Other
//! guests cause a new query each time, which is sent to Neutron after the request arrived.
//!
//! The owner of a port can be outdated for that time: a project may move a port to another
//! instance. A report about a local port removes its cached results at once ([`Lookup::forget`]).
//! Negative and ambiguous results are cached for [`FRESH_NEGATIVE`].
//!
//! # Limits
//!
//! Guests cause the queries. At most [`CONCURRENT`] requests are in progress, with only one of
//! equal queries; [`QUEUE`] wait in order of arrival, and further ones are rejected at once. A
//! query whose requesters are gone is not sent.
//!
//! When guests behind one router boot together, their queries wait together. Up to [`query::BATCH`]
//! of them, on the same network or router, share a request. Each is answered by its own address.

mod cache;
mod query;
mod search;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;

use self::cache::Cache;
use self::query::LookupBatch;
pub(crate) use self::query::{InstancePort, LookupQuery, LookupResult, PortSelector};
use self::search::{SearchResult, search};
use super::api::{Api, ApiError};
use crate::ids::{NetworkId, NetworkOrRouter, PortId, RouterId};

/// Lifetime of a confirmed instance.
const FRESH: Duration = Duration::from_secs(2);
/// Lifetime of a negative or ambiguous result.
const FRESH_NEGATIVE: Duration = Duration::from_secs(1);
/// Time for which a router's cached networks are tried first.
const FRESH_ROUTER: Duration = Duration::from_secs(30);
/// Maximum number of requests in progress.
pub(super) const CONCURRENT: usize = 16;
/// Maximum number of waiting queries, and capacity of the channel.
const QUEUE: usize = 1024;

/// A look-up failed.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum LookupError {
    #[error("too many queries to Neutron are waiting")]
    Busy,
    #[error("{}: {source}", source.place)]
    Unavailable { source: Arc<ApiError> },
    #[error("the agent is stopping")]
    Stopping,
}

type LookupReply = Result<LookupResult, LookupError>;

#[derive(Debug)]
enum LookupRequest {
    Find(LookupQuery, oneshot::Sender<LookupReply>),
    Forget(PortId),
}

/// Handle for looking up remote ports. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Lookup(mpsc::Sender<LookupRequest>);

/// Requests of all clones of a [`Lookup`].
#[derive(Debug)]
pub(crate) struct LookupRequests(mpsc::Receiver<LookupRequest>);

impl Lookup {
    /// Creates a handle and the receiver of its requests.
    #[must_use]
    pub(crate) fn new() -> (Self, LookupRequests) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        (Self(sender), LookupRequests(receiver))
    }

    /// Looks up a port.
    ///
    /// # Errors
    /// Neutron is not available, or too many queries are waiting.
    pub(crate) async fn find(&self, query: LookupQuery) -> Result<LookupResult, LookupError> {
        let (reply, outcome) = oneshot::channel();
        self.0.try_send(LookupRequest::Find(query, reply)).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => LookupError::Busy,
            mpsc::error::TrySendError::Closed(_) => LookupError::Stopping,
        })?;
        outcome.await.unwrap_or(Err(LookupError::Stopping))
    }

    /// Removes cached results for a port that has changed.
    pub(crate) async fn forget(&self, port: PortId) {
        drop(self.0.send(LookupRequest::Forget(port)).await);
    }
}

/// Task that performs look-ups.
pub(super) struct LookupWorker {
    api: Api,
    requests: LookupRequests,
    waiters: HashMap<LookupQuery, Waiters>,
    /// Queries to send, each once.
    queue: VecDeque<LookupQuery>,
    results: Cache<LookupQuery, LookupResult>,
    routers: Cache<RouterId, Arc<[NetworkId]>>,
    in_progress: JoinSet<(LookupBatch, SearchResult, u64)>,
    /// Number of removals, so that the result of a query sent before a removal is not cached.
    removals: u64,
}

/// Requesters of the same query.
struct Waiters {
    /// Requesters that arrived before the query was sent.
    current: Vec<oneshot::Sender<LookupReply>>,
    /// Requesters that arrived later and need a new query.
    later: Vec<oneshot::Sender<LookupReply>>,
}

impl LookupWorker {
    pub(super) fn new(api: Api, requests: LookupRequests) -> Self {
        Self {
            api,
            requests,
            waiters: HashMap::new(),
            queue: VecDeque::new(),
            results: Cache::default(),
            routers: Cache::default(),
            in_progress: JoinSet::new(),
            removals: 0,
        }
    }

    /// Serves requests until all handles are dropped.
    pub(super) async fn run(mut self) {
        loop {
            tokio::select! {
                message = self.requests.0.recv() => match message {
                    Some(LookupRequest::Find(query, reply)) => self.request(query, reply),
                    Some(LookupRequest::Forget(port)) => self.forget(port),
                    None => return,
                },
                Some(done) = self.in_progress.join_next() => match done {
                    Ok((batch, found, removals)) => self.finish(&batch, found, removals),
                    Err(lost) => if let Ok(cause) = lost.try_into_panic() {
                        std::panic::resume_unwind(cause);
                    },
                },
            }
            self.send_queries();
        }
    }

    fn forget(&mut self, port: PortId) {
        self.removals += 1;
        self.results
            .remove_if(|answer| matches!(answer, LookupResult::Instance(found) if found.port == port));
    }

    fn request(&mut self, query: LookupQuery, reply: oneshot::Sender<LookupReply>) {
        if let Some(answer) = self.results.get(&query, Instant::now()) {
            drop(reply.send(Ok(answer.clone())));
        } else if let Some(waiters) = self.waiters.get_mut(&query) {
            waiters.later.push(reply);
        } else if self.queue.len() < QUEUE {
            self.waiters.insert(query, Waiters { current: Vec::new(), later: vec![reply] });
            self.queue.push_back(query);
        } else {
            drop(reply.send(Err(LookupError::Busy)));
        }
    }

    fn send_queries(&mut self) {
        while self.in_progress.len() < CONCURRENT
            && let Some(batch) = self.next_batch()
        {
            let (api, removals) = (self.api.clone(), self.removals);
            let known = match batch.scope {
                NetworkOrRouter::Network(_) => None,
                NetworkOrRouter::Router(router) => self.routers.get(&router, Instant::now()).cloned(),
            };
            self.in_progress.spawn(async move {
                let found = search(&api, &batch, known).await;
                (batch, found, removals)
            });
        }
    }

    /// Takes the first waiting query, and others that can share its request. Drops those whose
    /// requesters are gone.
    fn next_batch(&mut self) -> Option<LookupBatch> {
        let mut batch: Option<LookupBatch> = None;
        for query in std::mem::take(&mut self.queue) {
            if batch.as_ref().is_some_and(|batch| !batch.has_room_for(query)) {
                self.queue.push_back(query);
            } else if self.take_waiters(&query) {
                match &mut batch {
                    Some(batch) => batch.targets.push(query.target),
                    None => batch = Some(LookupBatch::new(query)),
                }
            }
        }
        batch
    }

    /// Assigns the waiting requesters to the query that is about to be sent. Returns false if there
    /// are none.
    fn take_waiters(&mut self, query: &LookupQuery) -> bool {
        let Some(waiters) = self.waiters.get_mut(query) else { return false };
        waiters.later.retain(|reply| !reply.is_closed());
        if waiters.later.is_empty() {
            self.waiters.remove(query);
            return false;
        }
        waiters.current = std::mem::take(&mut waiters.later);
        true
    }

    fn finish(
        &mut self,
        batch: &LookupBatch,
        SearchResult { answers, networks }: SearchResult,
        removals: u64,
    ) {
        let is_current = removals == self.removals;
        if is_current && let (NetworkOrRouter::Router(router), Some(networks)) = (batch.scope, networks) {
            self.store_networks(router, networks);
        }
        for (target, answer) in answers {
            let query = LookupQuery { scope: batch.scope, target };
            if is_current && let Ok(answer) = &answer {
                self.store(query, answer);
            }
            let outcome = answer.map_err(|source| LookupError::Unavailable { source });
            let Some(Waiters { current, later }) = self.waiters.remove(&query) else { continue };
            for reply in current {
                drop(reply.send(outcome.clone()));
            }
            for reply in later {
                self.request(query, reply);
            }
        }
    }

    /// A router without networks is queried again.
    fn store_networks(&mut self, router: RouterId, networks: Arc<[NetworkId]>) {
        let now = Instant::now();
        if !networks.is_empty() {
            self.routers.put(router, networks, now + FRESH_ROUTER, now);
        }
    }

    fn store(&mut self, query: LookupQuery, answer: &LookupResult) {
        let now = Instant::now();
        match answer {
            LookupResult::Instance(_) if answer.is_confirmed_by(query.target) => {
                self.results.put(query, answer.clone(), now + FRESH, now);
            }
            LookupResult::NotAnInstance | LookupResult::NotFound | LookupResult::Ambiguous => {
                self.results.put(query, answer.clone(), now + FRESH_NEGATIVE, now);
            }
            // Unconfirmed results are not cached. After a failure, the pacer delays the next query.
            LookupResult::Instance(_) => {}
        }
    }
}
