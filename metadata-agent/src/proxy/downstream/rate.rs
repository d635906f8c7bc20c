//! Limits the request rate of a guest: Neutron's `metadata_rate_limiting`, per attachment.
//!
//! Two sliding windows must both have room for a request. Each is cut into slots, and counts a
//! request until its slot has left the window completely. This gives two guarantees. In any period
//! of the window's length, no more requests pass than its limit. A guest that stays within the
//! limit over a period longer by a 63rd is never refused.
//!
//! A refused request is not counted, so a guest is served again as soon as the window has room.
//! (haproxy's `http_req_rate` counts refused requests too, so a guest that keeps trying stays
//! locked out.)
//!
//! All clients of a port share its windows, whatever their addresses and IP versions. An IP version
//! that is not limited is neither counted nor refused. A connection keeps a reference to its port's
//! windows, so a request needs no look-up and no allocation, and its lock is contended only by the
//! same port. Empty windows without a connection are removed when the table has doubled since the
//! last removal.
//!
//! A refused request gets 429, which clients repeat. cloud-init's search for a metadata service
//! treats 429 as a final no, and 503 with Retry-After as not yet (cloudinit/url_helper.py,
//! `wait_for_url`). So the requests of that search get 503.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper::Method;
use hyper::http::uri::PathAndQuery;
use metadata_ebpf::identity::{AttachmentId, ClientAddress, GuestAddress};
use tokio::time::Instant;

use crate::proxy::request::Rejection;

/// Paths that cloud-init's search requests first, from `OpenStack` and from EC2.
const PROBES: [&str; 3] = ["/openstack", "/openstack/", "/2009-04-04/meta-data/instance-id"];

/// One more than fit into the window, because the window overlaps the oldest one.
const SLOTS: u32 = 64;

/// Number of attachments below which empty windows are kept.
const MIN_CLEAR: u32 = 64;

/// The request rate of each port.
#[derive(Debug, Clone)]
pub struct RateLimit {
    /// Both apply at once.
    pub windows: [RateWindow; 2],
    /// Limits clients with an IPv4 address.
    pub ipv4: bool,
    /// Limits clients with an IPv6 address.
    pub ipv6: bool,
}

/// A number of requests in any period of this length.
#[derive(Debug, Clone, Copy)]
pub struct RateWindow {
    pub requests: u32,
    pub length: Duration,
}

/// The windows of all ports.
#[derive(Debug)]
pub(crate) struct PortRates {
    limit: RateLimit,
    ports: Mutex<RateTable>,
}

#[derive(Debug)]
struct RateTable {
    rates: HashMap<AttachmentId, Arc<PortRate>>,
    clear_at: usize,
}

impl PortRates {
    pub(crate) fn new(limit: RateLimit) -> Self {
        Self { limit, ports: Mutex::new(RateTable { rates: HashMap::new(), clear_at: MIN_CLEAR as usize }) }
    }

    /// Returns the windows of a client's port, if the client is limited.
    pub(crate) fn port(&self, client: &ClientAddress) -> Option<Arc<PortRate>> {
        let is_limited = match client.guest {
            GuestAddress::Ipv4(_) => self.limit.ipv4,
            GuestAddress::Ipv6LinkLocal(_) => self.limit.ipv6,
        };
        is_limited.then(|| {
            let mut ports = self.ports.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(rate) = ports.rates.get(&client.attachment) {
                return Arc::clone(rate);
            }
            if ports.rates.len() >= ports.clear_at {
                // New references come only from this table, which is locked.
                ports.rates.retain(|_, rate| Arc::strong_count(rate) > 1 || !rate.is_empty());
                ports.clear_at = (MIN_CLEAR as usize).max(2 * ports.rates.len());
            }
            let rate = Arc::new(PortRate::new(&self.limit.windows));
            ports.rates.insert(client.attachment, Arc::clone(&rate));
            rate
        })
    }
}

/// The windows of one port.
#[derive(Debug)]
pub(crate) struct PortRate {
    began: Instant,
    windows: Mutex<[Window; 2]>,
}

impl PortRate {
    fn new(windows: &[RateWindow; 2]) -> Self {
        Self { began: Instant::now(), windows: Mutex::new(windows.map(Window::new)) }
    }

    /// Counts a request, or rejects it if a window is full.
    pub(crate) fn admit(&self, method: &Method, path: &PathAndQuery) -> Result<(), Rejection> {
        if self.at_now(|windows| {
            let has_room = windows.iter().all(Window::has_room);
            if has_room {
                windows.iter_mut().for_each(Window::count);
            }
            has_room
        }) {
            return Ok(());
        }
        Err(Rejection::RateLimited { probe: *method == Method::GET && PROBES.contains(&path.path()) })
    }

    fn is_empty(&self) -> bool {
        self.at_now(|windows| windows.iter().all(|window| window.total == 0))
    }

    fn at_now<T>(&self, look: impl FnOnce(&mut [Window; 2]) -> T) -> T {
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.began.elapsed();
        windows.iter_mut().for_each(|window| window.slide(now));
        look(&mut windows)
    }
}

/// A sliding window: the number of requests in each of its slots.
#[derive(Debug)]
struct Window {
    limit: u32,
    slot: Duration,
    /// The number of the current slot, counted from the beginning.
    now: u128,
    counts: [u32; SLOTS as usize],
    total: u32,
}

impl Window {
    fn new(RateWindow { requests, length }: RateWindow) -> Self {
        // Rounded up by a nanosecond, so that the window is never too short.
        let slot = length / (SLOTS - 1) + Duration::from_nanos(1);
        Self { limit: requests, slot, now: 0, counts: [0; SLOTS as usize], total: 0 }
    }

    /// Forgets the slots that have left the window by `now`.
    fn slide(&mut self, now: Duration) {
        let slot = now.as_nanos() / self.slot.as_nanos();
        let passed = slot.saturating_sub(self.now).min(u128::from(SLOTS));
        for number in slot - passed + 1..=slot {
            let count = self.count_in(number);
            let forgotten = std::mem::take(count);
            self.total -= forgotten;
        }
        self.now = self.now.max(slot);
    }

    fn has_room(&self) -> bool {
        self.total < self.limit
    }

    fn count(&mut self) {
        *self.count_in(self.now) += 1;
        self.total += 1;
    }

    fn count_in(&mut self, slot: u128) -> &mut u32 {
        &mut self.counts[(slot % u128::from(SLOTS)) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;
    use tokio::time::advance;

    const SECOND: Duration = Duration::from_secs(1);

    fn window(requests: u32, seconds: u64) -> RateWindow {
        RateWindow { requests, length: Duration::from_secs(seconds) }
    }

    fn rates(base: RateWindow, burst: RateWindow) -> PortRates {
        PortRates::new(RateLimit { windows: [base, burst], ipv4: true, ipv6: false })
    }

    fn client(attachment: u32) -> ClientAddress {
        ClientAddress::ipv4(AttachmentId::new(attachment).unwrap(), [10, 0, 0, 5])
    }

    fn ask(rate: &PortRate, path: &'static str) -> Result<(), Rejection> {
        rate.admit(&Method::GET, &PathAndQuery::from_static(path))
    }

    fn passes(rate: &PortRate) -> bool {
        ask(rate, "/latest").is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn both_windows_apply_and_refusals_do_not_count() {
        let rates = rates(window(5, 10), window(2, 1));
        let rate = rates.port(&client(1)).unwrap();
        let mut passed = Vec::new();
        for _ in 0..100 {
            passed.push((0..3).filter(|_| passes(&rate)).count());
            advance(SECOND + SECOND / 32).await;
        }
        // Two per burst, five in all. The same again when the first ones leave the longer window,
        // however many requests were refused meanwhile.
        assert_eq!(passed[..10], [2, 2, 1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(passed[10..20], passed[..10]);
        assert_eq!(passed.iter().sum::<usize>(), 50);
    }

    #[tokio::test(start_paused = true)]
    async fn connections_of_a_port_share_its_windows() {
        let rates = rates(window(1, 10), window(1, 10));
        let [first, second, neighbour] = [1, 1, 2].map(|id| rates.port(&client(id)).unwrap());
        assert_eq!([&first, &second, &neighbour].map(|rate| passes(rate)), [true, false, true]);
        drop((first, second));
        assert!(!passes(&rates.port(&client(1)).unwrap()), "a new connection is not a new port");
    }

    #[test]
    fn an_ip_version_counts_only_if_it_is_limited() {
        let v4 = client(1);
        let v6 = ClientAddress { guest: GuestAddress::Ipv6LinkLocal([1; 8]), ..v4 };
        let one = window(1, 10);
        let of = |ipv4, ipv6| {
            let rates = PortRates::new(RateLimit { windows: [one, one], ipv4, ipv6 });
            [v4, v6].map(|client| rates.port(&client).map(|rate| passes(&rate)))
        };
        assert_eq!(of(true, false), [Some(true), None]);
        assert_eq!(of(false, true), [None, Some(true)]);
        assert_eq!(of(true, true), [Some(true), Some(false)]);
    }

    #[test]
    fn the_search_for_the_service_gets_503() {
        let rates = rates(window(1, 10), window(1, 10));
        let rate = rates.port(&client(1)).unwrap();
        assert!(passes(&rate));
        for (path, status) in [
            ("/openstack", 503),
            ("/openstack/", 503),
            ("/openstack?x", 503),
            ("/2009-04-04/meta-data/instance-id", 503),
            ("/openstack/latest/meta_data.json", 429),
            ("/2009-04-04/meta-data/", 429),
            ("/openstack//", 429),
        ] {
            let (response, closes) = ask(&rate, path).unwrap_err().response();
            assert_eq!((response.status().as_u16(), closes), (status, false), "{path}");
            assert_eq!(response.headers()["retry-after"], "1", "{path}");
        }
        let posted = rate.admit(&Method::POST, &PathAndQuery::from_static("/openstack"));
        assert_eq!(posted.unwrap_err().response().0.status(), 429);
    }

    #[tokio::test(start_paused = true)]
    async fn windows_of_idle_ports_are_removed() {
        let rates = rates(window(1, 10), window(1, 10));
        let len = || rates.ports.lock().unwrap().rates.len();
        let held = rates.port(&client(1)).unwrap();
        assert!(passes(&rates.port(&client(2)).unwrap()));
        advance(9 * SECOND).await;
        assert!(passes(&rates.port(&client(3)).unwrap()));
        for id in 4..=MIN_CLEAR {
            rates.port(&client(id)).unwrap();
        }
        assert_eq!(len(), MIN_CLEAR as usize);
        advance(2 * SECOND).await;
        rates.port(&client(100)).unwrap();
        assert_eq!(len(), 3, "used by a connection, counted recently, new");
        assert!(!passes(&rates.port(&client(3)).unwrap()));
        assert!(Arc::ptr_eq(&held, &rates.port(&client(1)).unwrap()));
        for id in 1000..20_000 {
            rates.port(&client(id)).unwrap();
        }
        assert!(len() <= 2 * MIN_CLEAR as usize, "{}", len());
    }

    proptest! {
        /// No period of the window's length passes more than the limit, and only a full window
        /// refuses.
        #[test]
        fn a_window_passes_exactly_its_limit(
            limit in 1_u32..12,
            length in 1_u64..20,
            pauses in vec(prop_oneof![0_u64..50, 0_u64..3_000_000_000], 1..300),
        ) {
            let length = Duration::from_secs(length);
            let mut window = Window::new(RateWindow { requests: limit, length });
            let (mut now, mut granted) = (Duration::ZERO, Vec::<Duration>::new());
            for pause in pauses {
                now += Duration::from_nanos(pause);
                window.slide(now);
                let within = |time: Duration| granted.iter().filter(|at| now < **at + time).count();
                if window.has_room() {
                    prop_assert!(within(length) < limit as usize);
                    window.count();
                    granted.push(now);
                } else {
                    let a_little_more = window.slot * SLOTS;
                    prop_assert!(within(a_little_more) >= limit as usize);
                }
            }
        }
    }
}
