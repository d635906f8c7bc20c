//! Guests' ports from Neutron's API, for those about which local sources do not know enough.
//!
//! Input is [`Presence`]: the guests' interfaces, and what is missing about each. All ports of the
//! host are requested after the first scan of its interfaces and after a failure; then only the
//! missing ones, in small batches ([`poller`]). If the ports of a host are known from other
//! sources, nothing more is requested, however many requests guests send. A port of this source is
//! requested again after the kernel refused its guest, because its addresses may have changed.
//!
//! Failures of Neutron or Keystone are reported, and retried with a growing pause, by one request
//! for the whole host ([`pacer`]). The ports of interfaces that still exist stay valid meanwhile.
//! The source is ready after its first attempt, so that a host whose guests are known from other
//! sources starts without a control plane.
//!
//! [`Lookup`] finds the ports of guests on other hosts.

mod access;
mod api;
mod catalog;
mod http;
mod keystone;
mod lookup;
mod pacer;
mod poller;
mod ports;
mod timestamp;
mod token;

use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::Arc;

use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{RECHECK_AFTER_ERROR, Reporter};
use crate::ids::PortId;
use crate::inventory::Event;
use crate::inventory::presence::Presence;
use crate::inventory::refused::RefusedSource;
use api::{Api, Filter};
use http::{Http, HttpTrust};
use keystone::Keystone;
use lookup::LookupWorker;
use poller::{PortPoller, PortQuery, PortSelection};
use ports::{FIELDS, ParsedPort, PortDetails};
use token::{TokenIssuer, Tokens};

pub(crate) use access::{Credentials, Domain, HttpUrl, NeutronAccess, NeutronAuth, NeutronInterface};
pub(crate) use api::ApiError;
pub(crate) use http::HttpSetupError;
pub(crate) use lookup::{InstancePort, Lookup, LookupQuery, LookupRequests, LookupResult, PortSelector};

/// Settings of the source.
#[derive(Clone, Debug)]
pub(crate) struct NeutronSettings {
    pub access: NeutronAccess,
    /// Name of this host in Neutron.
    pub host: String,
    /// Tracks the tasks of connections.
    pub tasks: TaskTracker,
}

/// Channels of the source.
#[derive(Debug)]
pub(crate) struct NeutronChannels {
    pub present: watch::Receiver<Presence>,
    /// Sources that the kernel refused because of addresses that may be out of date.
    pub refused: broadcast::Receiver<RefusedSource>,
    pub events: mpsc::Sender<Event>,
    pub reporter: Reporter,
    /// Requests for remote ports.
    pub requests: LookupRequests,
    /// Handle for removing cached look-ups after a port changed.
    pub lookup: Lookup,
}

/// Sends ports and serves look-ups until cancelled or until the receiver is dropped.
pub(crate) async fn run(settings: NeutronSettings, channels: NeutronChannels, cancel: CancellationToken) {
    // Cancelling at any point is safe: the next start requests everything again.
    let _stopped = cancel.run_until_cancelled_owned(Box::pin(serve(settings, channels))).await;
}

async fn serve(settings: NeutronSettings, channels: NeutronChannels) {
    let NeutronChannels { present, refused, events, reporter, requests, lookup } = channels;
    let (api, issuer) = loop {
        match connect(&settings).await {
            Ok(connected) => break connected,
            Err(error) => {
                let place = "TLS".to_owned();
                reporter.report(true, 0, 0, BTreeMap::from([(place, error.to_string())]));
                sleep(RECHECK_AFTER_ERROR).await;
            }
        }
    };
    let lookups = LookupWorker::new(api.unpaced(), requests);
    let poller = PortPoller::new();
    let host = settings.host;
    let source = NeutronSource {
        host,
        api,
        present,
        refused,
        events,
        reporter,
        lookup,
        poller,
        ready: false,
        error: None,
    };
    let issuer = async {
        match issuer {
            Some(issuer) => issuer.serve().await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = source.run() => {}
        () = issuer => {}
        () = lookups.run() => {}
    }
}

async fn connect(settings: &NeutronSettings) -> Result<(Api, Option<TokenIssuer>), HttpSetupError> {
    let NeutronAccess { auth, endpoint, region, interface, ca_certificates, insecure, timeout } =
        settings.access.clone();
    let trust = HttpTrust { ca_certificates, insecure };
    let http = Arc::new(Http::new(trust, timeout, settings.tasks.clone()).await?);
    Ok(match auth {
        NeutronAuth::NoAuth { endpoint } => {
            let place = endpoint.to_string();
            (Api::new(http, Tokens::unneeded(endpoint), &place), None)
        }
        NeutronAuth::Keystone { url, credentials } => {
            let place = url.to_string();
            let keystone = Keystone { url, credentials, interface, region, endpoint };
            let (tokens, issuer) = Tokens::new(keystone, Arc::clone(&http));
            (Api::new(http, tokens, &place), Some(issuer))
        }
    })
}

/// Result of [`probe`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NeutronProbe {
    Ports,
    /// Neutron responds, but lists no port of this host. There may be none, `host` may differ from
    /// `binding:host_id`, or the user may lack the role admin or service, which is required to see
    /// it.
    NoPorts,
}

/// Neutron cannot be queried.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NeutronProbeError {
    #[error(transparent)]
    Setup(#[from] HttpSetupError),
    #[error("{}: {source}", source.place)]
    Api { source: Arc<ApiError> },
}

/// Does what the source does first: authenticates, finds the endpoint and requests the ports of
/// this host.
///
/// # Errors
/// Neutron or Keystone cannot be used. The message names the options to check.
pub(crate) async fn probe(settings: &NeutronSettings) -> Result<NeutronProbe, NeutronProbeError> {
    let (api, issuer) = connect(settings).await?;
    let filters = [host_filter(&settings.host)];
    let request = api.ports(FIELDS, &filters, api::HOST_PORTS_LIMIT, |_| true);
    let ports = match issuer {
        None => request.await,
        Some(issuer) => tokio::select! {
            ports = request => ports,
            () = issuer.serve() => unreachable!("it runs while there is a handle"),
        },
    };
    let ports = ports.map_err(|source| NeutronProbeError::Api { source })?;
    Ok(if ports.is_empty() { NeutronProbe::NoPorts } else { NeutronProbe::Ports })
}

fn host_filter(host: &str) -> Filter {
    ("binding:host_id", host.to_owned())
}

struct NeutronSource {
    host: String,
    api: Api,
    present: watch::Receiver<Presence>,
    refused: broadcast::Receiver<RefusedSource>,
    events: mpsc::Sender<Event>,
    reporter: Reporter,
    lookup: Lookup,
    poller: PortPoller,
    ready: bool,
    error: Option<Arc<ApiError>>,
}

/// Query in progress.
type PendingQuery = Pin<Box<dyn Future<Output = (PortQuery, Result<PortResponse, Arc<ApiError>>)> + Send>>;

/// Response to a [`PortQuery`].
struct PortResponse {
    /// The ports of the interfaces that the query is about.
    ports: Vec<ParsedPort>,
    /// The ids of all ports.
    listed: BTreeSet<PortId>,
}

impl NeutronSource {
    /// Runs until the receiver of events is dropped.
    async fn run(mut self) {
        let mut pending: Option<PendingQuery> = None;
        loop {
            let due = self
                .poller
                .next_due()
                .map(|due| self.api.blocked_until().map_or(due, |until| due.max(until)));
            let due = due.filter(|_| pending.is_none());
            let receiver = tokio::select! {
                // Interfaces that disappeared are withdrawn before responses are handled.
                biased;
                changed = self.present.changed() => match changed {
                    Ok(()) => {
                        let presence = Arc::clone(&self.present.borrow_and_update());
                        let events = self.poller.update_presence(&presence, Instant::now());
                        self.send(events).await
                    }
                    // The sender is dropped only when the agent stops.
                    Err(_) => std::future::pending().await,
                },
                (query, response) = completion(&mut pending) => {
                    pending = None;
                    self.handle(&query, response).await
                }
                refused = next_refused(&mut self.refused) => {
                    self.poller.recheck(refused.index, Instant::now());
                    Some(())
                }
                () = until(due) => {
                    pending = self.start_query();
                    Some(())
                }
            };
            if receiver.is_none() {
                return;
            }
        }
    }

    fn start_query(&self) -> Option<PendingQuery> {
        let query = self.poller.query(Instant::now())?;
        let (api, host) = (self.api.clone(), self.host.clone());
        Some(Box::pin(async move {
            let filters: Vec<Filter> = match &query.ports {
                PortSelection::Host => vec![host_filter(&host)],
                PortSelection::Ids(ids) => ids.iter().map(|id| ("id", id.to_string())).collect(),
                PortSelection::Macs(macs) => {
                    macs.iter().map(|mac| ("mac_address", mac.to_string())).collect()
                }
            };
            let mut listed = BTreeSet::new();
            let keep = |id| {
                listed.insert(id);
                query.matches(id)
            };
            let ports = match api.ports(FIELDS, &filters, api::HOST_PORTS_LIMIT, keep).await {
                Ok(ports) => with_subports(&api, ports).await,
                Err(error) => Err(error),
            };
            (query, ports.map(|ports| PortResponse { ports, listed }))
        }))
    }

    async fn handle(
        &mut self,
        query: &PortQuery,
        response: Result<PortResponse, Arc<ApiError>>,
    ) -> Option<()> {
        let now = Instant::now();
        self.ready = true;
        let events = match response {
            Ok(PortResponse { ports, listed }) => {
                self.error = None;
                self.poller.keep_listed(query, listed);
                self.poller.handle_response(query, &ports, now)
            }
            Err(error) => {
                self.error = Some(error);
                self.poller.failed(now);
                Vec::new()
            }
        };
        self.send(events).await
    }

    /// Sends withdrawals first, so that an address that moves from one port to another is never
    /// reported by both.
    async fn send(&mut self, events: Vec<Event>) -> Option<()> {
        let (withdrawals, updates): (Vec<_>, Vec<_>) =
            events.into_iter().partition(|event| event.ports.is_empty());
        for event in withdrawals.into_iter().chain(updates) {
            if let Ok(port) = event.key.parse() {
                self.lookup.forget(port).await;
            }
            self.events.send(event).await.ok()?;
        }
        self.report();
        Some(())
    }

    fn report(&self) {
        let ports = self.poller.errors().map(|(id, error)| (format!("port {id}"), error.to_string()));
        let mut faults: BTreeMap<_, _> = ports.collect();
        if let Some(error) = &self.error {
            faults.insert(error.place.clone(), error.to_string());
        }
        self.reporter.report(self.ready, self.poller.ports(), 0, faults);
    }
}

/// Requests the subports of trunks among these ports.
async fn with_subports(api: &Api, mut ports: Vec<ParsedPort>) -> Result<Vec<ParsedPort>, Arc<ApiError>> {
    let incomplete = ports.iter().flat_map(|(_, row)| row.iter().flat_map(PortDetails::incomplete_subports));
    let incomplete: Vec<_> = incomplete.collect::<BTreeSet<_>>().into_iter().collect();
    let mut rows = BTreeMap::new();
    for some in incomplete.chunks(poller::MAX_IDS) {
        let filters: Vec<Filter> = some.iter().map(|id| ("id", id.to_string())).collect();
        let subports = api.ports(FIELDS, &filters, api::SINGLE_PORTS_LIMIT, |id| some.contains(&id)).await?;
        rows.extend(subports.into_iter().map(|(id, row)| (id, row.map(|details| details.record))));
    }
    for (_, row) in &mut ports {
        if let Ok(details) = row {
            details.complete(&rows);
        }
    }
    Ok(ports)
}

async fn completion(pending: &mut Option<PendingQuery>) -> (PortQuery, Result<PortResponse, Arc<ApiError>>) {
    match pending {
        Some(pending) => pending.await,
        None => std::future::pending().await,
    }
}

async fn next_refused(refused: &mut broadcast::Receiver<RefusedSource>) -> RefusedSource {
    loop {
        match refused.recv().await {
            Ok(refused) => return refused,
            // A guest that still has no answer causes another report.
            Err(RecvError::Lagged(_)) => {}
            // The sender is dropped only when the agent stops.
            Err(RecvError::Closed) => return std::future::pending().await,
        }
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
