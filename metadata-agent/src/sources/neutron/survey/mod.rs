//! Which of this host's guests Neutron is asked about, when and how, and what its answers come to.
//!
//! Values in, values out: the presence of interfaces, answers and the time come in; questions and events come out.
//!
//! # What holds how long
//!
//! A port changes hands only by being unplugged and plugged again: Nova writes `device_id` before it plugs, and the kernel
//! gives the next interface of the same name another index. So what Neutron said of an interface holds until that
//! interface goes, without any further question, and not a moment longer; the next one is asked about anew. Only an
//! interface about which something is missing is asked about again, with a pause that grows from [`FIRST_PAUSE`] to
//! [`LONGEST_PAUSE`]: a port may be bound to its instance late. So is one that is the parent of a trunk, whose subports come
//! and go while it stays.
//!
//! # What is believed
//!
//! A port is an interface's if a source that sees the interface says so, or if its id begins as the name of the tap does.
//! Neutron cannot be asked for the beginning of an id: it is asked for the MAC address and for all ports of the host, and
//! what does not fit the name is left out. Several that do are all told, and the inventory decides by the MAC address.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

use super::ports::{RowError, Said, Told};
use crate::ids::{IfIndex, MacAddress, PortId};
use crate::inventory::presence::{Need, Present};
use crate::inventory::{DeviceName, Event, SourceKind};

/// Interfaces about which one question is, unless it is about all: 64 ids make 2.5 KiB of URL, and eventlet, which
/// Neutron's server runs in, takes 8 KiB.
pub(super) const SOME: usize = 64;
/// How long others may join a question about a new interface.
const GATHER: Duration = Duration::from_millis(50);
/// How long the first look at the host waits for interfaces to be seen.
const OPENING: Duration = Duration::from_secs(1);
/// The pause before the second question about an interface. It doubles with each further one.
pub(super) const FIRST_PAUSE: Duration = Duration::from_secs(2);
/// The longest pause.
pub(super) const LONGEST_PAUSE: Duration = Duration::from_mins(1);
/// The first octet of the MAC addresses of libvirt's taps, and of those that Neutron makes (`base_mac`).
const LIBVIRT: u8 = 0xfe;
const NEUTRON: u8 = 0xfa;

/// A question: what to ask for, and about which interfaces as they were then.
#[derive(Clone, Debug)]
pub(super) struct Question {
    pub(super) ports: Wanted,
    about: Vec<Present>,
}

/// Which ports to ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// All that are bound to this host.
    OfHost,
    /// These.
    Ids(BTreeSet<PortId>),
    /// Those with these addresses.
    Macs(BTreeSet<MacAddress>),
}

impl Question {
    /// Whether a port may be what it is about. Of the answer nothing else needs to be kept.
    pub(super) fn is_about(&self, id: PortId) -> bool {
        let tap = DeviceName::tap_of(&id);
        self.about.iter().any(|present| is_its_port(present, id, &tap))
    }
}

fn is_its_port(present: &Present, id: PortId, tap: &DeviceName) -> bool {
    present.port.map_or(present.device == *tap, |known| known == id)
}

/// The interfaces of this host.
#[derive(Debug)]
pub(super) struct Survey {
    interfaces: BTreeMap<IfIndex, Interface>,
    /// When the whole host is due.
    host: Option<Instant>,
    opened: bool,
}

#[derive(Debug)]
struct Interface {
    present: Present,
    said: BTreeMap<PortId, Said>,
    fault: Option<(PortId, RowError)>,
    /// What was said of it was not among all ports of the host.
    doubtful: bool,
    way: Way,
    next: Instant,
    last: Option<Instant>,
    pause: Duration,
}

/// How an interface is asked about next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// By itself, unless there are so many new ones that the whole host is less.
    New,
    /// By its port's id or its MAC address.
    Single,
    /// Among all ports of the host, as its MAC address led nowhere.
    Host,
}

impl Interface {
    fn new(present: Present, now: Instant) -> Self {
        Self {
            present,
            said: BTreeMap::new(),
            fault: None,
            doubtful: false,
            way: Way::New,
            next: now + GATHER,
            last: None,
            pause: FIRST_PAUSE,
        }
    }

    fn is_needed(&self) -> bool {
        let is_trunk = || self.said.values().any(|said| said.subports.is_some());
        let missing = self.doubtful || self.present.need != Need::Nothing || is_trunk();
        missing && (self.present.port.is_some() || has_taps_name(&self.present))
    }

    fn is_due(&self, now: Instant) -> bool {
        self.is_needed() && self.next <= now
    }

    /// It was asked about; if that was not enough, it is so again after a pause.
    fn rest(&mut self, now: Instant) {
        self.next = now + self.pause;
        self.pause = LONGEST_PAUSE.min(2 * self.pause);
    }

    /// A need that it did not have before is not met by the last answer.
    fn follow(&mut self, present: &Present, now: Instant) {
        if self.present.need != present.need && present.need != Need::Nothing {
            self.pause = FIRST_PAUSE;
            let earliest = self.last.map_or(now + GATHER, |last| (last + FIRST_PAUSE).max(now + GATHER));
            self.next = if self.said.is_empty() { self.next.min(earliest) } else { earliest };
        }
        self.present = present.clone();
    }
}

/// `tap` and eleven characters: of any other name nothing tells which port it is.
fn has_taps_name(present: &Present) -> bool {
    let name = present.device.as_str();
    name.len() == 14 && name.starts_with("tap")
}

impl Survey {
    pub(super) fn new(now: Instant) -> Self {
        Self { interfaces: BTreeMap::new(), host: Some(now + OPENING), opened: false }
    }

    /// Takes in which interfaces there are. What was said of one that is gone is withdrawn.
    pub(super) fn follow(&mut self, presence: &[Present], now: Instant) -> Vec<Event> {
        if !self.opened && !presence.is_empty() {
            self.opened = true;
            self.host = self.host.map(|at| at.min(now + GATHER));
        }
        let mut gone = Vec::new();
        let there: BTreeMap<IfIndex, &Present> = presence.iter().map(|one| (one.index, one)).collect();
        let is_there = |interface: &Interface| {
            let was = &interface.present;
            there.get(&was.index).is_some_and(|one| (&one.device, one.mac) == (&was.device, was.mac))
        };
        for (_, interface) in self.interfaces.extract_if(.., |_, interface| !is_there(interface)) {
            gone.extend(interface.said.into_keys());
        }
        for present in presence {
            let known = self.interfaces.entry(present.index);
            known
                .and_modify(|interface| interface.follow(present, now))
                .or_insert_with(|| Interface::new(present.clone(), now));
        }
        gone.into_iter().map(|id| self.event(id)).collect()
    }

    /// When the next question is due.
    pub(super) fn next(&self) -> Option<Instant> {
        let needed = self.interfaces.values().filter(|interface| interface.is_needed());
        needed.map(|interface| interface.next).chain(self.host).min()
    }

    /// The question that is due now.
    pub(super) fn question(&self, now: Instant) -> Option<Question> {
        let due = || self.interfaces.values().filter(|interface| interface.is_due(now));
        let of_host = self.host.is_some_and(|at| at <= now)
            || due().any(|interface| interface.way == Way::Host)
            || due().filter(|interface| interface.way == Way::New).count() > SOME;
        if of_host {
            let asked = self
                .interfaces
                .values()
                .filter(|interface| interface.is_needed() || !interface.said.is_empty());
            let about = asked.map(|interface| interface.present.clone()).collect();
            return Some(Question { ports: Wanted::OfHost, about });
        }
        let by_id: Vec<_> = due().filter(|one| one.present.port.is_some()).take(SOME).collect();
        if !by_id.is_empty() {
            let ids = by_id.iter().filter_map(|interface| interface.present.port).collect();
            let about = by_id.iter().map(|interface| interface.present.clone()).collect();
            return Some(Question { ports: Wanted::Ids(ids), about });
        }
        let by_mac: Vec<_> = due().take(SOME).map(|interface| interface.present.clone()).collect();
        let macs: BTreeSet<_> = by_mac.iter().filter_map(|present| present.mac).map(guests).collect();
        match (by_mac.is_empty(), macs.is_empty()) {
            (true, _) => None,
            (false, true) => Some(Question { ports: Wanted::OfHost, about: by_mac }),
            (false, false) => Some(Question { ports: Wanted::Macs(macs), about: by_mac }),
        }
    }

    /// Takes in what a question was answered with: all that fits, of ports that it is about.
    pub(super) fn answer(&mut self, question: &Question, told: &[Told], now: Instant) -> Vec<Event> {
        let of_host = question.ports == Wanted::OfHost;
        if of_host {
            self.host = None;
        }
        let mut changed = BTreeSet::new();
        for asked in &question.about {
            let Some(interface) = self.interfaces.get_mut(&asked.index) else { continue };
            // It was replaced, or turned out to be another port's, while it was asked about.
            if interface.present.device != asked.device || interface.present.mac != asked.mac {
                continue;
            }
            let fits = |(id, _): &&Told| is_its_port(asked, *id, &DeviceName::tap_of(id));
            let its: Vec<&Told> = told.iter().filter(fits).collect();
            interface.last = Some(now);
            if its.is_empty() && of_host {
                // Bound to another host, as while it migrates: no proof that there is none.
                let first = interface.way == Way::New || !interface.said.is_empty();
                interface.way = Way::Single;
                if first {
                    interface.next = now;
                } else {
                    interface.rest(now);
                }
                interface.doubtful = !interface.said.is_empty();
                continue;
            }
            interface.doubtful = false;
            interface.rest(now);
            let by_address = its.is_empty() && asked.port.is_none();
            interface.way = if by_address { Way::Host } else { Way::Single };
            let said = said_of(&its, asked, &interface.said);
            interface.fault = its.iter().find_map(|(id, row)| Some((*id, fault(row)?.clone())));
            for id in interface.said.keys().chain(said.keys()) {
                if interface.said.get(id) != said.get(id) {
                    changed.insert(*id);
                }
            }
            interface.said = said;
        }
        changed.into_iter().map(|id| self.event(id)).collect()
    }

    /// A question was not answered. Who is back may have other data.
    pub(super) fn failed(&mut self, now: Instant) {
        self.host = Some(now);
    }

    /// Ports of which something is said.
    pub(super) fn ports(&self) -> usize {
        self.interfaces.values().map(|interface| interface.said.len()).sum()
    }

    /// Ports that cannot be understood.
    pub(super) fn faults(&self) -> impl Iterator<Item = (PortId, &RowError)> {
        self.interfaces.values().filter_map(|one| one.fault.as_ref()).map(|(id, error)| (*id, error))
    }

    /// What is said of a port now.
    fn event(&self, id: PortId) -> Event {
        let said = self.interfaces.values().find_map(|interface| interface.said.get(&id));
        Event {
            source: SourceKind::Neutron,
            key: id.to_string(),
            ports: said.map(Said::facts).unwrap_or_default(),
        }
    }
}

/// What of a port cannot be understood, if only its subports.
fn fault(row: &Result<Said, RowError>) -> Option<&RowError> {
    match row {
        Ok(said) => said.subports.as_ref()?.as_ref().err(),
        Err(error) => Some(error),
    }
}

/// The guest's MAC address, by the tap's.
fn guests(MacAddress([first, rest @ ..]): MacAddress) -> MacAddress {
    let [b, c, d, e, f] = rest;
    MacAddress([if first == LIBVIRT { NEUTRON } else { first }, b, c, d, e, f])
}

/// A judgement that was asked for before holds on, unless there is another to be made.
fn said_of(its: &[&Told], asked: &Present, before: &BTreeMap<PortId, Said>) -> BTreeMap<PortId, Said> {
    let understood = its.iter().filter_map(|(id, row)| Some((*id, row.as_ref().ok()?.clone())));
    understood
        .map(|(id, mut said)| {
            said.facts.judged = match &asked.need {
                Need::Arbitration(instances) => instances.clone(),
                Need::Nothing => before.get(&id).map(|said| said.facts.judged.clone()).unwrap_or_default(),
                Need::Identity => BTreeSet::new(),
            };
            (id, said)
        })
        .collect()
}

#[cfg(test)]
mod tests;
