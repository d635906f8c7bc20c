//! Keeps the portal as the agent made it.
//!
//! The kernel reports changes of links, addresses, neighbours, routes and rules. After each, and
//! every few seconds for sysctls and the namespace's name, the guard compares the portal with the
//! desired state, and repairs the differences. If that fails, the programs leave guests to the
//! host's own path until it succeeds.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{FutureExt as _, Stream, StreamExt as _};
use tokio::time::{Instant as TimerInstant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

use super::desired::{Damage, Repair};
use super::host_end::HostEnd;
use super::{HOST_END, Portal, PortalError};
use crate::net::damage::{DamageReports, Effect, Part};
use crate::net::netlink::{LinkEvent, watch_ipv6_in, watch_links};

/// The interval of comparisons without an event.
const COMPARE: Duration = Duration::from_secs(5);
/// The interval of attempts while there is damage.
const RETRY: Duration = Duration::from_secs(1);
/// The debounce time for events, which come in bursts.
const SETTLE: Duration = Duration::from_millis(20);
/// The part of the time that comparisons may take, as a divisor. A portal has as many links as
/// there are served namespaces, and events while they are connected.
const SHARE: u32 = 10;

/// The task that guards the portal.
pub(crate) struct PortalGuard {
    portal: Arc<Portal>,
    host_end: HostEnd,
    reports: DamageReports,
    /// Damage that the last repair left.
    open: Vec<Damage>,
    has_failed: bool,
    /// The last error, which has been logged.
    logged: Option<String>,
}

impl PortalGuard {
    pub(crate) fn new(portal: Arc<Portal>, host_end: HostEnd, reports: DamageReports) -> Self {
        Self { portal, host_end, reports, open: Vec::new(), has_failed: false, logged: None }
    }

    /// Guards the portal until cancelled, or until a watch ends.
    ///
    /// # Errors
    /// The kernel provides no socket.
    pub(crate) fn start(
        self,
        cancel: CancellationToken,
    ) -> Result<impl Future<Output = ()> + Send + use<>, PortalError> {
        let inside = watch_ipv6_in(&self.portal.netns)?;
        let host = watch_links()?;
        Ok(async move {
            cancel.run_until_cancelled(self.run(inside, host)).await;
        })
    }

    async fn run(
        mut self,
        mut inside: impl Stream<Item = ()> + Unpin + Send,
        mut host: impl Stream<Item = LinkEvent> + Unpin + Send,
    ) {
        let mut due = TimerInstant::now();
        loop {
            tokio::select! {
                event = inside.next() => {
                    if event.is_none() {
                        return;
                    }
                }
                event = host.next() => match event {
                    None => return,
                    Some(event) if !self.concerns(&event) => continue,
                    Some(_) => {}
                },
                () = sleep_until(due) => {}
            }
            sleep(SETTLE).await;
            // What came meanwhile shows in the comparison.
            while let Some(Some(())) = inside.next().now_or_never() {}
            let began = Instant::now();
            self.check().await;
            let pause = if self.has_failed { RETRY } else { COMPARE };
            due = TimerInstant::now() + pause;
            sleep((began.elapsed() * SHARE).min(RETRY)).await;
        }
    }

    fn concerns(&self, event: &LinkEvent) -> bool {
        let index = self.portal.host_ifindex();
        match event {
            LinkEvent::Present(link) => link.index == index || link.name == HOST_END,
            LinkEvent::Gone(gone) => *gone == index,
            LinkEvent::Overrun => true,
        }
    }

    /// Compares, and repairs if necessary.
    async fn check(&mut self) {
        let found = match self.portal.damage().await {
            Ok(found) => found,
            Err(error) => return self.log_failure(&error.to_string(), "nothing"),
        };
        let new: Vec<_> = found.iter().filter(|damage| !self.open.contains(damage)).cloned().collect();
        for damage in &new {
            self.reports.count(damage.kind);
        }
        if found.is_empty() && self.is_connected() {
            return self.close(&[]);
        }
        // From here on the agent is not ready. Guests wait for the repair, for milliseconds.
        self.report(&found);
        let repaired = self.repair(&found).await;
        let left = self.portal.damage().await.unwrap_or(found);
        match repaired {
            Ok(()) if left.is_empty() => self.close(&new),
            repaired => self.keep_open(left, &new, repaired),
        }
    }

    /// Notes what a repair left, and lets the programs step aside if no guest is served.
    fn keep_open(&mut self, left: Vec<Damage>, new: &[Damage], repaired: Result<(), PortalError>) {
        self.open = left;
        self.has_failed = true;
        self.report(&self.open);
        match repaired {
            Err(error) => self.log_failure(&error.to_string(), &list(new)),
            // The owner of an uplink creates it again, some seconds later.
            Ok(()) if self.open.iter().all(|damage| matches!(damage.repair, Repair::ReplaceUplink(_))) => {
                if !new.is_empty() {
                    warn!(found = list(new), "portal was damaged externally; repairing");
                }
            }
            Ok(()) => self.log_failure("it was damaged again", &list(new)),
        }
    }

    async fn repair(&mut self, found: &[Damage]) -> Result<(), PortalError> {
        self.portal.repair(found).await?;
        if self.is_connected() {
            return Ok(());
        }
        self.host_end.connect(self.portal.host_ifindex()).await
    }

    /// Returns true if the datapath uses the portal's interface, and not a former one.
    fn is_connected(&self) -> bool {
        self.host_end.connected() == self.portal.host_ifindex()
    }

    /// Notes that nothing is damaged any more. `repaired` was found and repaired just now.
    fn close(&mut self, repaired: &[Damage]) {
        let repaired: Vec<_> = self.open.drain(..).chain(repaired.iter().cloned()).collect();
        let has_failed = std::mem::take(&mut self.has_failed);
        self.logged = None;
        if has_failed || !repaired.is_empty() {
            warn!(found = list(&repaired), "portal was damaged externally; repaired");
        }
        self.reports.clear(Part::Portal);
        self.reports.clear(Part::Uplinks);
    }

    /// Reports damage. Its effect counts once a repair has left it.
    fn report(&self, found: &[Damage]) {
        let of_uplinks = |damage: &&Damage| damage.repair.is_about_uplink();
        let (uplinks, portal): (Vec<_>, Vec<_>) = found.iter().partition(of_uplinks);
        let left = portal.iter().filter(|damage| self.open.contains(damage));
        let mut effect = left.map(|damage| damage.repair.effect()).max().unwrap_or(Effect::Served);
        let mut lines: Vec<_> = portal.iter().map(|damage| damage.found.clone()).collect();
        if !self.is_connected() {
            lines.push(PortalError::NotConnected.to_string());
            if self.has_failed {
                effect = Effect::Stopped;
            }
        }
        self.reports.report(Part::Portal, lines, effect);
        let uplinks = uplinks.iter().map(|damage| damage.found.clone()).collect();
        self.reports.report(Part::Uplinks, uplinks, Effect::Served);
    }

    fn log_failure(&mut self, error: &str, found: &str) {
        if self.logged.as_deref() != Some(error) {
            error!(found, error, "cannot repair portal; retrying");
            self.logged = Some(error.to_owned());
        }
    }
}

fn list(damage: &[Damage]) -> String {
    damage.iter().map(|damage| damage.found.as_str()).collect::<Vec<_>>().join("; ")
}
