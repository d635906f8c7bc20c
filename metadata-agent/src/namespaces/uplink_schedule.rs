//! Decides when a namespace gets its uplink to the portal, and when it loses it.
//!
//! Neutron takes a namespace with an interface for one in use: `neutron-netns-cleanup` removes only
//! those that have none besides `lo` and the kernel's fallback tunnels
//! (neutron/agent/linux/ip_lib.py, `namespace_is_empty`). So a namespace has an uplink only while
//! it has an interface that guests are behind.
//!
//! Neutron lists the interfaces of a namespace once, and then deletes one after the other
//! (neutron/cmd/netns_cleanup.py, `destroy_namespace`; neutron/agent/linux/dhcp.py,
//! `_cleanup_stale_devices`). It fails if one of them vanishes meanwhile, and a new one keeps the
//! namespace from being removed. So there is a delay before either.

use std::time::{Duration, Instant};

/// The time between the last interface's end and the uplink's.
const LEAVE_DELAY: Duration = Duration::from_secs(1);
/// The time until an uplink that was removed externally is created again.
const REJOIN_DELAY: Duration = Duration::from_millis(500);

/// The state of the uplink.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Uplink {
    Absent,
    Connected,
    /// It was removed externally.
    Lost,
}

/// The next step with the uplink.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Keep,
    /// Decide again after this time.
    Wait(Duration),
    Connect,
    Disconnect,
    /// Give up the uplink that was lost, and connect again.
    Reconnect,
}

/// A delay that has begun, if any.
#[derive(Debug, Default)]
pub(super) struct UplinkSchedule {
    due: Option<Instant>,
}

impl UplinkSchedule {
    /// Returns the next step. `is_needed` is true while there is an interface that guests are
    /// behind.
    pub(super) fn next(&mut self, uplink: Uplink, is_needed: bool, now: Instant) -> Step {
        let (delay, step) = match (uplink, is_needed) {
            (Uplink::Absent, false) | (Uplink::Connected, true) => (None, Step::Keep),
            (Uplink::Absent, true) => (None, Step::Connect),
            (Uplink::Connected, false) => (Some(LEAVE_DELAY), Step::Disconnect),
            (Uplink::Lost, true) => (Some(REJOIN_DELAY), Step::Reconnect),
            (Uplink::Lost, false) => (None, Step::Disconnect),
        };
        let due = delay.map(|delay| *self.due.get_or_insert(now + delay));
        if let Some(due) = due.filter(|due| *due > now) {
            return Step::Wait(due - now);
        }
        self.due = None;
        step
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: Duration = Duration::from_millis(1);

    #[test]
    fn a_namespace_is_connected_while_guests_are_behind_it() {
        let mut schedule = UplinkSchedule::default();
        let start = Instant::now();
        assert_eq!(schedule.next(Uplink::Absent, false, start), Step::Keep);
        assert_eq!(schedule.next(Uplink::Absent, true, start), Step::Connect);
        assert_eq!(schedule.next(Uplink::Connected, true, start), Step::Keep);
        assert_eq!(schedule.next(Uplink::Connected, false, start), Step::Wait(LEAVE_DELAY));
        let rest = LEAVE_DELAY / 4;
        let late = start + LEAVE_DELAY * 3 / 4;
        assert_eq!(schedule.next(Uplink::Connected, false, late), Step::Wait(rest));
        assert_eq!(schedule.next(Uplink::Connected, false, start + LEAVE_DELAY), Step::Disconnect);
        assert_eq!(schedule.next(Uplink::Absent, false, start + LEAVE_DELAY), Step::Keep);
    }

    #[test]
    fn an_interface_that_returns_in_time_ends_the_delay() {
        let mut schedule = UplinkSchedule::default();
        let start = Instant::now();
        assert_eq!(schedule.next(Uplink::Connected, false, start), Step::Wait(LEAVE_DELAY));
        assert_eq!(schedule.next(Uplink::Connected, true, start + TICK), Step::Keep);
        let later = start + LEAVE_DELAY;
        assert_eq!(schedule.next(Uplink::Connected, false, later), Step::Wait(LEAVE_DELAY));
    }

    #[test]
    fn a_lost_uplink_comes_back_after_a_delay_if_needed() {
        let mut schedule = UplinkSchedule::default();
        let start = Instant::now();
        assert_eq!(schedule.next(Uplink::Lost, true, start), Step::Wait(REJOIN_DELAY));
        assert_eq!(schedule.next(Uplink::Lost, true, start + REJOIN_DELAY), Step::Reconnect);
        assert_eq!(schedule.next(Uplink::Lost, true, start), Step::Wait(REJOIN_DELAY));
        assert_eq!(schedule.next(Uplink::Lost, false, start + TICK), Step::Disconnect);
    }
}
