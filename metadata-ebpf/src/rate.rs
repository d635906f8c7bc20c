//! Rate limits for new connections: the generic cell rate algorithm in one 64-bit word each.
//!
//! The words are read and written without a lock. CPUs that race on one may each admit a connection
//! for the same slot, so under contention the limit is approximate. A lock would cost more than
//! this error.
//!
//! An interface of one guest has one limit. Behind a shared interface each guest has a share, all
//! together have a total, and guests that were silent have a reserve ([`admit_shared`]).

use crate::abi::{GUEST_RATES, GuestShares};
use crate::reason::Reason;

/// The interface's rate divided by that of one entry of [`GuestShares::guests`]. A guest has two
/// entries, so it can open a quarter of the interface's connections.
const GUEST_DIVISOR: u64 = 8;
/// The interface's rate divided by that of its reserve, which comes on top.
const RESERVE_DIVISOR: u64 = 2;

/// Returns the theoretical arrival time to store if a new connection may pass now, `None`
/// otherwise. An interval of 0 admits all connections.
///
/// All arguments are nanoseconds of one clock. `tat` is the value that the last admitted connection
/// stored, or 0.
#[must_use]
#[inline(always)]
pub const fn admit(tat: u64, now: u64, interval: u64, burst: u64) -> Option<u64> {
    let tat = if tat > now { tat } else { now };
    if interval != 0 && tat - now > burst { None } else { Some(tat.wrapping_add(interval)) }
}

/// Two entries of [`GuestShares::guests`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestRate([u8; 2]);

impl GuestRate {
    /// Returns the entries of a guest. `keys` are secret and random, so a guest cannot choose a MAC
    /// address whose entries are those of another guest.
    ///
    /// Multiply-shift hashing (Dietzfelbinger et al., 1997): two MAC addresses that were chosen
    /// without the key agree in one entry with a probability of at most 2 in [`GUEST_RATES`].
    #[must_use]
    #[inline(always)]
    pub fn new(mac: [u8; 6], keys: [u64; 2]) -> Self {
        let [a, b, c, d, e, f] = mac;
        let mac = u64::from_be_bytes([0, 0, a, b, c, d, e, f]);
        // The product's upper byte, which all bytes of the MAC address have influenced.
        let entry = |key: u64| mac.wrapping_mul(key | 1).to_be_bytes()[0];
        Self([entry(keys[0]), entry(keys[1])])
    }
}

/// Settings of the limits.
#[derive(Clone, Copy, Debug)]
pub struct SynLimit {
    /// Minimum nanoseconds between new connections; 0 disables all limits.
    pub interval: u64,
    /// Nanoseconds by which a burst may run ahead.
    pub burst: u64,
}

/// Admits a new connection of a guest behind a shared interface.
///
/// * A guest needs room in its own share: in one of its two entries. Another guest blocks it only
///   if both entries collide with guests that use theirs up.
/// * `is_proven` states that the client has completed a handshake before. Such a guest can use the
///   whole total, any other guest half of its burst. So SYNs from made-up addresses, which never
///   complete a handshake, leave room for all guests that are not made up and were here before.
/// * A guest whose entry is unused can use the reserve. So guests that use up their shares leave
///   room for those that hold nothing.
///
/// # Errors
/// The limit that was reached.
#[inline(always)]
pub fn admit_shared(
    shares: &mut GuestShares,
    GuestRate([first, second]): GuestRate,
    is_proven: bool,
    now: u64,
    limit: SynLimit,
) -> Result<(), Reason> {
    let SynLimit { interval, burst } = limit;
    if interval == 0 {
        return Ok(());
    }

    // The guest's own share.
    let guest_interval = interval * GUEST_DIVISOR;
    let (first, second) = (usize::from(first) % GUEST_RATES, usize::from(second) % GUEST_RATES);
    let (entry, guest_tat) = match admit(shares.guests[first], now, guest_interval, burst) {
        Some(tat) => (first, tat),
        None => match admit(shares.guests[second], now, guest_interval, burst) {
            Some(tat) => (second, tat),
            None => return Err(Reason::GuestSynRate),
        },
    };
    let was_silent = shares.guests[entry] <= now;

    // The total, or the reserve.
    let total = admit(shares.total_tat_ns, now, interval, if is_proven { burst } else { burst / 2 });
    let reserve = admit(shares.reserve_tat_ns, now, interval * RESERVE_DIVISOR, burst);
    match (total, reserve) {
        // Others need the reserve less than those that have no claim to the whole total.
        (Some(tat), _) if is_proven || !was_silent => shares.total_tat_ns = tat,
        (_, Some(tat)) if was_silent => shares.reserve_tat_ns = tat,
        (Some(tat), _) => shares.total_tat_ns = tat,
        (None, _) => return Err(Reason::SynRate),
    }
    shares.guests[entry] = guest_tat;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: u64 = 1_000;
    const BURST: u64 = 4_000;

    fn admitted(tat: &mut u64, now: u64) -> bool {
        let next = admit(*tat, now, INTERVAL, BURST);
        *tat = next.unwrap_or(*tat);
        next.is_some()
    }

    #[test]
    fn a_burst_passes_then_one_each_interval() {
        let mut tat = 0;
        let now = 1_000_000;
        let burst = (0..10).filter(|_| admitted(&mut tat, now)).count();
        assert_eq!(burst, 5, "the burst and the one that is due");
        assert!(!admitted(&mut tat, now + INTERVAL - 1));
        assert!(admitted(&mut tat, now + INTERVAL));
        assert!(!admitted(&mut tat, now + INTERVAL));
    }

    #[test]
    fn interval_zero_admits_all() {
        assert_eq!(admit(u64::MAX, 1, 0, 0), Some(u64::MAX));
        let (mut shares, guest) = (GuestShares::UNUSED, GuestRate([1, 2]));
        shares.total_tat_ns = u64::MAX;
        assert_eq!(admit_shared(&mut shares, guest, false, 1, SynLimit { interval: 0, burst: 0 }), Ok(()));
    }

    /// An interface with the default limits, 2,000 connections per second and a burst of 4,000.
    struct Interface {
        shares: GuestShares,
        now: u64,
    }

    impl Interface {
        const LIMIT: SynLimit = SynLimit { interval: 500_000, burst: 4_000 * 500_000 };
        const KEYS: [u64; 2] = [0x9e37_79b9_7f4a_7c15, 0xc2b2_ae3d_27d4_eb4f];

        fn new() -> Self {
            Self { shares: GuestShares::UNUSED, now: 1_000_000_000_000 }
        }

        fn syn(&mut self, mac: [u8; 6], is_proven: bool) -> Result<(), Reason> {
            let guest = GuestRate::new(mac, Self::KEYS);
            admit_shared(&mut self.shares, guest, is_proven, self.now, Self::LIMIT)
        }

        /// Runs `seconds` of attack with so many SYNs per second, and counts how many of the
        /// bystander's 20 per second are refused.
        fn refused_beside(
            &mut self,
            seconds: u64,
            rate: u64,
            is_proven: bool,
            mut attack: impl FnMut(&mut Self, u64),
        ) -> u64 {
            const BYSTANDER: [u8; 6] = [0xfa, 0x16, 0x3e, 0xaa, 0xbb, 0xcc];
            let mut refused = 0;
            for number in 0..rate * seconds {
                attack(self, number);
                if number % (rate / 20) == 0 {
                    refused += u64::from(self.syn(BYSTANDER, is_proven).is_err());
                }
                self.now += 1_000_000_000 / rate;
            }
            refused
        }
    }

    fn mac(number: u64) -> [u8; 6] {
        let [.., a, b, c] = number.to_be_bytes();
        [0xfa, 0x16, 0x3e, a, b, c]
    }

    #[test]
    fn one_guest_takes_a_quarter_and_no_more() {
        for is_proven in [false, true] {
            let mut interface = Interface::new();
            let mut admitted = 0;
            let refused = interface.refused_beside(20, 10_000, is_proven, |interface, _| {
                match interface.syn(mac(1), is_proven) {
                    Ok(()) => admitted += 1,
                    Err(reason) => assert_eq!(reason, Reason::GuestSynRate),
                }
            });
            assert_eq!(refused, 0);
            assert!(
                (10_500..=11_010).contains(&admitted),
                "at most 20 s of 500/s and a burst of 1,000: {admitted}"
            );
        }
    }

    /// Eight guests in concert want twice the total.
    #[test]
    fn guests_at_their_limits_leave_the_reserve_to_others() {
        for (attackers_proven, is_proven) in [(true, true), (true, false), (false, true), (false, false)] {
            let mut interface = Interface::new();
            let attack = |interface: &mut Interface, number| {
                let _any = interface.syn(mac(number % 8), attackers_proven);
            };
            let refused = interface.refused_beside(20, 10_000, is_proven, attack);
            assert_eq!(refused, 0, "{attackers_proven} {is_proven}");
        }
    }

    #[test]
    fn made_up_mac_addresses_leave_proven_guests_alone() {
        let mut interface = Interface::new();
        let attack = |interface: &mut Interface, number| {
            let _any = interface.syn(mac(number), false);
        };
        assert_eq!(interface.refused_beside(20, 10_000, true, attack), 0);
    }

    #[test]
    fn a_new_guest_is_admitted_as_soon_as_an_attack_ends() {
        let mut interface = Interface::new();
        for number in 0..100_000 {
            let _any = interface.syn(mac(number), false);
        }
        assert_eq!(interface.syn([2; 6], false), Err(Reason::SynRate), "all of it is used");
        interface.now += 2_000_000;
        assert_eq!(interface.syn([2; 6], false), Ok(()), "and available again two milliseconds later");
    }

    #[test]
    fn guests_share_both_entries_only_by_chance() {
        let guests: Vec<_> = (0..1000).map(|number| GuestRate::new(mac(number), Interface::KEYS)).collect();
        let [first, second] = [0, 1].map(|entry| {
            let used: std::collections::HashSet<u8> = guests.iter().map(|guest| guest.0[entry]).collect();
            used.len()
        });
        assert!(first > 200 && second > 200, "{first} {second}");
    }
}
