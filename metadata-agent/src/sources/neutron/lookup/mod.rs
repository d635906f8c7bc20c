//! Who has an address in a network, or behind a router: for guests that are not on this host, but whose requests come to it
//! by a router's or a DHCP server's namespace.
//!
//! Asked as Neutron's own agent asks (neutron/agent/metadata/agent.py, `_get_ports_for_remote_address` and
//! `_get_router_networks`): the networks of the router, then the ports with the address in these networks. More than one
//! is no answer.
//!
//! # Which answers are kept
//!
//! An address may pass to another instance, and no event tells this host of a port elsewhere. So an instance is the answer
//! to a later question only where the guest sends from the MAC address of the port that was found, of which there is one in
//! a network; then for [`FRESH`], which spares the questions of one guest's boot. Everybody else is asked for anew: each
//! gets an answer to a question that was put to Neutron after it had come itself.
//!
//! What can be out of date for so long is whose the port is: one that its project takes from one instance and gives to another.
//! What Neutron says anew of a port that is asked about here ends its answers at once ([`Lookup::forget`]). That there is
//! nobody, or several, holds for [`FRESH_NOBODY`].
//!
//! # Limits
//!
//! Guests choose what is asked. Of equal questions one is under way, and [`AT_ONCE`] in all; [`QUEUE`] wait in the order in
//! which they came, and what comes beyond is refused at once. Nothing is asked for somebody who has left.

mod cache;
mod find;
mod query;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;

use self::cache::Cache;
use self::find::{Finding, find};
pub use self::query::{Answer, Found, Query, Whom};
use super::api::{Api, ApiError};
use crate::ids::{NetworkId, NetworkOrRouter, PortId, RouterId};

/// How long the instance of a port stays its instance.
const FRESH: Duration = Duration::from_secs(2);
/// How long nobody, or several, stays the answer.
const FRESH_NOBODY: Duration = Duration::from_secs(1);
/// How long a router's networks are tried first.
const FRESH_ROUTER: Duration = Duration::from_secs(30);
/// Questions under way.
pub(super) const AT_ONCE: usize = 16;
/// Questions that wait, and those who ask while the task has no time to listen.
const QUEUE: usize = 1024;

/// Why there is no answer.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LookupError {
    /// Too many questions wait already.
    #[error("too many questions to Neutron wait already")]
    Busy,
    /// Neutron cannot be asked.
    #[error("{} {source}", source.place)]
    Unavailable {
        /// Why not.
        source: Arc<ApiError>,
    },
    /// The agent stops.
    #[error("the agent stops")]
    Stopping,
}

type Outcome = Result<Answer, LookupError>;

#[derive(Debug)]
enum Message {
    Ask(Query, oneshot::Sender<Outcome>),
    Forget(PortId),
}

/// By which addresses are looked up. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Lookup(mpsc::Sender<Message>);

/// What was asked of a [`Lookup`] and is to be answered.
#[derive(Debug)]
pub struct Questions(mpsc::Receiver<Message>);

impl Lookup {
    /// A lookup, and what is asked of it.
    #[must_use]
    pub fn new() -> (Self, Questions) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        (Self(sender), Questions(receiver))
    }

    /// Who it is.
    ///
    /// # Errors
    /// Nobody can tell now.
    pub async fn ask(&self, query: Query) -> Result<Answer, LookupError> {
        let (reply, outcome) = oneshot::channel();
        self.0.try_send(Message::Ask(query, reply)).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => LookupError::Busy,
            mpsc::error::TrySendError::Closed(_) => LookupError::Stopping,
        })?;
        outcome.await.unwrap_or(Err(LookupError::Stopping))
    }

    /// A port has changed: what is known of it is of no use any more.
    pub async fn forget(&self, port: PortId) {
        drop(self.0.send(Message::Forget(port)).await);
    }
}

/// The task that answers.
pub(super) struct Lookups {
    api: Api,
    questions: Questions,
    /// By query, everybody who wants to know.
    askers: HashMap<Query, Askers>,
    /// Questions that are to be put, each once.
    line: VecDeque<Query>,
    answers: Cache<Query, Answer>,
    routers: Cache<RouterId, Arc<[NetworkId]>>,
    under_way: JoinSet<(Query, Finding, u64)>,
    /// Counts what was forgotten, so that no answer that was asked for before is kept.
    forgotten: u64,
}

/// Who wants to know the same.
struct Askers {
    /// For whom the question was put.
    asked_for: Vec<oneshot::Sender<Outcome>>,
    /// Who came after that.
    late: Vec<oneshot::Sender<Outcome>>,
}

impl Lookups {
    pub(super) fn new(api: Api, questions: Questions) -> Self {
        Self {
            api,
            questions,
            askers: HashMap::new(),
            line: VecDeque::new(),
            answers: Cache::default(),
            routers: Cache::default(),
            under_way: JoinSet::new(),
            forgotten: 0,
        }
    }

    /// Answers until nobody can ask any more.
    pub(super) async fn serve(mut self) {
        loop {
            tokio::select! {
                message = self.questions.0.recv() => match message {
                    Some(Message::Ask(query, reply)) => self.hear(query, reply),
                    Some(Message::Forget(port)) => self.forget(port),
                    None => return,
                },
                Some(done) = self.under_way.join_next() => match done {
                    Ok((query, finding, forgotten)) => self.conclude(query, finding, forgotten),
                    Err(lost) => if let Ok(cause) = lost.try_into_panic() {
                        std::panic::resume_unwind(cause);
                    },
                },
            }
            self.put_questions();
        }
    }

    fn forget(&mut self, port: PortId) {
        self.forgotten += 1;
        self.answers.forget(|answer| matches!(answer, Answer::Instance(found) if found.port == port));
    }

    fn hear(&mut self, query: Query, reply: oneshot::Sender<Outcome>) {
        if let Some(answer) = self.answers.get(&query, Instant::now()) {
            drop(reply.send(Ok(answer.clone())));
        } else if let Some(askers) = self.askers.get_mut(&query) {
            askers.late.push(reply);
        } else if self.line.len() < QUEUE {
            self.askers.insert(query, Askers { asked_for: Vec::new(), late: vec![reply] });
            self.line.push_back(query);
        } else {
            drop(reply.send(Err(LookupError::Busy)));
        }
    }

    fn put_questions(&mut self) {
        while self.under_way.len() < AT_ONCE
            && let Some(query) = self.line.pop_front()
        {
            let Some(askers) = self.askers.get_mut(&query) else { continue };
            askers.late.retain(|reply| !reply.is_closed());
            if askers.late.is_empty() {
                self.askers.remove(&query);
                continue;
            }
            askers.asked_for = std::mem::take(&mut askers.late);
            let (api, forgotten) = (self.api.clone(), self.forgotten);
            let known = match query.scope {
                NetworkOrRouter::Network(_) => None,
                NetworkOrRouter::Router(router) => self.routers.get(&router, Instant::now()).cloned(),
            };
            self.under_way.spawn(async move { (query, find(&api, query, known).await, forgotten) });
        }
    }

    fn conclude(&mut self, query: Query, finding: Finding, forgotten: u64) {
        let Finding { answer, networks } = finding;
        if forgotten == self.forgotten {
            self.keep(query, answer.as_ref().ok(), networks);
        }
        let outcome = answer.map_err(|source| LookupError::Unavailable { source });
        let Some(Askers { asked_for, late }) = self.askers.remove(&query) else { return };
        for reply in asked_for {
            drop(reply.send(outcome.clone()));
        }
        for reply in late {
            self.hear(query, reply);
        }
    }

    fn keep(&mut self, query: Query, answer: Option<&Answer>, networks: Option<Arc<[NetworkId]>>) {
        let now = Instant::now();
        // A router that is in no network yet is asked about again.
        if let (NetworkOrRouter::Router(router), Some(networks)) = (query.scope, networks)
            && !networks.is_empty()
        {
            self.routers.put(router, networks, now + FRESH_ROUTER, now);
        }
        match answer {
            Some(answer @ Answer::Instance(_)) if answer.is_proven_of(query.whom) => {
                self.answers.put(query, answer.clone(), now + FRESH, now);
            }
            Some(answer @ (Answer::NotAnInstance | Answer::NotFound | Answer::Ambiguous)) => {
                self.answers.put(query, answer.clone(), now + FRESH_NOBODY, now);
            }
            // As for a failure, the gate keeps it from being asked for at once.
            Some(Answer::Instance(_)) | None => {}
        }
    }
}
