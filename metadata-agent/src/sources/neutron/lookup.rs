//! Who has an address in a network, or behind a router: for guests that are not on this host, but whose requests come to it
//! by a router's or a DHCP server's namespace.
//!
//! Asked as Neutron's own agent asks (neutron/agent/metadata/agent.py, `_get_ports_for_remote_address` and
//! `_get_router_networks`): the networks of the router, then the ports with the address in these networks. More than one
//! is no answer.
//!
//! # The cache
//!
//! An address may pass to another instance, and no event tells this host of a port elsewhere. So an answer holds for
//! [`FRESH`] alone; it spares the questions of one guest's boot, which makes its dozen requests within a second or two. A
//! guest that is created takes longer to boot than that. Where an address moves between two instances that run, on other
//! hosts, the new one may be answered as the old one until then. That there is nobody, or several, holds for
//! [`FRESH_NOBODY`]. What Neutron says anew of a port that is asked about here ends the answer at once ([`Lookup::forget`]).
//! The networks of a router hold for [`FRESH_ROUTER`].
//!
//! # Limits
//!
//! Guests choose what is asked. Equal questions are one; [`AT_ONCE`] questions are under way at most and
//! [`QUEUE`] wait, and what comes beyond is refused at once; [`CAPACITY`] answers are kept.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::api::{Api, ApiError, Filter, SOME};
use super::ports::Told;
use crate::ids::{InstanceId, MacAddress, NetworkId, PortId, ProjectId, RouterId};
use crate::inventory::Facts;

/// How long an instance stays the answer.
const FRESH: Duration = Duration::from_secs(5);
/// How long nobody, or several, stays the answer.
const FRESH_NOBODY: Duration = Duration::from_secs(1);
/// How long a router's networks are taken to be its.
const FRESH_ROUTER: Duration = Duration::from_secs(30);
/// Answers, and routers, that are kept.
const CAPACITY: usize = 4096;
/// Questions under way.
const AT_ONCE: usize = 16;
/// Questions that wait.
const QUEUE: usize = 256;
/// Networks of one router in one question: their ids must fit into a URL of 8 KiB.
const NETWORKS: usize = 100;
/// What ports of a router's are for (neutron_lib/constants.py, `ROUTER_INTERFACE_OWNERS`).
const ROUTER_INTERFACES: [&str; 3] = [
    "network:router_interface",
    "network:ha_router_replicated_interface",
    "network:router_interface_distributed",
];

/// Who has an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// An instance.
    Instance(Arc<Found>),
    /// Something that is no instance, such as a load balancer.
    NotAnInstance,
    /// Nobody.
    NotFound,
    /// More than one port has it.
    Ambiguous,
}

/// An instance that has an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The instance.
    pub instance: InstanceId,
    /// The project of the port, as Neutron's agent takes it for the instance's.
    pub project: ProjectId,
    /// The port.
    pub port: PortId,
    /// The port's network.
    pub network: NetworkId,
    /// The port's addresses.
    pub fixed_ips: Vec<IpAddr>,
}

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

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Key {
    Network(NetworkId, Whom),
    Router(RouterId, Whom),
}

/// By what a port is known on its network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Whom {
    /// An address of its own.
    Address(IpAddr),
    /// Its MAC address: all that a link-local address tells.
    Mac(MacAddress),
}

impl From<IpAddr> for Whom {
    fn from(address: IpAddr) -> Self {
        Self::Address(address)
    }
}

impl Whom {
    fn filter(self) -> Filter {
        match self {
            Self::Address(address) => ("fixed_ips", format!("ip_address={address}")),
            Self::Mac(mac) => ("mac_address", mac.to_string()),
        }
    }

    fn is(self, facts: &Facts) -> bool {
        match self {
            Self::Address(address) => facts.fixed_ips.contains(&address),
            Self::Mac(mac) => facts.mac == Some(mac),
        }
    }
}

type Outcome = Result<Answer, LookupError>;

#[derive(Debug)]
enum Message {
    Ask(Key, oneshot::Sender<Outcome>),
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

    /// Who has an address, or a MAC address, in a network.
    ///
    /// # Errors
    /// Nobody can tell now.
    pub async fn by_network(&self, network: NetworkId, whom: impl Into<Whom>) -> Result<Answer, LookupError> {
        self.ask(Key::Network(network, whom.into())).await
    }

    /// Who has it in one of a router's networks.
    ///
    /// # Errors
    /// Nobody can tell now.
    pub async fn by_router(&self, router: RouterId, whom: impl Into<Whom>) -> Result<Answer, LookupError> {
        self.ask(Key::Router(router, whom.into())).await
    }

    /// A port has changed: what is known of it is of no use any more.
    pub async fn forget(&self, port: PortId) {
        drop(self.0.send(Message::Forget(port)).await);
    }

    async fn ask(&self, key: Key) -> Outcome {
        let (reply, outcome) = oneshot::channel();
        self.0.try_send(Message::Ask(key, reply)).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => LookupError::Busy,
            mpsc::error::TrySendError::Closed(_) => LookupError::Stopping,
        })?;
        outcome.await.unwrap_or(Err(LookupError::Stopping))
    }
}

/// The task that answers.
pub(super) struct Lookups {
    api: Api,
    questions: Questions,
    waiting: HashMap<Key, Vec<oneshot::Sender<Outcome>>>,
    answers: Cache<Key, Answer>,
    routers: Cache<RouterId, Arc<[NetworkId]>>,
    under_way: JoinSet<(Key, Finding)>,
    /// Counts what was forgotten, so that no answer that was asked for before is kept.
    forgotten: u64,
}

/// What a question came to: the answer, the router's networks if they were asked for, and since when nothing was forgotten.
struct Finding {
    outcome: Outcome,
    networks: Option<Arc<[NetworkId]>>,
    forgotten: u64,
}

impl Lookups {
    pub(super) fn new(api: Api, questions: Questions) -> Self {
        Self {
            api,
            questions,
            waiting: HashMap::new(),
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
                    Some(Message::Ask(key, reply)) => self.begin(key, reply),
                    Some(Message::Forget(port)) => {
                        self.forget(|answer| matches!(answer, Answer::Instance(found) if found.port == port));
                    }
                    None => return,
                },
                Some(done) = self.under_way.join_next() => match done {
                    Ok((key, finding)) => self.end(key, finding),
                    Err(lost) => if let Ok(cause) = lost.try_into_panic() {
                        std::panic::resume_unwind(cause);
                    },
                },
            }
        }
    }

    fn forget(&mut self, outdated: impl Fn(&Answer) -> bool) {
        self.forgotten += 1;
        self.answers.forget(outdated);
    }

    fn begin(&mut self, key: Key, reply: oneshot::Sender<Outcome>) {
        let now = Instant::now();
        if let Some(answer) = self.answers.get(&key, now) {
            drop(reply.send(Ok(answer.clone())));
            return;
        }
        if let Some(waiting) = self.waiting.get_mut(&key) {
            waiting.push(reply);
            return;
        }
        if self.waiting.len() >= AT_ONCE {
            drop(reply.send(Err(LookupError::Busy)));
            return;
        }
        self.waiting.insert(key, vec![reply]);
        let (api, forgotten) = (self.api.clone(), self.forgotten);
        let known = match key {
            Key::Network(..) => None,
            Key::Router(router, _) => self.routers.get(&router, now).cloned(),
        };
        self.under_way.spawn(async move {
            let (outcome, networks) = find(&api, key, known).await;
            let outcome = outcome.map_err(|source| LookupError::Unavailable { source });
            (key, Finding { outcome, networks, forgotten })
        });
    }

    fn end(&mut self, key: Key, Finding { outcome, networks, forgotten }: Finding) {
        let now = Instant::now();
        if forgotten == self.forgotten {
            if let (Key::Router(router, _), Some(networks)) = (key, networks) {
                self.routers.put(router, networks, now + FRESH_ROUTER, now);
            }
            match &outcome {
                Ok(answer @ Answer::Instance(_)) => self.answers.put(key, answer.clone(), now + FRESH, now),
                Ok(answer) => self.answers.put(key, answer.clone(), now + FRESH_NOBODY, now),
                // The gate keeps it from being asked at once.
                Err(_) => {}
            }
        }
        for reply in self.waiting.remove(&key).into_iter().flatten() {
            drop(reply.send(outcome.clone()));
        }
    }
}

async fn find(
    api: &Api,
    key: Key,
    known: Option<Arc<[NetworkId]>>,
) -> (Result<Answer, Arc<ApiError>>, Option<Arc<[NetworkId]>>) {
    let (whom, networks, asked) = match (key, known) {
        (Key::Network(network, whom), _) => (whom, Arc::from([network]), false),
        (Key::Router(_, whom), Some(networks)) => (whom, networks, false),
        (Key::Router(router, whom), None) => match networks_of(api, router).await {
            Ok(networks) => (whom, networks, true),
            Err(error) => return (Err(error), None),
        },
    };
    let answer = at(api, &networks, whom).await;
    // A router that is in no network yet is asked about again.
    (answer, (asked && !networks.is_empty()).then_some(networks))
}

async fn networks_of(api: &Api, router: RouterId) -> Result<Arc<[NetworkId]>, Arc<ApiError>> {
    let owners = ROUTER_INTERFACES.map(|owner| ("device_owner", owner.to_owned()));
    let filters: Vec<Filter> = [("device_id", router.to_string())].into_iter().chain(owners).collect();
    let told = api.ports(&filters, SOME, |_| true).await?;
    let networks = told.into_iter().filter_map(|(_, row)| row.ok()?.facts.network);
    let networks: std::collections::BTreeSet<_> = networks.collect();
    Ok(networks.into_iter().collect())
}

async fn at(api: &Api, networks: &[NetworkId], whom: Whom) -> Result<Answer, Arc<ApiError>> {
    let mut there = Vec::new();
    for some in networks.chunks(NETWORKS) {
        let networks = some.iter().map(|network| ("network_id", network.to_string()));
        let filters: Vec<Filter> = std::iter::once(whom.filter()).chain(networks).collect();
        there.extend(api.ports(&filters, SOME, |_| true).await?);
    }
    Ok(judge(there, networks, whom))
}

/// What does not fit the question is left out, whatever the server makes of filters.
fn judge(there: Vec<Told>, networks: &[NetworkId], whom: Whom) -> Answer {
    let fits =
        |facts: &Facts| facts.network.is_some_and(|network| networks.contains(&network)) && whom.is(facts);
    let understood = there
        .into_iter()
        .map(|(id, row)| row.ok().map(|said| said.facts).filter(fits).map(|facts| (id, facts)));
    let mut fitting = understood.flatten();
    let Some((port, facts)) = fitting.next() else { return Answer::NotFound };
    if fitting.next().is_some() {
        return Answer::Ambiguous;
    }
    let Facts {
        tenant: Some(tenant), port_project: Some(project), network: Some(network), fixed_ips, ..
    } = facts
    else {
        return Answer::NotAnInstance;
    };
    Answer::Instance(Arc::new(Found { instance: tenant.instance, project, port, network, fixed_ips }))
}

/// Values that hold until a time, and no more than [`CAPACITY`] of them.
#[derive(Debug)]
struct Cache<K, V>(HashMap<K, (Instant, V)>);

impl<K, V> Default for Cache<K, V> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<K: Copy + Eq + std::hash::Hash, V> Cache<K, V> {
    fn get(&self, key: &K, now: Instant) -> Option<&V> {
        self.0.get(key).filter(|(until, _)| now < *until).map(|(_, value)| value)
    }

    fn put(&mut self, key: K, value: V, until: Instant, now: Instant) {
        self.0.remove(&key);
        if self.0.len() >= CAPACITY {
            self.0.retain(|_, (until, _)| now < *until);
        }
        // What would end first goes first: that nobody is there is asked the more often for.
        if self.0.len() >= CAPACITY
            && let Some(first) = self.0.iter().min_by_key(|(_, (until, _))| *until).map(|(key, _)| *key)
        {
            self.0.remove(&first);
        }
        self.0.insert(key, (until, value));
    }

    fn forget(&mut self, outdated: impl Fn(&V) -> bool) {
        self.0.retain(|_, (_, value)| !outdated(value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_kept_than_there_is_room_for_and_what_ends_first_makes_room() {
        let now = Instant::now();
        let mut cache = Cache::default();
        for key in 0..CAPACITY {
            cache.put(key, (), now + FRESH, now);
        }
        cache.put(7, (), now + FRESH_NOBODY, now);
        cache.put(CAPACITY, (), now + FRESH, now);
        assert_eq!(cache.0.len(), CAPACITY);
        assert_eq!((cache.get(&7, now), cache.get(&8, now)), (None, Some(&())));
        let later = now + FRESH;
        assert_eq!(cache.get(&8, later), None);
        cache.put(CAPACITY + 1, (), later + FRESH, later);
        assert_eq!(cache.0.len(), 1);
    }
}
