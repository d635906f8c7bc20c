//! The endpoints of the metadata API, and what was learned about each.
//!
//! The endpoint that answers is asked first. One that refuses, times out, or answers with an error
//! of its own gives up the first place to the next one.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::Endpoint;
use super::access::NameLookup;
use super::address::UpstreamAddress;
use super::connect::Addresses;
use super::pool::Reuse;
use crate::proxy::log_throttle::LogThrottle;
use crate::proxy::metrics::Metrics;

/// How long a failure counts against an endpoint.
const MEMORY: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub(super) struct Endpoints {
    all: Vec<Arc<EndpointState>>,
    /// Index of the endpoint that is asked first.
    preferred: AtomicUsize,
}

/// An endpoint of the metadata API, with what was learned about it.
#[derive(Debug)]
pub(super) struct EndpointState {
    pub(super) endpoint: Endpoint,
    pub(super) addresses: Addresses,
    /// The number of times that it was silent. Connections from before the last one are not reused.
    silences: AtomicU32,
    failed_at: Mutex<Option<Instant>>,
    log: LogThrottle,
}

impl Endpoints {
    pub(super) fn new(endpoints: Vec<Endpoint>, names: &Arc<dyn NameLookup>) -> Self {
        let all = endpoints.into_iter().map(|endpoint| EndpointState::new(endpoint, names)).collect();
        Self { all, preferred: AtomicUsize::new(0) }
    }

    pub(super) fn is_single(&self) -> bool {
        self.all.len() == 1
    }

    pub(super) fn preferred(&self) -> &Arc<EndpointState> {
        &self.all[self.preferred.load(Ordering::Relaxed)]
    }

    /// Returns all endpoints, the preferred one first.
    pub(super) fn in_order(&self) -> impl ExactSizeIterator<Item = &Arc<EndpointState>> {
        let first = self.preferred.load(Ordering::Relaxed);
        (0..self.all.len()).map(move |at| &self.all[(first + at) % self.all.len()])
    }

    pub(super) fn prefer(&self, endpoint: &Arc<EndpointState>) {
        if let Some(at) = self.all.iter().position(|known| Arc::ptr_eq(known, endpoint)) {
            self.preferred.store(at, Ordering::Relaxed);
        }
    }

    /// Prefers another endpoint, unless all of them failed lately. So an error that only one
    /// guest's requests cause does not send all guests to an endpoint that is down.
    pub(super) fn failed(&self, endpoint: &Arc<EndpointState>) {
        *endpoint.failed_at.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        if Arc::ptr_eq(self.preferred(), endpoint)
            && let Some(next) = self.in_order().skip(1).find(|other| !other.has_failed_lately())
        {
            self.prefer(next);
        }
    }
}

impl EndpointState {
    fn new(endpoint: Endpoint, names: &Arc<dyn NameLookup>) -> Arc<Self> {
        let addresses = Addresses::new(&endpoint.address, names);
        let (silences, failed_at, log) = (AtomicU32::new(0), Mutex::default(), LogThrottle::new());
        Arc::new(Self { endpoint, addresses, silences, failed_at, log })
    }

    pub(super) fn address(&self) -> UpstreamAddress {
        self.endpoint.address.clone()
    }

    /// Returns the number of times that it was silent.
    pub(super) fn silences(&self) -> u32 {
        self.silences.load(Ordering::Relaxed)
    }

    /// Takes the peers of its idle connections for dead.
    pub(super) fn was_silent(&self) {
        self.silences.fetch_add(1, Ordering::Relaxed);
    }

    fn has_failed_lately(&self) -> bool {
        let failed_at = *self.failed_at.lock().unwrap_or_else(PoisonError::into_inner);
        failed_at.is_some_and(|at| at.elapsed() < MEMORY)
    }

    /// Reports that the server sent bytes that answer no request, to the guest's share too.
    pub(super) fn report_unsolicited(&self, reuse: Option<&Reuse>, metrics: &Metrics) {
        if let Some(reuse) = reuse {
            reuse.suspend();
        }
        metrics.upstream_unsolicited();
        if self.log.allow() {
            let address = tracing::field::display(&self.endpoint.address);
            tracing::warn!(
                address,
                "server sent more than one response; the guest's connections are not reused"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::Scheme;
    use crate::proxy::upstream::access::NameLookupFuture;

    /// Is not asked: the endpoints here have addresses.
    #[derive(Debug)]
    struct NoNames;

    impl NameLookup for NoNames {
        fn look_up<'a>(&'a self, host: &'a str, _: u16) -> NameLookupFuture<'a> {
            unreachable!("{host} is an address")
        }
    }

    fn endpoints(count: u8) -> Endpoints {
        let endpoint = |number| Endpoint::new(Scheme::Http, &format!("192.0.2.{number}"), 8775).unwrap();
        let names: Arc<dyn NameLookup> = Arc::new(NoNames);
        Endpoints::new((0..count).map(endpoint).collect(), &names)
    }

    #[tokio::test(start_paused = true)]
    async fn a_failed_endpoint_is_asked_last_for_a_while() {
        let endpoints = endpoints(3);
        let [a, b, c] = [0, 1, 2].map(|at| Arc::clone(&endpoints.all[at]));
        endpoints.failed(&b);
        assert!(Arc::ptr_eq(endpoints.preferred(), &a), "a failure of another one changes nothing");
        endpoints.failed(&a);
        assert!(Arc::ptr_eq(endpoints.preferred(), &c), "the second one failed lately");
        endpoints.failed(&c);
        assert!(Arc::ptr_eq(endpoints.preferred(), &c), "all failed");
        tokio::time::advance(MEMORY).await;
        endpoints.failed(&c);
        assert!(Arc::ptr_eq(endpoints.preferred(), &a));
        endpoints.prefer(&b);
        let order: Vec<_> = endpoints.in_order().map(Arc::as_ptr).collect();
        assert_eq!(order, [&b, &c, &a].map(Arc::as_ptr));
    }

    #[tokio::test]
    async fn a_single_endpoint_stays_preferred() {
        let endpoints = endpoints(1);
        let only = Arc::clone(endpoints.preferred());
        endpoints.failed(&only);
        assert!(Arc::ptr_eq(endpoints.preferred(), &only));
    }
}
