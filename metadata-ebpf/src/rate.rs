//! Rate limit for new connections: the generic cell rate algorithm in one 64-bit word.
//!
//! The word is read and written without a lock. CPUs that race on it may each admit a connection
//! for the same slot, so under contention the limit is approximate. A lock would cost more than
//! this error.

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
    }
}
