//! Guests' ports from Neutron's API, for those that no source on the host knows enough about.
//!
//! Input is [`Presence`]: which guests' interfaces there are, and what is missing about each. All of the host's ports are
//! asked for once at the start, and after a fault; then only what is missing, some at a time ([`survey`]). A host whose
//! ports are known from elsewhere asks nothing more, however many requests its guests make.
//!
//! What goes wrong, at Neutron or at Keystone, is a fault that shows, and that is tried again after a pause that grows,
//! by one question for the whole host ([`gate`]). What was said of interfaces that are still there holds meanwhile. The
//! source is ready once it has tried: a host whose guests are known from elsewhere starts without a control plane.
//!
//! [`Lookup`] answers for guests that are not on this host.

mod access;
mod api;
mod catalog;
mod gate;
mod http;
mod keystone;
mod lookup;
mod ports;
mod session;
mod survey;
mod timestamp;

use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::Arc;

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{RECHECK_FAULTY, Reporter};
use crate::inventory::Event;
use crate::inventory::presence::Presence;
use api::{Api, Filter};
use http::{Http, Trust};
use keystone::Keystone;
use lookup::Lookups;
use ports::{Said, Told};
use session::{Session, Tokens};
use survey::{Question, Survey, Wanted};

pub use access::{Credentials, Domain, HttpUrl, NeutronAccess, NeutronAuth, NeutronInterface};
pub use api::{ApiError, ApiErrorKind};
pub use catalog::CatalogError;
pub use http::{HttpError, HttpSetupError};
pub use keystone::KeystoneError;
pub use lookup::{Answer, Found, Lookup, LookupError, Query, Questions, Whom};
pub use ports::RowError;
pub use session::AuthError;

/// Which Neutron, for which host, and where its connections are kept count of.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How to reach it.
    pub access: NeutronAccess,
    /// The name under which Neutron knows this host.
    pub host: String,
    /// The tasks that connections are.
    pub tasks: TaskTracker,
}

/// What the source speaks with.
#[derive(Debug)]
pub struct Channels {
    /// What is missing.
    pub present: watch::Receiver<Presence>,
    /// What it says.
    pub events: mpsc::Sender<Event>,
    /// How it is.
    pub reporter: Reporter,
    /// Of which addresses it is asked.
    pub questions: Questions,
    /// By which it tells that an address may have passed on.
    pub lookup: Lookup,
}

/// Sends what Neutron says, and answers lookups, until cancelled or until nobody listens.
pub async fn run(settings: Settings, channels: Channels, cancel: CancellationToken) {
    // Nothing is lost by stopping anywhere: the next start asks anew.
    let _stopped = cancel.run_until_cancelled_owned(serve(settings, channels)).await;
}

async fn serve(settings: Settings, channels: Channels) {
    let Channels { present, events, reporter, questions, lookup } = channels;
    let (api, session) = loop {
        match connect(&settings) {
            Ok(connected) => break connected,
            Err(error) => {
                let place = "TLS".to_owned();
                reporter.report(true, 0, 0, BTreeMap::from([(place, error.to_string())]));
                sleep(RECHECK_FAULTY).await;
            }
        }
    };
    let lookups = Lookups::new(api.unpaced(), questions);
    let survey = Survey::new(Instant::now());
    let host = settings.host;
    let source = Source { host, api, present, events, reporter, lookup, survey, ready: false, fault: None };
    let session = async {
        match session {
            Some(session) => session.serve().await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = source.follow() => {}
        () = session => {}
        () = lookups.serve() => {}
    }
}

fn connect(settings: &Settings) -> Result<(Api, Option<Session>), HttpSetupError> {
    let NeutronAccess { auth, endpoint, region, interface, authorities, insecure, patience } =
        settings.access.clone();
    let trust = Trust { authorities, insecure };
    let http = Arc::new(Http::new(trust, patience, settings.tasks.clone())?);
    Ok(match auth {
        NeutronAuth::Nobody { endpoint } => {
            let place = endpoint.to_string();
            (Api::new(http, Tokens::unneeded(endpoint), &place), None)
        }
        NeutronAuth::Keystone { url, credentials } => {
            let place = url.to_string();
            let keystone = Keystone { url, credentials, interface, region, endpoint };
            let (tokens, session) = Tokens::of(keystone, Arc::clone(&http));
            (Api::new(http, tokens, &place), Some(session))
        }
    })
}

/// What `check` has found out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reached {
    /// Neutron tells ports of this host.
    Ports,
    /// Neutron answers, but tells of no port of this host: it may have none; or `host` may differ from what Neutron has
    /// in `binding:host_id`; or the user may have neither the role admin nor the role service, without which that is
    /// not told.
    NoPorts,
}

/// Why Neutron cannot be asked.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// There is no HTTP client.
    #[error(transparent)]
    Setup(#[from] HttpSetupError),
    /// There is no answer.
    #[error("{} {source}", source.place)]
    Api {
        /// Why not.
        source: Arc<ApiError>,
    },
}

/// Asks once, as the source would: authenticates, finds the endpoint and asks for the ports of this host.
///
/// # Errors
/// What is wrong, and what to change.
pub async fn probe(settings: &Settings) -> Result<Reached, ProbeError> {
    let (api, session) = connect(settings)?;
    let filters = [host_filter(&settings.host)];
    let asked = api.ports(&filters, api::MANY, |_| true);
    let told = match session {
        None => asked.await,
        Some(session) => tokio::select! {
            told = asked => told,
            () = session.serve() => unreachable!("it is served while there are those who may ask"),
        },
    };
    let told = told.map_err(|source| ProbeError::Api { source })?;
    Ok(if told.is_empty() { Reached::NoPorts } else { Reached::Ports })
}

fn host_filter(host: &str) -> Filter {
    ("binding:host_id", host.to_owned())
}

struct Source {
    host: String,
    api: Api,
    present: watch::Receiver<Presence>,
    events: mpsc::Sender<Event>,
    reporter: Reporter,
    lookup: Lookup,
    survey: Survey,
    ready: bool,
    fault: Option<Arc<ApiError>>,
}

/// A question that is under way.
type Asking = Pin<Box<dyn Future<Output = (Question, Result<Vec<Told>, Arc<ApiError>>)> + Send>>;

impl Source {
    /// Returns when nobody listens any more.
    async fn follow(mut self) {
        let mut asking: Option<Asking> = None;
        self.present.mark_changed();
        loop {
            let due = self.survey.next().map(|due| self.api.opens().map_or(due, |opens| due.max(opens)));
            let due = due.filter(|_| asking.is_none());
            let heard = tokio::select! {
                // First of all: what is gone is withdrawn before anything is said of what is there.
                biased;
                changed = self.present.changed() => match changed {
                    Ok(()) => {
                        let presence = Arc::clone(&self.present.borrow_and_update());
                        let events = self.survey.follow(&presence, Instant::now());
                        self.tell(events).await
                    }
                    // The agent stops.
                    Err(_) => std::future::pending().await,
                },
                (question, answer) = under_way(&mut asking) => {
                    asking = None;
                    self.take(&question, answer).await
                }
                () = until(due) => {
                    asking = self.ask();
                    Some(())
                }
            };
            if heard.is_none() {
                return;
            }
        }
    }

    fn ask(&self) -> Option<Asking> {
        let question = self.survey.question(Instant::now())?;
        let (api, host) = (self.api.clone(), self.host.clone());
        Some(Box::pin(async move {
            let (filters, limit): (Vec<Filter>, _) = match &question.ports {
                Wanted::OfHost => (vec![host_filter(&host)], api::MANY),
                Wanted::Ids(ids) => (ids.iter().map(|id| ("id", id.to_string())).collect(), api::SOME),
                Wanted::Macs(macs) => {
                    (macs.iter().map(|mac| ("mac_address", mac.to_string())).collect(), api::SOME)
                }
            };
            let told = match api.ports(&filters, limit, |id| question.is_about(id)).await {
                Ok(told) => with_subports(&api, told).await,
                Err(error) => Err(error),
            };
            (question, told)
        }))
    }

    async fn take(&mut self, question: &Question, answer: Result<Vec<Told>, Arc<ApiError>>) -> Option<()> {
        let now = Instant::now();
        self.ready = true;
        let events = match answer {
            Ok(told) => {
                self.fault = None;
                self.survey.answer(question, &told, now)
            }
            Err(error) => {
                self.fault = Some(error);
                self.survey.failed(now);
                Vec::new()
            }
        };
        self.tell(events).await
    }

    /// Withdrawals go first, so that what passes from one port to another is never with both.
    async fn tell(&mut self, events: Vec<Event>) -> Option<()> {
        let (gone, news): (Vec<_>, Vec<_>) = events.into_iter().partition(|event| event.ports.is_empty());
        for event in gone.into_iter().chain(news) {
            if let Ok(port) = event.key.parse() {
                self.lookup.forget(port).await;
            }
            self.events.send(event).await.ok()?;
        }
        self.report();
        Some(())
    }

    fn report(&self) {
        let ports = self.survey.faults().map(|(id, error)| (format!("port {id}"), error.to_string()));
        let mut faults: BTreeMap<_, _> = ports.collect();
        if let Some(error) = &self.fault {
            faults.insert(error.place.clone(), error.to_string());
        }
        self.reporter.report(self.ready, self.survey.ports(), 0, faults);
    }
}

/// Asks for the rows of subports that trunks among these ports name.
async fn with_subports(api: &Api, mut told: Vec<Told>) -> Result<Vec<Told>, Arc<ApiError>> {
    let lacking = told.iter().flat_map(|(_, row)| row.iter().flat_map(Said::lacks));
    let lacking: Vec<_> = lacking.collect::<BTreeSet<_>>().into_iter().collect();
    let mut rows = BTreeMap::new();
    for some in lacking.chunks(survey::SOME) {
        let filters: Vec<Filter> = some.iter().map(|id| ("id", id.to_string())).collect();
        let subports = api.ports(&filters, api::SOME, |id| some.contains(&id)).await?;
        rows.extend(subports.into_iter().map(|(id, row)| (id, row.map(|said| said.facts))));
    }
    for (_, row) in &mut told {
        if let Ok(said) = row {
            said.complete(&rows);
        }
    }
    Ok(told)
}

async fn under_way(asking: &mut Option<Asking>) -> (Question, Result<Vec<Told>, Arc<ApiError>>) {
    match asking {
        Some(asking) => asking.await,
        None => std::future::pending().await,
    }
}

async fn until(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
