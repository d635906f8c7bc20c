//! Damage from outside: what other software changed of the state that the agent made on the host.
//!
//! The guard of each part counts here what it finds, and reports what it could not repair.
//! `/ready`, `status` and the metrics show both. The heartbeat follows the reports: while damage
//! stops the traffic of guests and cannot be repaired, the programs leave packets to the host's own
//! path.

use std::collections::BTreeMap;

use tokio::sync::watch;

/// The kind of object that was damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum DamageKind {
    Address,
    Link,
    /// The name of the portal's network namespace.
    Namespace,
    Neighbour,
    Pins,
    /// A BPF program was detached.
    Program,
    Route,
    Rule,
    /// The file of a unix socket.
    Socket,
    Sysctl,
}

impl DamageKind {
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Address => "address",
            Self::Link => "link",
            Self::Namespace => "namespace",
            Self::Neighbour => "neighbour",
            Self::Pins => "pins",
            Self::Program => "program",
            Self::Route => "route",
            Self::Rule => "rule",
            Self::Socket => "socket",
            Self::Sysctl => "sysctl",
        }
    }
}

/// A part of the agent's state with a guard of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Part {
    Portal,
    /// The portal's ends of the veth pairs from namespaces of routers and DHCP servers.
    Uplinks,
    /// The program that returns packets to guests.
    PortalProgram,
    Pins,
    AdminSocket,
    HaproxySocket,
}

impl Part {
    fn label(self) -> &'static str {
        match self {
            Self::Portal => "portal",
            Self::Uplinks => "uplinks",
            Self::PortalProgram => "program of the portal",
            Self::Pins => "pins",
            Self::AdminSocket => "admin socket",
            Self::HaproxySocket => "socket for haproxies",
        }
    }
}

/// The effect of damage until it is repaired.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Effect {
    /// Guests are served, or a repair has not been tried yet.
    Served,
    /// No answer reaches the guests of the host.
    Stopped,
}

/// All that is known of damage.
#[derive(Clone, Debug, Default)]
pub(crate) struct DamageState {
    counts: BTreeMap<DamageKind, u64>,
    unrepaired: BTreeMap<Part, Unrepaired>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Unrepaired {
    found: Vec<String>,
    effect: Effect,
}

impl DamageState {
    /// Returns true if guests must be left to the host's own path.
    pub(crate) fn stops_traffic(&self) -> bool {
        self.unrepaired.values().any(|unrepaired| unrepaired.effect == Effect::Stopped)
    }
}

/// A handle for guards, which report, and for those that show the reports.
#[derive(Clone, Debug, Default)]
pub(crate) struct DamageReports(watch::Sender<DamageState>);

impl DamageReports {
    /// Counts damage that was found.
    pub(crate) fn count(&self, kind: DamageKind) {
        self.0.send_if_modified(|state| {
            *state.counts.entry(kind).or_default() += 1;
            // Readers of the counts do not wait for them.
            false
        });
    }

    /// Replaces the report about a part. An empty list says that the part is whole.
    pub(crate) fn report(&self, part: Part, found: Vec<String>, effect: Effect) {
        let unrepaired = (!found.is_empty()).then_some(Unrepaired { found, effect });
        self.0.send_if_modified(|state| {
            let is_changed = state.unrepaired.get(&part) != unrepaired.as_ref();
            match unrepaired {
                Some(unrepaired) => drop(state.unrepaired.insert(part, unrepaired)),
                None => drop(state.unrepaired.remove(&part)),
            }
            is_changed
        });
    }

    /// Reports that a part is whole.
    pub(crate) fn clear(&self, part: Part) {
        self.report(part, Vec::new(), Effect::Served);
    }

    /// Returns true if a part is damaged according to its last report.
    pub(crate) fn is_damaged(&self, part: Part) -> bool {
        self.0.borrow().unrepaired.contains_key(&part)
    }

    /// Returns true if guests are left to the host's own path because of damage.
    pub(crate) fn stops_traffic(&self) -> bool {
        self.0.borrow().stops_traffic()
    }

    /// Returns the damage that is not repaired, one line for each.
    pub(crate) fn unrepaired(&self) -> Vec<String> {
        let state = self.0.borrow();
        let line = |part: &Part, found: &String| format!("repair of {}: {found}", part.label());
        let lines = state.unrepaired.iter();
        lines.flat_map(|(part, all)| all.found.iter().map(move |found| line(part, found))).collect()
    }

    /// Returns how often each kind of damage was found.
    pub(crate) fn counts(&self) -> Vec<(DamageKind, u64)> {
        self.0.borrow().counts.iter().map(|(kind, count)| (*kind, *count)).collect()
    }

    /// Follows the reports.
    pub(crate) fn subscribe(&self) -> watch::Receiver<DamageState> {
        self.0.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traffic_stops_until_every_part_that_stops_it_is_repaired() {
        let reports = DamageReports::default();
        let mut state = reports.subscribe();
        reports.report(Part::Pins, vec!["gone".to_owned()], Effect::Served);
        assert!(!state.borrow_and_update().stops_traffic());
        reports.report(Part::Portal, vec!["md0 is down".to_owned()], Effect::Stopped);
        reports.report(Part::PortalProgram, vec!["no qdisc".to_owned()], Effect::Stopped);
        assert_eq!(
            reports.unrepaired(),
            [
                "repair of portal: md0 is down",
                "repair of program of the portal: no qdisc",
                "repair of pins: gone"
            ]
        );
        reports.clear(Part::Portal);
        assert!(state.borrow_and_update().stops_traffic());
        reports.clear(Part::PortalProgram);
        assert!(!state.borrow_and_update().stops_traffic() && reports.is_damaged(Part::Pins));
        reports.clear(Part::PortalProgram);
        assert!(!state.has_changed().unwrap(), "nothing new was said");
    }

    #[test]
    fn damage_is_counted_by_kind() {
        let reports = DamageReports::default();
        for kind in [DamageKind::Link, DamageKind::Route, DamageKind::Link] {
            reports.count(kind);
        }
        assert_eq!(reports.counts(), [(DamageKind::Link, 2), (DamageKind::Route, 1)]);
        assert!(reports.unrepaired().is_empty());
    }
}
