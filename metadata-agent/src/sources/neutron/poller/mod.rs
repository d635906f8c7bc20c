//! Decides which ports of this host to request from Neutron, and when.
//!
//! This module does no I/O: the presence of interfaces, responses and the time come in; queries and
//! events come out.
//!
//! # Validity of responses
//!
//! A port changes its owner only by being unplugged and plugged again: Nova writes `device_id`
//! before plugging, and the kernel gives the next interface of the same name another index. So a
//! response is valid for the interfaces that existed when it was requested, until they disappear.
//! The first query waits for the first scan of the host, and thus is about all its interfaces.
//!
//! A response says nothing about an interface that is plugged later, however young it is: its port
//! may have been given to another instance meanwhile, and the interface looks the same. So only the
//! ids of the host's other ports are kept. If the interface of one appears, the port is queried by
//! its id.
//!
//! Otherwise, an interface is queried again only while something about it is missing, with a pause
//! that grows from [`FIRST_PAUSE`] to [`LONGEST_PAUSE`]: a port may be bound to its instance late.
//! The parent of a trunk is queried again as well, because its subports change while it stays. So
//! is a port whose guest was refused because of the addresses in the last response ([`recheck`]).
//!
//! # Matching
//!
//! A port belongs to an interface if a source that knows the interface names the port, or if the
//! port id starts with the characters in the tap's name. Neutron cannot search for the start of an
//! id. So it is queried for an id that it listed before, for the MAC address or for all ports of
//! the host, and other ports are left out. If several ports match, all are reported, and the
//! inventory decides by the MAC address.

mod listed;
mod recheck;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

use super::ports::{ParsedPort, PortDetails, PortError};
use crate::ids::{IfIndex, MacAddress, PortId};
use crate::inventory::presence::{Need, Present};
use crate::inventory::{DeviceName, Event, SourceKind};
use listed::ListedPorts;
use recheck::{Answer, HOST_INTERVAL, Recheck, RecheckState};

/// Maximum number of interfaces per query, unless it is about the whole host: 64 ids take 2.5 KiB
/// of the URL, and eventlet, in which Neutron's server runs, accepts 8 KiB.
pub(super) const MAX_IDS: usize = 64;
/// Delay in which other new interfaces can join a query.
const GATHER: Duration = Duration::from_millis(50);
/// Pause before the second query about an interface. It doubles with each further one.
pub(super) const FIRST_PAUSE: Duration = Duration::from_secs(2);
/// Maximum pause.
pub(super) const LONGEST_PAUSE: Duration = Duration::from_mins(1);
/// First octets of the MAC addresses of libvirt's taps and of Neutron's ports (`base_mac`).
const LIBVIRT_OCTET: u8 = 0xfe;
const NEUTRON_OCTET: u8 = 0xfa;

/// Query for ports, with the interfaces that it is about.
#[derive(Clone, Debug)]
pub(super) struct PortQuery {
    pub(super) ports: PortSelection,
    about: Vec<Present>,
}

/// Ports to request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum PortSelection {
    /// All ports that are bound to this host.
    Host,
    Ids(BTreeSet<PortId>),
    Macs(BTreeSet<MacAddress>),
}

impl PortQuery {
    /// Returns true if a port matches one of the interfaces. Other ports of the response are
    /// discarded.
    pub(super) fn matches(&self, id: PortId) -> bool {
        let tap = DeviceName::from_port_id(&id);
        self.about.iter().any(|present| matches_interface(present, id, &tap))
    }
}

fn matches_interface(present: &Present, id: PortId, tap: &DeviceName) -> bool {
    present.port.map_or(present.device == *tap, |known| known == id)
}

/// Schedules queries about the interfaces of this host.
#[derive(Debug)]
pub(super) struct PortPoller {
    interfaces: BTreeMap<IfIndex, PolledInterface>,
    /// Time at which to query the whole host.
    host_due: Option<Instant>,
    /// Earliest time of the next query because of refusals.
    rechecks_from: Option<Instant>,
    /// The interfaces of the host were scanned, even if there were none.
    is_scanned: bool,
    listed: ListedPorts,
}

#[derive(Debug)]
struct PolledInterface {
    present: Present,
    /// Reported ports.
    ports: BTreeMap<PortId, PortDetails>,
    error: Option<(PortId, PortError)>,
    /// The reported ports were missing in a response about the whole host.
    unconfirmed: bool,
    method: QueryMethod,
    next: Instant,
    last: Option<Instant>,
    pause: Duration,
    recheck: Recheck,
}

/// Method of the next query about an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum QueryMethod {
    /// Single query, unless there are so many new interfaces that the whole host is queried.
    New,
    /// Query by port id or MAC address.
    Single,
    /// Query of the whole host, because the MAC address was not found.
    Host,
}

impl PolledInterface {
    fn new(present: Present, now: Instant) -> Self {
        Self {
            present,
            ports: BTreeMap::new(),
            error: None,
            unconfirmed: false,
            method: QueryMethod::New,
            next: now + GATHER,
            last: None,
            pause: FIRST_PAUSE,
            recheck: Recheck::new(),
        }
    }

    fn is_needed(&self) -> bool {
        let is_trunk = || self.ports.values().any(|details| details.subports.is_some());
        let missing = self.unconfirmed || self.present.need != Need::Nothing || is_trunk();
        missing && (self.present.port.is_some() || has_tap_name(&self.present))
    }

    fn is_due(&self, now: Instant) -> bool {
        self.is_needed() && self.next <= now
    }

    /// Returns the time of a query because of a refusal, if one is scheduled.
    fn recheck_due(&self, host_from: Option<Instant>) -> Option<Instant> {
        let due = self.recheck.due()?;
        Some(host_from.map_or(due, |from| due.max(from)))
    }

    /// Schedules the query after one about single ports. What was tried first may have been the
    /// wrong id, or a MAC address that is not derived from the port's, so the next try is not
    /// delayed.
    fn schedule_next(&mut self, query: &PortQuery, asked: &Present, is_found: bool, now: Instant) {
        let is_first = self.method == QueryMethod::New;
        self.method = match query.ports {
            PortSelection::Macs(_) if !is_found => QueryMethod::Host,
            PortSelection::Macs(_) | PortSelection::Ids(_) | PortSelection::Host => QueryMethod::Single,
        };
        if is_first && !is_found && asked.port.is_none() {
            self.next = now;
        } else {
            self.back_off(now);
        }
    }

    /// Schedules the next query.
    fn back_off(&mut self, now: Instant) {
        self.next = now + self.pause;
        self.pause = LONGEST_PAUSE.min(2 * self.pause);
    }

    /// Updates the presence. A new need makes the interface due earlier.
    fn update(&mut self, present: &Present, now: Instant) {
        if self.present.need != present.need && present.need != Need::Nothing {
            self.pause = FIRST_PAUSE;
            let earliest = self.last.map_or(now + GATHER, |last| (last + FIRST_PAUSE).max(now + GATHER));
            self.next = if self.ports.is_empty() { self.next.min(earliest) } else { earliest };
        }
        self.present = present.clone();
    }
}

/// Returns true for `tap` and eleven characters. Other names do not identify a port.
fn has_tap_name(present: &Present) -> bool {
    let name = present.device.as_str();
    name.len() == 14 && name.starts_with("tap")
}

impl PortPoller {
    pub(super) fn new() -> Self {
        Self {
            interfaces: BTreeMap::new(),
            host_due: None,
            rechecks_from: None,
            is_scanned: false,
            listed: ListedPorts::default(),
        }
    }

    /// Updates the list of interfaces. Withdraws the ports of interfaces that disappeared.
    pub(super) fn update_presence(&mut self, presence: &[Present], now: Instant) -> Vec<Event> {
        if !self.is_scanned {
            self.is_scanned = true;
            self.host_due = Some(now + GATHER);
        }
        let mut withdrawn = Vec::new();
        let present: BTreeMap<IfIndex, &Present> = presence.iter().map(|one| (one.index, one)).collect();
        let is_present = |interface: &PolledInterface| {
            let was = &interface.present;
            present.get(&was.index).is_some_and(|one| (&one.device, one.mac) == (&was.device, was.mac))
        };
        for (_, interface) in self.interfaces.extract_if(.., |_, interface| !is_present(interface)) {
            withdrawn.extend(interface.ports.into_keys());
        }
        for present in presence {
            let known = self.interfaces.entry(present.index);
            known
                .and_modify(|interface| interface.update(present, now))
                .or_insert_with(|| PolledInterface::new(present.clone(), now));
        }
        withdrawn.into_iter().map(|id| self.event(id)).collect()
    }

    /// Schedules a query about an interface whose guest was refused. If its addresses are not from
    /// this source, there is none.
    pub(super) fn recheck(&mut self, index: IfIndex, now: Instant) {
        if let Some(interface) = self.interfaces.get_mut(&index).filter(|one| !one.ports.is_empty()) {
            interface.recheck.request(now);
        }
    }

    /// Returns the time of the next query.
    pub(super) fn next_due(&self) -> Option<Instant> {
        let needed = self.interfaces.values().filter(|interface| interface.is_needed());
        let rechecks =
            self.interfaces.values().filter_map(|interface| interface.recheck_due(self.rechecks_from));
        needed.map(|interface| interface.next).chain(self.host_due).chain(rechecks).min()
    }

    /// Returns the query that is due now.
    pub(super) fn query(&self, now: Instant) -> Option<PortQuery> {
        let is_rechecked = |interface: &PolledInterface| {
            interface.recheck_due(self.rechecks_from).is_some_and(|due| due <= now)
        };
        let due =
            || self.interfaces.values().filter(|interface| interface.is_due(now) || is_rechecked(interface));
        let of_host = self.host_due.is_some_and(|at| at <= now)
            || due().any(|interface| interface.method == QueryMethod::Host)
            || due().filter(|interface| interface.method == QueryMethod::New).count() > MAX_IDS;
        if of_host {
            let asked = self
                .interfaces
                .values()
                .filter(|interface| interface.is_needed() || !interface.ports.is_empty());
            let about = asked.map(|interface| interface.present.clone()).collect();
            return Some(PortQuery { ports: PortSelection::Host, about });
        }
        let by_id = due().map(|interface| (interface, self.ids_of(interface)));
        let by_id: Vec<_> = by_id.filter(|(_, ids)| !ids.is_empty()).take(MAX_IDS).collect();
        if !by_id.is_empty() {
            let about = by_id.iter().map(|(interface, _)| interface.present.clone()).collect();
            let ids = by_id.into_iter().flat_map(|(_, ids)| ids).collect();
            return Some(PortQuery { ports: PortSelection::Ids(ids), about });
        }
        let by_mac: Vec<_> = due().take(MAX_IDS).map(|interface| interface.present.clone()).collect();
        let macs: BTreeSet<_> = by_mac.iter().filter_map(|present| present.mac).map(guest_mac).collect();
        match (by_mac.is_empty(), macs.is_empty()) {
            (true, _) => None,
            (false, true) => Some(PortQuery { ports: PortSelection::Host, about: by_mac }),
            (false, false) => Some(PortQuery { ports: PortSelection::Macs(macs), about: by_mac }),
        }
    }

    /// Returns the ids by which to query an interface: that of its port, or those of the listed
    /// ports whose tap has this name.
    fn ids_of(&self, interface: &PolledInterface) -> Vec<PortId> {
        match interface.present.port {
            Some(id) => vec![id],
            None if interface.method == QueryMethod::New => self.listed.at(&interface.present.device),
            None => Vec::new(),
        }
    }

    /// Keeps the ids in a response about the whole host.
    pub(super) fn keep_listed(&mut self, query: &PortQuery, ids: BTreeSet<PortId>) {
        if query.ports == PortSelection::Host {
            self.listed = ListedPorts::new(ids);
        }
    }

    /// Handles the response to a query: all matching ports.
    pub(super) fn handle_response(
        &mut self,
        query: &PortQuery,
        ports: &[ParsedPort],
        now: Instant,
    ) -> Vec<Event> {
        let of_host = query.ports == PortSelection::Host;
        if of_host {
            self.host_due = None;
        }
        let mut changed = BTreeSet::new();
        for asked in &query.about {
            let Some(interface) = self.interfaces.get_mut(&asked.index) else { continue };
            // The interface was replaced during the query.
            if interface.present.device != asked.device || interface.present.mac != asked.mac {
                continue;
            }
            let matches =
                |(id, _): &&ParsedPort| matches_interface(asked, *id, &DeviceName::from_port_id(id));
            let found: Vec<&ParsedPort> = ports.iter().filter(matches).collect();
            interface.last = Some(now);
            if found.is_empty() && of_host {
                // The port may be bound to another host, as during a migration.
                let first = interface.method == QueryMethod::New || !interface.ports.is_empty();
                interface.method = QueryMethod::Single;
                if first {
                    interface.next = now;
                } else {
                    interface.back_off(now);
                }
                interface.unconfirmed = !interface.ports.is_empty();
                continue;
            }
            interface.unconfirmed = false;
            interface.schedule_next(query, asked, !found.is_empty(), now);
            let ports = reported_ports(&found, asked, &interface.ports);
            interface.error = found.iter().find_map(|(id, row)| Some((*id, error_of(row)?.clone())));
            for id in interface.ports.keys().chain(ports.keys()) {
                if interface.ports.get(id) != ports.get(id) {
                    changed.insert(*id);
                }
            }
            let answer = if interface.ports == ports { Answer::Same } else { Answer::Changed };
            if interface.recheck.answered(answer, now) == RecheckState::Answered {
                self.rechecks_from = Some(now + HOST_INTERVAL);
            }
            interface.ports = ports;
        }
        changed.into_iter().map(|id| self.event(id)).collect()
    }

    /// Handles a failed query. After an outage Neutron's data may have changed, so the whole host
    /// is queried.
    pub(super) fn failed(&mut self, now: Instant) {
        self.host_due = Some(now);
    }

    /// Returns the number of reported ports.
    pub(super) fn ports(&self) -> usize {
        self.interfaces.values().map(|interface| interface.ports.len()).sum()
    }

    /// Returns the errors of invalid ports.
    pub(super) fn errors(&self) -> impl Iterator<Item = (PortId, &PortError)> {
        self.interfaces.values().filter_map(|one| one.error.as_ref()).map(|(id, error)| (*id, error))
    }

    /// Returns the event for a port.
    fn event(&self, id: PortId) -> Event {
        let details = self.interfaces.values().find_map(|interface| interface.ports.get(&id));
        Event {
            source: SourceKind::Neutron,
            key: id.to_string(),
            ports: details.map(PortDetails::records).unwrap_or_default(),
        }
    }
}

/// Returns the error of a port or of its subports.
fn error_of(row: &Result<PortDetails, PortError>) -> Option<&PortError> {
    match row {
        Ok(details) => details.subports.as_ref()?.as_ref().err(),
        Err(error) => Some(error),
    }
}

/// Converts the MAC address of a tap to the guest's.
fn guest_mac(MacAddress([first, rest @ ..]): MacAddress) -> MacAddress {
    let [b, c, d, e, f] = rest;
    MacAddress([if first == LIBVIRT_OCTET { NEUTRON_OCTET } else { first }, b, c, d, e, f])
}

/// Returns the valid ports. An earlier arbitration stays valid unless another one is needed.
fn reported_ports(
    found: &[&ParsedPort],
    asked: &Present,
    before: &BTreeMap<PortId, PortDetails>,
) -> BTreeMap<PortId, PortDetails> {
    let valid = found.iter().filter_map(|(id, row)| Some((*id, row.as_ref().ok()?.clone())));
    valid
        .map(|(id, mut details)| {
            details.record.arbitrated = match &asked.need {
                Need::Arbitration(instances) => instances.clone(),
                Need::Nothing => {
                    before.get(&id).map(|earlier| earlier.record.arbitrated.clone()).unwrap_or_default()
                }
                Need::Identity => BTreeSet::new(),
            };
            (id, details)
        })
        .collect()
}

#[cfg(test)]
mod tests;
