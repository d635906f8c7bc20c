//! How often a guest may ask: Neutron's `metadata_rate_limiting`, counted per attachment.
//!
//! Two windows slide side by side, and a request passes if both have room. Each is cut into slots and counts a request
//! until its slot has left the window wholly, which gives two promises: in no window's length, wherever it begins, pass
//! more requests than its limit; and a guest that stays within the limit over a 63rd more than the length is never
//! refused. What is refused is not counted: a guest that asks in vain is served again as soon as the window has room.
//! (haproxy's `http_req_rate` counts refused requests too, so whoever goes on asking stays out.)
//!
//! All of a port's clients share its windows, whatever their addresses and IP versions; IP versions that are not limited
//! are neither counted nor refused. A connection takes its port's windows along when it begins, so that a request finds
//! them without a look-up, in constant time and without allocation, behind a lock that only the port's own connections
//! want. Windows that are empty and in nobody's hand go when the table has doubled since it was cleared last.
//!
//! A refused request is answered with 429, which clients repeat, but not the ones by which cloud-init finds out whether
//! there is a metadata service at all: there it takes 429 for a no that is final, and 503 with Retry-After for a
//! not yet (cloudinit/url_helper.py, `wait_for_url`).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper::Method;
use hyper::http::uri::PathAndQuery;
use metadata_ebpf::identity::{AttachmentId, ClientAddress, GuestAddress};
use tokio::time::Instant;

use super::fault::Fault;

/// What cloud-init asks for first: of `OpenStack`, of EC2.
const PROBES: [&str; 3] = ["/openstack", "/openstack/", "/2009-04-04/meta-data/instance-id"];

/// One more than the window has, since the window reaches into the oldest one.
const SLOTS: u32 = 64;

/// Attachments that need no clearing.
const FEW: u32 = 64;

/// How often each port's guest may ask.
#[derive(Debug, Clone)]
pub struct RateLimit {
    /// Both hold at once.
    pub windows: [RateWindow; 2],
    /// Whether clients with an IPv4 address are limited.
    pub ipv4: bool,
    /// Whether clients with an IPv6 address are limited.
    pub ipv6: bool,
}

/// So many requests in any such time.
#[derive(Debug, Clone, Copy)]
pub struct RateWindow {
    /// How many.
    pub requests: u32,
    /// In which time.
    pub length: Duration,
}

/// The windows of all ports.
#[derive(Debug)]
pub(super) struct Rates {
    limit: RateLimit,
    ports: Mutex<Ports>,
}

#[derive(Debug)]
struct Ports {
    rates: HashMap<AttachmentId, Arc<PortRate>>,
    clear_at: usize,
}

impl Rates {
    pub(super) fn new(limit: RateLimit) -> Self {
        Self { limit, ports: Mutex::new(Ports { rates: HashMap::new(), clear_at: FEW as usize }) }
    }

    /// The windows that a client's requests count in, if they count.
    pub(super) fn of(&self, client: &ClientAddress) -> Option<Arc<PortRate>> {
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
                // A second hand comes only out of this table, which is locked.
                ports.rates.retain(|_, rate| Arc::strong_count(rate) > 1 || !rate.is_empty());
                ports.clear_at = (FEW as usize).max(2 * ports.rates.len());
            }
            let rate = Arc::new(PortRate::new(&self.limit.windows));
            ports.rates.insert(client.attachment, Arc::clone(&rate));
            rate
        })
    }
}

/// The windows of one port.
#[derive(Debug)]
pub(super) struct PortRate {
    began: Instant,
    windows: Mutex<[Window; 2]>,
}

impl PortRate {
    fn new(windows: &[RateWindow; 2]) -> Self {
        Self { began: Instant::now(), windows: Mutex::new(windows.map(Window::new)) }
    }

    /// Counts a request, unless it is too much.
    pub(super) fn admit(&self, method: &Method, path: &PathAndQuery) -> Result<(), Fault> {
        if self.at_now(|windows| {
            let has_room = windows.iter().all(Window::has_room);
            if has_room {
                windows.iter_mut().for_each(Window::count);
            }
            has_room
        }) {
            return Ok(());
        }
        Err(Fault::RateLimited { probe: *method == Method::GET && PROBES.contains(&path.path()) })
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

/// One window: how many requests fell into each of its slots.
#[derive(Debug)]
struct Window {
    limit: u32,
    slot: Duration,
    /// The number of the slot that is now, counted from the beginning.
    now: u128,
    counts: [u32; SLOTS as usize],
    total: u32,
}

impl Window {
    fn new(RateWindow { requests, length }: RateWindow) -> Self {
        // Rounded up by a nanosecond: rather too long than too short.
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

    fn rates(base: RateWindow, burst: RateWindow) -> Rates {
        Rates::new(RateLimit { windows: [base, burst], ipv4: true, ipv6: false })
    }

    fn client(attachment: u32) -> ClientAddress {
        ClientAddress::ipv4(AttachmentId::new(attachment).unwrap(), [10, 0, 0, 5])
    }

    fn ask(rate: &PortRate, path: &'static str) -> Result<(), Fault> {
        rate.admit(&Method::GET, &PathAndQuery::from_static(path))
    }

    fn passes(rate: &PortRate) -> bool {
        ask(rate, "/latest").is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn both_windows_hold_and_what_is_refused_does_not_count() {
        let rates = rates(window(5, 10), window(2, 1));
        let rate = rates.of(&client(1)).unwrap();
        let mut passed = Vec::new();
        for _ in 0..100 {
            passed.push((0..3).filter(|_| passes(&rate)).count());
            advance(SECOND + SECOND / 32).await;
        }
        // Two a burst, five in all; and the same again when the first ones leave the longer window, however often the
        // guest asked in vain meanwhile.
        assert_eq!(passed[..10], [2, 2, 1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(passed[10..20], passed[..10]);
        assert_eq!(passed.iter().sum::<usize>(), 50);
    }

    #[tokio::test(start_paused = true)]
    async fn a_port_is_one_whatever_its_connections_and_its_neighbour_is_another() {
        let rates = rates(window(1, 10), window(1, 10));
        let [first, second, neighbour] = [1, 1, 2].map(|id| rates.of(&client(id)).unwrap());
        assert_eq!([&first, &second, &neighbour].map(|rate| passes(rate)), [true, false, true]);
        drop((first, second));
        assert!(!passes(&rates.of(&client(1)).unwrap()), "a new connection is no new port");
    }

    #[test]
    fn an_ip_version_that_is_not_named_is_free_and_two_that_are_share() {
        let v4 = client(1);
        let v6 = ClientAddress { guest: GuestAddress::Ipv6LinkLocal([1; 8]), ..v4 };
        let one = window(1, 10);
        let of = |ipv4, ipv6| {
            let rates = Rates::new(RateLimit { windows: [one, one], ipv4, ipv6 });
            [v4, v6].map(|client| rates.of(&client).map(|rate| passes(&rate)))
        };
        assert_eq!(of(true, false), [Some(true), None]);
        assert_eq!(of(false, true), [None, Some(true)]);
        assert_eq!(of(true, true), [Some(true), Some(false)]);
    }

    #[test]
    fn the_search_for_the_service_is_told_to_come_back() {
        let rates = rates(window(1, 10), window(1, 10));
        let rate = rates.of(&client(1)).unwrap();
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
    async fn ports_that_went_are_forgotten_and_busy_ones_are_not() {
        let rates = rates(window(1, 10), window(1, 10));
        let len = || rates.ports.lock().unwrap().rates.len();
        let held = rates.of(&client(1)).unwrap();
        assert!(passes(&rates.of(&client(2)).unwrap()));
        advance(9 * SECOND).await;
        assert!(passes(&rates.of(&client(3)).unwrap()));
        for id in 4..=FEW {
            rates.of(&client(id)).unwrap();
        }
        assert_eq!(len(), FEW as usize);
        advance(2 * SECOND).await;
        rates.of(&client(100)).unwrap();
        assert_eq!(len(), 3, "in a connection's hand, asked just now, new");
        assert!(!passes(&rates.of(&client(3)).unwrap()));
        assert!(Arc::ptr_eq(&held, &rates.of(&client(1)).unwrap()));
        for id in 1000..20_000 {
            rates.of(&client(id)).unwrap();
        }
        assert!(len() <= 2 * FEW as usize, "{}", len());
    }

    proptest! {
        /// In no time as long as the window pass more than its limit; and refused is only who had its fill just before.
        #[test]
        fn never_more_than_the_limit_and_never_less(
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
