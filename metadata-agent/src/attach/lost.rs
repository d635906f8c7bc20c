//! Programs that somebody else took off an interface, and their way back: within a second, as the same attachment, so that
//! open connections go on. What that somebody put there instead stays, and is used.
//!
//! The kernel tells of every qdisc and filter that goes, but not of a TCX link that is detached by force or whose pin is
//! removed: those are looked for.
//!
//! Open vSwitch, libvirt and Neutron, when they set a bandwidth, delete the ingress qdisc, whoever's it is, and then make their
//! own, which fails if there is one again. So a qdisc that went has its [`GRACE`] before we make another: our filter goes onto theirs
//! as soon as it is there.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::time::{Duration, Instant};

use tracing::{debug, info, warn};

use super::{Guests, GuestsError};
use crate::attach::qdisc;
use crate::datapath::Hook;
use crate::ids::IfIndex;
use crate::net::netlink::HookEvent;
use crate::net::portal;

/// How often links are looked for, and for how long at once. A look takes some microseconds, and the lock of all network
/// configuration: while others hold that, as when many guests boot, fewer are looked at in a turn, and no guest waits for it.
pub(super) const PATROL: Duration = Duration::from_millis(500);
const PATROL_TURN: Duration = Duration::from_millis(10);
/// How often it is looked whether something is due.
pub(super) const PUT_BACK: Duration = Duration::from_millis(50);
/// How long whoever deleted a qdisc has for making another: libvirt runs some eight commands between, each a process that
/// takes a few milliseconds, and more on a busy host.
const GRACE: Duration = Duration::from_millis(500);
/// When what could not be put back is tried again.
const AGAIN: Duration = Duration::from_secs(1);

/// The interfaces that lack their program.
#[derive(Debug, Default)]
pub(super) struct Losses {
    lost: BTreeMap<IfIndex, Loss>,
    /// The last interface that was looked at.
    seen: Option<IfIndex>,
}

#[derive(Debug)]
struct Loss {
    since: Instant,
    due: Instant,
    error: Option<String>,
}

impl Losses {
    pub(super) fn is_empty(&self) -> bool {
        self.lost.is_empty()
    }

    pub(super) fn forget(&mut self, index: IfIndex) {
        self.lost.remove(&index);
    }

    /// What could not be put back, the last time it was tried.
    pub(super) fn errors(&self) -> impl Iterator<Item = (IfIndex, &String)> {
        self.lost.iter().filter_map(|(index, loss)| Some((*index, loss.error.as_ref()?)))
    }

    fn due(&self, now: Instant) -> Vec<IfIndex> {
        self.lost.iter().filter(|(_, loss)| loss.due <= now).map(|(index, _)| *index).collect()
    }
}

impl Guests {
    /// Filters depend on qdiscs, links do not.
    pub(super) async fn on_hook(&mut self, event: HookEvent) {
        if self.datapath.hook() != Hook::Clsact {
            return;
        }
        match event {
            // On a new qdisc there is no program to lose.
            HookEvent::QdiscNew(index) if !self.lost.lost.contains_key(&index) => {}
            HookEvent::QdiscNew(index) | HookEvent::Filter(index) => self.look_at(index).await,
            HookEvent::QdiscGone(index) => {
                self.disown_qdisc(index);
                self.look_at(index).await;
            }
            HookEvent::Overrun => {
                warn!("events of filters were lost; looking at all anew");
                let all = self.attached.keys().copied().chain(self.datapath.portal());
                for index in all.collect::<Vec<_>>() {
                    self.look_at(index).await;
                }
            }
        }
    }

    /// Looks for links that are no more.
    pub(super) fn patrol(&mut self) {
        if self.datapath.hook() != Hook::Tcx {
            return;
        }
        if let Some(portal) = self.datapath.portal() {
            self.look_for(portal);
        }
        let until = Instant::now() + PATROL_TURN;
        let after = self.lost.seen.map_or(Bound::Unbounded, Bound::Excluded);
        let turn: Vec<IfIndex> =
            self.attached.range((after, Bound::Unbounded)).map(|(index, _)| *index).collect();
        for index in turn {
            if Instant::now() >= until {
                return;
            }
            self.look_for(index);
            self.lost.seen = Some(index);
        }
        self.lost.seen = None;
    }

    fn look_for(&mut self, index: IfIndex) {
        match self.datapath.is_attached(index, &self.name_of(index)) {
            Ok(true) => {}
            Ok(false) => {
                self.is_lost(index);
                let put_back = self.datapath.reattach(index, &self.name_of(index));
                self.tried(index, put_back.map_err(GuestsError::from));
            }
            // Of an interface that is going; the watch over links tells.
            Err(error) => debug!(ifindex = %index, %error, "cannot look for the program"),
        }
    }

    /// Puts back what is due: qdiscs that nobody else has made, and what failed before.
    pub(super) async fn put_back_due(&mut self) {
        for index in self.lost.due(Instant::now()) {
            let put_back = async {
                if self.datapath.hook() == Hook::Clsact {
                    self.provide_qdisc(index).await?;
                }
                Ok(self.datapath.reattach(index, &self.name_of(index))?)
            }
            .await;
            self.tried(index, put_back);
        }
    }

    /// Gives an interface a qdisc with an ingress hook where it has none. Whether it was made: then it is ours, and a guest's
    /// interface was noted before.
    pub(super) async fn provide_qdisc(&mut self, index: IfIndex) -> Result<bool, GuestsError> {
        if self.is_portal(index) {
            return Ok(self.netlink.add_ingress_qdisc(index).await?);
        }
        Ok(qdisc::provide_qdisc(&self.netlink, &self.datapath, index).await?)
    }

    /// Looks whether a filter is in its place, and puts it back at once where there is a qdisc for it.
    async fn look_at(&mut self, index: IfIndex) {
        if !self.attached.contains_key(&index) && !self.is_portal(index) {
            return;
        }
        let is_there = async {
            let programs = self.netlink.filter_programs(index).await?;
            Ok::<_, GuestsError>(programs.contains(&self.datapath.program_id(index)?))
        };
        match is_there.await {
            Ok(true) => self.lost.forget(index),
            Ok(false) => {
                self.is_lost(index);
                let put_back = self.datapath.reattach(index, &self.name_of(index));
                // Else there is no qdisc, mostly; that is not worth telling until it is ours to make one.
                if put_back.is_ok() {
                    self.tried(index, put_back.map_err(GuestsError::from));
                }
            }
            Err(error) => warn!(ifindex = %index, %error, "cannot look for the program"),
        }
    }

    fn disown_qdisc(&self, index: IfIndex) {
        if self.attached.contains_key(&index)
            && let Err(error) = self.datapath.set_qdisc_owned(index, false)
        {
            warn!(ifindex = %index, %error, "a qdisc that is gone is still noted");
        }
    }

    fn is_lost(&mut self, index: IfIndex) {
        if self.lost.lost.contains_key(&index) {
            return;
        }
        warn!(interface = self.name_of(index), "somebody took our program off; putting it back");
        let since = Instant::now();
        let due = if self.is_portal(index) { since } else { since + GRACE };
        self.lost.lost.insert(index, Loss { since, due, error: None });
    }

    fn tried(&mut self, index: IfIndex, put_back: Result<(), GuestsError>) {
        let interface = self.name_of(index);
        let Some(loss) = self.lost.lost.get_mut(&index) else { return };
        match put_back {
            Ok(()) => {
                info!(interface, after = ?loss.since.elapsed(), "our program is back");
                self.lost.forget(index);
            }
            Err(error) => {
                let error = Some(error.to_string());
                if loss.error != error {
                    warn!(interface, error, "our program cannot be put back; trying again");
                }
                loss.due = Instant::now() + AGAIN;
                loss.error = error;
            }
        }
        self.tell_failures();
    }

    fn is_portal(&self, index: IfIndex) -> bool {
        self.datapath.portal() == Some(index)
    }

    fn name_of(&self, index: IfIndex) -> String {
        let attached = self.attached.get(&index);
        attached.map_or_else(|| portal::HOST_END.to_owned(), |attached| attached.link.name.clone())
    }
}
