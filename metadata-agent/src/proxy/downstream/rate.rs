//! Limits the request rate of a guest: Neutron's `metadata_rate_limiting`, per guest.
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
//! All ports and addresses of a guest share its windows, in both IP versions. An IP version that is
//! not limited is neither counted nor refused. Guests behind a shared attachment may be made up, so
//! they also share the windows of their group. These are [`GROUP_GUESTS`] times as large, and the
//! last quarter is for guests without a request in their own windows.
//!
//! A connection keeps a reference to its guest's windows, so a request needs no look-up and no
//! allocation, and its lock is contended only by the same guest. Empty windows without a connection
//! are removed when the table has doubled since the last removal.
//!
//! A refused request gets 429, which clients repeat. cloud-init's search for a metadata service
//! treats 429 as a final no, and 503 with Retry-After as not yet (cloudinit/url_helper.py,
//! `wait_for_url`). So the requests of that search get 503.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper::Method;
use hyper::http::uri::PathAndQuery;
use metadata_ebpf::identity::GuestAddress;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::proxy::client::{GuestConnection, GuestGroup, GuestKey, LimitedGuest};
use crate::proxy::request::Rejection;

/// Paths that cloud-init's search requests first, from `OpenStack` and from EC2.
const PROBES: [&str; 3] = ["/openstack", "/openstack/", "/2009-04-04/meta-data/instance-id"];

/// One more than fit into the window, because the window overlaps the oldest one.
const SLOTS: u32 = 64;

/// Number of guests below which empty windows are kept.
const MIN_CLEAR: u32 = 64;

/// Number of guests whose full rate fits into the windows of a group: those of a /24 network.
const GROUP_GUESTS: u32 = 256;

/// Part of a group's window that is reserved for guests without a request in their own windows.
const GROUP_RESERVE: u32 = 4;

/// The request rate of each guest.
#[derive(Debug, Clone, Deserialize, Serialize)]
pub struct RateLimit {
    /// Both apply at once.
    pub windows: [RateWindow; 2],
    /// Limits clients with an IPv4 address.
    pub ipv4: bool,
    /// Limits clients with an IPv6 address.
    pub ipv6: bool,
}

/// A number of requests in any period of this length.
#[derive(Debug, Clone, Copy, Deserialize, Serialize)]
pub struct RateWindow {
    pub requests: u32,
    pub length: Duration,
}

/// The windows of all guests and groups.
#[derive(Debug)]
pub(crate) struct GuestRates {
    limit: RateLimit,
    tables: Mutex<RateTables>,
}

#[derive(Debug, Default)]
struct RateTables {
    guests: RateTable<GuestKey>,
    groups: RateTable<GuestGroup>,
}

impl GuestRates {
    pub(crate) fn new(limit: RateLimit) -> Self {
        Self { limit, tables: Mutex::default() }
    }

    /// Returns the windows of the guest on this connection, if its IP version is limited.
    pub(crate) fn connection(&self, guest: &GuestConnection) -> Option<GuestRate> {
        self.is_limited(&guest.address().guest).then(|| self.guest(guest.limited()))
    }

    /// Returns the windows of the instance that was found behind this connection, if it counts for
    /// more than the connection did. The group has counted the request already.
    pub(crate) fn instance(&self, guest: &GuestConnection, identified: LimitedGuest) -> Option<GuestRate> {
        let is_more = identified.key != guest.limited().key;
        (is_more && self.is_limited(&guest.address().guest))
            .then(|| self.guest(LimitedGuest { group: None, ..identified }))
    }

    fn is_limited(&self, address: &GuestAddress) -> bool {
        match address {
            GuestAddress::Ipv4(_) => self.limit.ipv4,
            GuestAddress::Ipv6LinkLocal(_) => self.limit.ipv6,
        }
    }

    fn guest(&self, guest: LimitedGuest) -> GuestRate {
        let windows = &self.limit.windows;
        let all = windows.map(|RateWindow { requests, length }| RateWindow {
            requests: requests.saturating_mul(GROUP_GUESTS),
            length,
        });
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        let group = guest.group.map(|group| tables.groups.windows(group, &all));
        GuestRate { own: tables.guests.windows(guest.key, windows), group }
    }
}

#[derive(Debug)]
struct RateTable<K> {
    windows: HashMap<K, Arc<Windows>>,
    clear_at: usize,
}

impl<K> Default for RateTable<K> {
    fn default() -> Self {
        Self { windows: HashMap::new(), clear_at: MIN_CLEAR as usize }
    }
}

impl<K: Eq + Hash> RateTable<K> {
    fn windows(&mut self, key: K, limits: &[RateWindow; 2]) -> Arc<Windows> {
        if let Some(windows) = self.windows.get(&key) {
            return Arc::clone(windows);
        }
        if self.windows.len() >= self.clear_at {
            // New references come only from this table, which is locked.
            self.windows.retain(|_, windows| Arc::strong_count(windows) > 1 || !windows.is_empty());
            self.clear_at = (MIN_CLEAR as usize).max(2 * self.windows.len());
        }
        let windows = Arc::new(Windows::new(limits));
        self.windows.insert(key, Arc::clone(&windows));
        windows
    }
}

/// The request rate of one guest.
#[derive(Debug)]
pub(crate) struct GuestRate {
    own: Arc<Windows>,
    group: Option<Arc<Windows>>,
}

impl GuestRate {
    /// Counts a request, or rejects it if a window is full.
    pub(crate) fn admit(&self, method: &Method, path: &PathAndQuery) -> Result<(), Rejection> {
        let admitted = self.own.at_now(|own| {
            let is_new = own.iter().all(Window::is_empty);
            if own.iter().all(Window::has_room) && self.group.as_ref().is_none_or(|group| group.admit(is_new))
            {
                own.iter_mut().for_each(Window::count);
                return true;
            }
            false
        });
        if admitted {
            return Ok(());
        }
        Err(Rejection::RateLimited { probe: *method == Method::GET && PROBES.contains(&path.path()) })
    }
}

/// The base window and the burst window.
#[derive(Debug)]
struct Windows {
    began: Instant,
    windows: Mutex<[Window; 2]>,
}

impl Windows {
    fn new(limits: &[RateWindow; 2]) -> Self {
        Self { began: Instant::now(), windows: Mutex::new(limits.map(Window::new)) }
    }

    /// Counts a request for a group, if the guest may use what is left.
    fn admit(&self, is_new: bool) -> bool {
        self.at_now(|windows| {
            let may_use = |window: &Window| if is_new { window.has_room() } else { window.has_spare_room() };
            let has_room = windows.iter().all(may_use);
            if has_room {
                windows.iter_mut().for_each(Window::count);
            }
            has_room
        })
    }

    fn is_empty(&self) -> bool {
        self.at_now(|windows| windows.iter().all(Window::is_empty))
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

    fn is_empty(&self) -> bool {
        self.total == 0
    }

    fn has_room(&self) -> bool {
        self.total < self.limit
    }

    /// Returns whether there is room beside the reserve for new guests.
    fn has_spare_room(&self) -> bool {
        self.total < self.limit - self.limit / GROUP_RESERVE
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
    use crate::proxy::client::ClientSource;
    use crate::proxy::client::samples::{attachment, guest, neighbour};
    use metadata_ebpf::identity::ClientAddress;
    use proptest::collection::vec;
    use proptest::prelude::*;
    use tokio::time::advance;

    const SECOND: Duration = Duration::from_secs(1);

    fn window(requests: u32, seconds: u64) -> RateWindow {
        RateWindow { requests, length: Duration::from_secs(seconds) }
    }

    fn rates(base: RateWindow, burst: RateWindow) -> GuestRates {
        GuestRates::new(RateLimit { windows: [base, burst], ipv4: true, ipv6: false })
    }

    fn ask(rate: &GuestRate, path: &'static str) -> Result<(), Rejection> {
        rate.admit(&Method::GET, &PathAndQuery::from_static(path))
    }

    fn passes(rate: &GuestRate) -> bool {
        ask(rate, "/latest").is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn both_windows_apply_and_refusals_do_not_count() {
        let rates = rates(window(5, 10), window(2, 1));
        let rate = rates.guest(guest(1));
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
    async fn connections_of_a_guest_share_its_windows() {
        let rates = rates(window(1, 10), window(1, 10));
        let [first, second, neighbour] = [1, 1, 2].map(|id| rates.guest(guest(id)));
        assert_eq!([&first, &second, &neighbour].map(passes), [true, false, true]);
        drop((first, second));
        assert!(!passes(&rates.guest(guest(1))), "a new connection is not a new guest");
    }

    #[test]
    fn an_ip_version_counts_only_if_it_is_limited() {
        let v4 = ClientAddress::ipv4(attachment(1), [10, 0, 0, 5]);
        let v6 = ClientAddress { guest: GuestAddress::Ipv6LinkLocal([1; 8]), ..v4 };
        let connections = [v4, v6].map(|client| ClientSource::guest(client, guest(1)));
        let one = window(1, 10);
        let of = |ipv4, ipv6| {
            let rates = GuestRates::new(RateLimit { windows: [one, one], ipv4, ipv6 });
            connections.each_ref().map(|source| {
                let rate = rates.connection(source.guest_connection().unwrap());
                rate.map(|rate| passes(&rate))
            })
        };
        assert_eq!(of(true, false), [Some(true), None]);
        assert_eq!(of(false, true), [None, Some(true)]);
        assert_eq!(of(true, true), [Some(true), Some(false)]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_guest_does_not_use_up_its_neighbours_requests() {
        let rates = rates(window(5, 10), window(5, 10));
        let [busy, other] = [1, 2].map(|id| rates.guest(neighbour(id)));
        assert_eq!((0..100).filter(|_| passes(&busy)).count(), 5);
        assert_eq!((0..100).filter(|_| passes(&other)).count(), 5);
    }

    #[tokio::test(start_paused = true)]
    async fn made_up_guests_leave_requests_for_new_ones() {
        let rates = rates(window(8, 10), window(8, 10));
        let passed = |id| {
            let rate = rates.guest(neighbour(id));
            (0..100).map(|_| u32::from(passes(&rate))).sum::<u32>()
        };
        let all: u32 = (1..=GROUP_GUESTS).map(passed).sum();
        assert!(all >= 8 * (GROUP_GUESTS - GROUP_GUESTS / GROUP_RESERVE), "{all}");
        // From then on, each new guest gets a first request.
        for id in 1000..1100 {
            assert_eq!(passed(id), 1);
        }
        assert_eq!((0..9).filter(|_| passes(&rates.guest(guest(2)))).count(), 8, "another attachment");
    }

    #[tokio::test(start_paused = true)]
    async fn an_identified_guest_counts_for_its_instance_too() {
        let rates = rates(window(1, 10), window(1, 10));
        let instance = GuestKey::Instance("3b0e5c6e-9a1f-4d0a-8f0b-1c2d3e4f5a6b".parse().unwrap());
        let passed = [1, 2].map(|id| {
            let client = ClientAddress::ipv4(attachment(1), [10, 0, 0, 5]);
            let source = ClientSource::guest(client, neighbour(id));
            let connection = source.guest_connection().unwrap();
            assert!(rates.instance(connection, neighbour(id)).is_none(), "nothing new is known");
            let identified = LimitedGuest { key: instance, ..neighbour(id) };
            passes(&rates.instance(connection, identified).unwrap())
        });
        assert_eq!(passed, [true, false]);
    }

    #[test]
    fn the_search_for_the_service_gets_503() {
        let rates = rates(window(1, 10), window(1, 10));
        let rate = rates.guest(guest(1));
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
    async fn windows_of_idle_guests_are_removed() {
        let rates = rates(window(1, 10), window(1, 10));
        let len = || rates.tables.lock().unwrap().guests.windows.len();
        let held = rates.guest(guest(1));
        assert!(passes(&rates.guest(guest(2))));
        advance(9 * SECOND).await;
        assert!(passes(&rates.guest(guest(3))));
        for id in 4..=MIN_CLEAR {
            rates.guest(guest(id));
        }
        assert_eq!(len(), MIN_CLEAR as usize);
        advance(2 * SECOND).await;
        rates.guest(guest(100));
        assert_eq!(len(), 3, "used by a connection, counted recently, new");
        assert!(!passes(&rates.guest(guest(3))));
        assert!(Arc::ptr_eq(&held.own, &rates.guest(guest(1)).own));
        for id in 1000..20_000 {
            rates.guest(guest(id));
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
