//! Reattaches programs that were detached externally, within a second and under the same attachment
//! id, so that open connections go on. A program that was attached in place of ours stays, and runs
//! beside ours.
//!
//! The kernel reports each qdisc and filter that is deleted. It does not report a TCX link that is
//! detached by force or loses its pin, so a patrol looks for these, and for the pins.
//!
//! Open vSwitch, libvirt and Neutron delete the ingress qdisc when they set a bandwidth, no matter
//! who made it. Then they create their own, which fails if there is one again. So we wait for the
//! [`GRACE`] period before we create another: our filter is attached to theirs as soon as that is
//! there.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::time::{Duration, Instant};

use tracing::{debug, info, warn};

use super::failures::Step;
use super::qdisc;
use super::{AttachError, Attacher};
use crate::datapath::{DatapathError, ExpectedPrograms, Hook, PinState};
use crate::ids::IfIndex;
use crate::net::damage::{DamageKind, Effect, Part};
use crate::net::netlink::HookEvent;
use crate::net::portal::HOST_END;

/// The interval between two patrols.
pub(crate) const PATROL: Duration = Duration::from_millis(500);
/// The time for one patrol of the host. A query takes a few microseconds and the RTNL lock. While
/// others hold that lock, as when many guests boot, a patrol covers fewer interfaces, and no guest
/// waits for it.
const HOST_PATROL_TURN: Duration = Duration::from_millis(10);
/// The interval at which due programs are reattached.
pub(crate) const REATTACH: Duration = Duration::from_millis(50);
/// The time that the program which deleted a qdisc has for creating another. libvirt runs some
/// eight commands in between; each is a process that takes a few milliseconds, and more on a busy
/// host.
const GRACE: Duration = Duration::from_millis(500);
/// The delay before a failed attempt is repeated.
const RETRY: Duration = Duration::from_secs(1);

/// The interfaces of one namespace that lack their program.
#[derive(Debug, Default)]
pub(super) struct MissingPrograms {
    programs: BTreeMap<IfIndex, MissingProgram>,
    /// The last interface of an unfinished patrol.
    patrolled: Option<IfIndex>,
}

#[derive(Clone, Copy, Debug)]
struct MissingProgram {
    since: Instant,
    due: Instant,
}

impl MissingPrograms {
    fn contains(&self, index: IfIndex) -> bool {
        self.programs.contains_key(&index)
    }

    /// Records when the program was first found missing. Another qdisc is not created before
    /// `grace` is over.
    fn mark(&mut self, index: IfIndex, now: Instant, grace: Duration) {
        self.programs.entry(index).or_insert(MissingProgram { since: now, due: now + grace });
    }

    /// Postpones the next attempt after a failed one.
    fn postpone(&mut self, index: IfIndex, now: Instant) {
        if let Some(program) = self.programs.get_mut(&index) {
            program.due = now + RETRY;
        }
    }

    fn due(&self, now: Instant) -> Vec<IfIndex> {
        self.programs.iter().filter(|(_, program)| program.due <= now).map(|(index, _)| *index).collect()
    }

    /// Forgets an interface, and returns since when its program was missing.
    pub(super) fn forget(&mut self, index: IfIndex) -> Option<Instant> {
        self.programs.remove(&index).map(|program| program.since)
    }
}

/// The reason to check a filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    /// An event for this interface. The kernel reports the deletion of a qdisc separately.
    Event,
    /// A full scan. The qdisc may have been replaced too, so it is treated as another
    /// program's.
    Resync,
}

impl Attacher {
    /// Returns whether any interface lacks its program.
    pub(crate) fn has_missing(&self) -> bool {
        !self.missing.programs.is_empty()
    }

    /// Responds to a qdisc or filter that came or went. TCX links do not depend on them.
    pub(super) async fn on_hook(&mut self, event: HookEvent) {
        if self.datapath.hook() != Hook::Clsact {
            return;
        }
        match event {
            // While no program is missing, a new qdisc is of no interest.
            HookEvent::QdiscNew(index) if !self.missing.contains(index) => {}
            HookEvent::QdiscNew(index) | HookEvent::Filter(index) => {
                self.check_filter(index, Cause::Event).await;
            }
            HookEvent::QdiscGone(index) => {
                self.disown_qdisc(index);
                self.check_filter(index, Cause::Event).await;
            }
            HookEvent::Overrun => {
                warn!("netlink overrun; checking all filters");
                self.check_filters().await;
            }
        }
        self.failures.publish();
    }

    /// Checks all programs that are attached as filters.
    pub(crate) async fn check_filters(&mut self) {
        let guests = self.attached.keys().copied().filter(|index| self.is_filter(*index));
        for index in guests.chain(self.datapath.portal()).collect::<Vec<_>>() {
            self.check_filter(index, Cause::Resync).await;
        }
        self.failures.publish();
    }

    /// Checks the filter of one interface. A missing one is reattached at once if there is a qdisc
    /// for it.
    async fn check_filter(&mut self, index: IfIndex, cause: Cause) {
        if !self.attached.contains_key(&index) && !self.is_portal(index) {
            return;
        }
        let has_filter = async {
            let programs = self.netlink.filter_programs(index).await?;
            Ok::<_, AttachError>(programs.contains(&self.datapath.program_id(index)?))
        };
        match has_filter.await {
            Ok(true) => {
                self.missing.forget(index);
                self.failures.clear(index, Step::Reattach);
                if self.is_hosts_portal(index) {
                    self.damage.clear(Part::PortalProgram);
                }
            }
            Ok(false) => {
                if cause == Cause::Resync && !self.missing.contains(index) {
                    self.disown_qdisc(index);
                }
                self.mark_missing(index);
                // This usually fails because the qdisc is gone, which is not an error within the
                // grace period.
                if self.datapath.reattach(index, &self.name_of(index)).is_ok() {
                    self.record_reattach(index, Ok(()));
                }
            }
            Err(error) => warn!(namespace = self.label(), ifindex = %index, %error, "cannot list filters"),
        }
    }

    /// Restores the pin directory if it was removed. Without it no program could be reattached.
    pub(crate) fn restore_pins(&mut self) {
        // Shown with the portal, because the pins are not those of one guest.
        let portal = self.datapath.portal().unwrap_or(IfIndex(0));
        let restored = self.datapath.restore_pins();
        if self.namespace.is_none() {
            self.report_pins(restored.as_ref());
        }
        match restored {
            Ok(PinState::Intact) => self.failures.clear(portal, Step::RestorePins),
            Ok(PinState::Restored) => {
                warn!(namespace = self.label(), "pins were removed externally; restored");
                self.failures.clear(portal, Step::RestorePins);
            }
            Err(error) => self.record_failure((portal, HOST_END), Step::RestorePins, &error.into()),
        }
    }

    /// Counts and reports damage to the pins of the host, below which are those of other
    /// namespaces. Programs do not need them to run.
    fn report_pins(&self, restored: Result<&PinState, &DatapathError>) {
        if !matches!(restored, Ok(PinState::Intact)) && !self.damage.is_damaged(Part::Pins) {
            self.damage.count(DamageKind::Pins);
        }
        let found = restored.err().map(ToString::to_string).into_iter().collect();
        self.damage.report(Part::Pins, found, Effect::Served);
    }

    /// Attaches the portal's program to an interface that replaces the former one.
    pub(super) async fn reconnect_portal(&mut self, index: IfIndex) -> Result<(), AttachError> {
        if let Some(former) = self.datapath.portal() {
            self.missing.forget(former);
            self.failures.clear(former, Step::Reattach);
        }
        if self.datapath.hook() == Hook::Clsact {
            self.netlink.add_ingress_qdisc(index).await?;
        }
        self.datapath.reconnect_portal(HOST_END, index)?;
        self.damage.clear(Part::PortalProgram);
        self.failures.publish();
        Ok(())
    }

    /// Restores pins, and looks for TCX links of the host that are gone, from where the last patrol
    /// ended.
    pub(super) fn patrol(&mut self) {
        self.restore_pins();
        self.failures.publish();
        if self.datapath.hook() != Hook::Tcx {
            return;
        }
        if let Some(portal) = self.datapath.portal() {
            self.check_link(portal);
        }
        let until = Instant::now() + HOST_PATROL_TURN;
        let after = self.missing.patrolled.take().map_or(Bound::Unbounded, Bound::Excluded);
        let turn: Vec<IfIndex> =
            self.attached.range((after, Bound::Unbounded)).map(|(index, _)| *index).collect();
        let mut patrolled = None;
        for index in turn {
            if Instant::now() >= until {
                self.missing.patrolled = patrolled;
                break;
            }
            self.check_link(index);
            patrolled = Some(index);
        }
        self.failures.publish();
    }

    fn check_link(&mut self, index: IfIndex) {
        match self.datapath.is_attached(index, &self.name_of(index)) {
            Ok(true) => {}
            Ok(false) => self.reattach_link(index),
            // The interface is being deleted, which netlink reports separately.
            Err(error) => debug!(ifindex = %index, %error, "cannot query TCX programs"),
        }
    }

    /// Returns the programs that a patrol of many namespaces looks for; `None` if programs are
    /// filters.
    pub(crate) fn expected_programs(&self) -> Result<Option<ExpectedPrograms>, DatapathError> {
        self.datapath.expected_programs()
    }

    /// Reattaches the links that a patrol did not find.
    pub(crate) fn reattach_links(&mut self, missing: Vec<IfIndex>) {
        for index in missing {
            self.reattach_link(index);
        }
        self.failures.publish();
    }

    fn reattach_link(&mut self, index: IfIndex) {
        self.mark_missing(index);
        let reattached = self.datapath.reattach(index, &self.name_of(index));
        self.record_reattach(index, reattached.map_err(AttachError::from));
    }

    /// Reattaches the programs whose grace period is over, and tries again what failed before.
    pub(crate) async fn reattach_due(&mut self) {
        for index in self.missing.due(Instant::now()) {
            let reattached = self.reattach_with_qdisc(index).await;
            self.record_reattach(index, reattached);
        }
        self.failures.publish();
    }

    async fn reattach_with_qdisc(&mut self, index: IfIndex) -> Result<(), AttachError> {
        if self.is_portal(index) && self.is_filter(index) {
            // The interface is ours, and so needs no record of its qdisc.
            self.netlink.add_ingress_qdisc(index).await?;
        } else if self.is_filter(index) {
            qdisc::ensure(&self.netlink, &self.datapath, index).await?;
        }
        Ok(self.datapath.reattach(index, &self.name_of(index))?)
    }

    /// Notes that our program is not on an interface.
    fn mark_missing(&mut self, index: IfIndex) {
        if self.missing.contains(index) {
            return;
        }
        let interface = self.name_of(index);
        warn!(namespace = self.label(), interface, "BPF program was detached externally; reattaching");
        self.damage.count(DamageKind::Program);
        if self.is_hosts_portal(index) {
            self.damage.report(Part::PortalProgram, vec![format!("{interface} has none")], Effect::Served);
        }
        let grace = if self.is_portal(index) { Duration::ZERO } else { GRACE };
        self.missing.mark(index, Instant::now(), grace);
    }

    fn record_reattach(&mut self, index: IfIndex, reattached: Result<(), AttachError>) {
        let interface = self.name_of(index);
        match reattached {
            Ok(()) => {
                let after = self.missing.forget(index).map(|since| since.elapsed());
                info!(namespace = self.label(), interface, ?after, "BPF program reattached");
                self.failures.clear(index, Step::Reattach);
                if self.is_hosts_portal(index) {
                    self.damage.clear(Part::PortalProgram);
                }
            }
            Err(error) => {
                if self.is_hosts_portal(index) {
                    self.damage.report(Part::PortalProgram, vec![error.to_string()], Effect::Stopped);
                }
                self.missing.postpone(index, Instant::now());
                self.record_failure((index, &interface), Step::Reattach, &error);
            }
        }
    }

    fn disown_qdisc(&self, index: IfIndex) {
        if self.attached.contains_key(&index)
            && let Err(error) = self.datapath.set_qdisc_owned(index, false)
        {
            warn!(namespace = self.label(), ifindex = %index, %error, "cannot remove the record of a qdisc");
        }
    }

    /// Returns true for the interface that carries the answers to all guests of the host.
    fn is_hosts_portal(&self, index: IfIndex) -> bool {
        self.namespace.is_none() && self.is_portal(index)
    }

    /// Returns whether the program of an interface is attached as a filter, as the portal's is in
    /// every other namespace.
    fn is_filter(&self, index: IfIndex) -> bool {
        self.datapath.hook() == Hook::Clsact || self.namespace.is_some() && self.is_portal(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUEST: IfIndex = IfIndex(5);

    #[test]
    fn a_detached_program_is_due_after_the_one_grace_period() {
        let mut programs = MissingPrograms::default();
        let start = Instant::now();
        programs.mark(GUEST, start, GRACE);
        programs.mark(GUEST, start + GRACE, GRACE);
        assert!(programs.due(start + GRACE / 2).is_empty());
        assert_eq!(programs.due(start + GRACE), [GUEST], "marking it again changes nothing");
        assert_eq!(programs.forget(GUEST), Some(start));
        assert!(!programs.contains(GUEST) && programs.due(start + GRACE).is_empty());
    }

    #[test]
    fn the_portal_is_due_at_once_and_failures_are_postponed() {
        let mut programs = MissingPrograms::default();
        let start = Instant::now();
        programs.mark(IfIndex(2), start, Duration::ZERO);
        programs.mark(GUEST, start, GRACE);
        assert_eq!(programs.due(start), [IfIndex(2)]);
        programs.postpone(IfIndex(2), start);
        assert_eq!(programs.due(start + GRACE), [GUEST]);
        assert_eq!(programs.due(start + RETRY), [IfIndex(2), GUEST]);
    }
}
