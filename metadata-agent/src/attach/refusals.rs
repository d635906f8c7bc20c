//! Attributes the packets that the kernel refuses to their ports: logs the start of each episode,
//! and passes refused sources on to the sources of ports, whose knowledge may be out of date.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use metadata_ebpf::identity::AttachmentId;
use metadata_ebpf::reason::Reason;
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

use crate::datapath::{Refusal, RefusalStream};
use crate::directory::{AnyBinding, Binding, Directory, Owner};
use crate::inventory::refused::RefusedSource;

/// Time without a refused packet that ends an episode.
const EPISODE_END: Duration = Duration::from_mins(10);

/// Follows refused packets.
pub(crate) struct RefusalWatcher {
    refusals: RefusalStream,
    directory: Arc<Directory>,
    refused: broadcast::Sender<RefusedSource>,
    episodes: RefusalEpisodes,
}

impl RefusalWatcher {
    #[must_use]
    pub(crate) fn new(
        refusals: RefusalStream,
        directory: Arc<Directory>,
        refused: broadcast::Sender<RefusedSource>,
    ) -> Self {
        Self { refusals, directory, refused, episodes: RefusalEpisodes::default() }
    }

    /// Returns a handle that follows the episodes.
    #[must_use]
    pub(crate) fn episodes(&self) -> RefusalEpisodes {
        self.episodes.clone()
    }

    /// Runs until cancelled.
    pub(crate) async fn run(mut self, cancel: CancellationToken) {
        while let Some(refusal) = cancel.run_until_cancelled(self.refusals.next()).await {
            match refusal {
                Ok(refusal) => self.follow(&refusal),
                Err(error) => {
                    error!(%error, "cannot follow refused packets; they are not logged any more");
                    return cancel.cancelled().await;
                }
            }
        }
    }

    fn follow(&self, refusal: &Refusal) {
        // An attachment that is gone needs no log line. One that is not published yet reports
        // again.
        let Some(binding) = self.directory.binding(refusal.attachment) else { return };
        if self.episodes.note(refusal, Instant::now()) == Episode::Begun {
            log(refusal, &binding);
        }
        if let AnyBinding::Own(binding) = &binding
            && let Some(refused) = refused_source(refusal, binding)
        {
            // Without a reader, no source can be asked again.
            drop(self.refused.send(refused));
        }
    }
}

/// Returns the refused source, if another report of a source of ports could allow it.
fn refused_source(refusal: &Refusal, binding: &Binding) -> Option<RefusedSource> {
    if !matches!(refusal.reason, Reason::ForgedMac | Reason::ForgedAddress) {
        return None;
    }
    Some(RefusedSource {
        device: binding.interface.parse().ok()?,
        index: binding.index,
        vlan: binding.vlan,
        port: binding.owner.port_id(),
        mac: refusal.mac?,
        address: refusal.address?,
    })
}

fn log(refusal: &Refusal, binding: &AnyBinding) {
    let reason = refusal.reason.label();
    let mac = refusal.mac.map(tracing::field::display);
    let address = refusal.address.map(tracing::field::display);
    match binding {
        AnyBinding::Own(binding) => {
            let Binding { interface, vlan, owner, .. } = &**binding;
            let vlan = vlan.map(tracing::field::display);
            let port = owner.port_id().map(tracing::field::display);
            let instance = match owner {
                Owner::Known(port) => Some(tracing::field::display(port.instance)),
                Owner::OnNetwork(_) | Owner::Unknown | Owner::Disputed => None,
            };
            let advice = advice(refusal.reason);
            warn!(interface, vlan, port, instance, reason, mac, address, advice, "guest's packets refused");
        }
        AnyBinding::Shared(binding) => {
            let (namespace, interface) = (&*binding.namespace, &binding.interface);
            let advice = if refusal.reason == Reason::ForgedAddress {
                "the address is in no subnet of the interface; correct the guest"
            } else {
                advice(refusal.reason)
            };
            warn!(namespace, interface, reason, mac, address, advice, "guest's packets refused");
        }
    }
}

/// Returns what an operator can do about a refusal.
fn advice(reason: Reason) -> &'static str {
    match reason {
        Reason::ForgedMac | Reason::ForgedAddress => {
            "allow this source in Neutron (fixed address, allowed address pair, port security), or correct \
             the guest; see source_check"
        }
        Reason::ForgedArp | Reason::ForgedNd => "the guest uses the metadata address as its own; remove it",
        Reason::SynRate | Reason::GuestSynRate => {
            "the guest opens more connections than syn_rate_limit allows"
        }
        Reason::Confined => "the router has no other metadata path; see confine_routers",
        Reason::HelperFailed => "report it as a bug",
        Reason::ConnectionOpened
        | Reason::Segment
        | Reason::IcmpError
        | Reason::Reply
        | Reason::RoutedReply
        | Reason::ArpReply
        | Reason::NdReply
        | Reason::EchoReply
        | Reason::AddressQuery
        | Reason::AgentAbsent
        | Reason::NotAttached
        | Reason::ForeignConnection
        | Reason::Vlan
        | Reason::Ipv6Source
        | Reason::Ipv6Underived
        | Reason::Ipv6Extension
        | Reason::Ipv4SourceRoute
        | Reason::Fragment
        | Reason::Malformed
        | Reason::BadIpv4Checksum
        | Reason::NoClient
        | Reason::InterfaceGone
        | Reason::NotAnAnswer => "see the packet reasons in docs/operations.md",
    }
}

/// The attachments whose packets are being refused, by reason.
#[derive(Clone, Debug, Default)]
pub(crate) struct RefusalEpisodes(Arc<Mutex<BTreeMap<(AttachmentId, u32), Instant>>>);

/// The part of an episode that a refused packet belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Episode {
    Begun,
    Continued,
}

impl RefusalEpisodes {
    fn note(&self, refusal: &Refusal, now: Instant) -> Episode {
        let mut last = self.lock();
        let key = (refusal.attachment, refusal.reason.index());
        let before = last.insert(key, now);
        if before.is_some_and(|before| !has_ended(before, now)) {
            return Episode::Continued;
        }
        last.retain(|_, last| !has_ended(*last, now));
        Episode::Begun
    }

    /// Returns the number of attachments in an episode of each reason.
    #[must_use]
    pub(crate) fn count(&self) -> Vec<(Reason, usize)> {
        let (last, now) = (self.lock(), Instant::now());
        let current = |reason: Reason| {
            let of_reason = last.iter().filter(|((_, index), _)| *index == reason.index());
            (reason, of_reason.filter(|(_, last)| !has_ended(**last, now)).count())
        };
        Reason::REFUSALS.into_iter().map(current).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<(AttachmentId, u32), Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn has_ended(last: Instant, now: Instant) -> bool {
    now.saturating_duration_since(last) >= EPISODE_END
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{IfIndex, MacAddress};

    fn refusal(attachment: u32, reason: Reason) -> Refusal {
        let attachment = AttachmentId::new(attachment).unwrap();
        let (mac, address) = (Some(MacAddress([2; 6])), Some([10, 0, 0, 9].into()));
        Refusal { attachment, reason, mac, address, at_ns: 1 }
    }

    #[test]
    fn an_episode_ends_after_a_time_without_refusals() {
        let episodes = RefusalEpisodes::default();
        let (forged, began) = (refusal(1, Reason::ForgedAddress), Instant::now());
        let long = EPISODE_END / 10 * 9;
        assert_eq!(episodes.note(&forged, began), Episode::Begun);
        assert_eq!(episodes.note(&refusal(1, Reason::ForgedMac), began), Episode::Begun, "another reason");
        assert_eq!(episodes.note(&refusal(2, Reason::ForgedAddress), began), Episode::Begun, "another port");
        assert_eq!(episodes.note(&forged, began + long), Episode::Continued);
        assert_eq!(episodes.note(&forged, began + 2 * long), Episode::Continued);
        assert_eq!(episodes.note(&forged, began + 2 * long + EPISODE_END), Episode::Begun);
        assert_eq!(episodes.lock().len(), 1, "what ended is forgotten");
    }

    #[test]
    fn episodes_are_counted_by_reason() {
        let episodes = RefusalEpisodes::default();
        for attachment in [1, 2] {
            episodes.note(&refusal(attachment, Reason::ForgedAddress), Instant::now());
        }
        let counts = episodes.count();
        assert_eq!(counts.len(), Reason::REFUSALS.len());
        for (reason, count) in counts {
            assert_eq!(count, if reason == Reason::ForgedAddress { 2 } else { 0 }, "{reason:?}");
        }
    }

    #[test]
    fn only_a_source_that_could_be_allowed_is_reported() {
        let now = Instant::now();
        let binding = Binding {
            interface: "tap1".to_owned(),
            index: IfIndex(3),
            vlan: None,
            since: now,
            unknown_since: now,
            owner: Owner::Unknown,
        };
        for reason in Reason::REFUSALS {
            let is_reported = refused_source(&refusal(1, reason), &binding).is_some();
            assert_eq!(
                is_reported,
                matches!(reason, Reason::ForgedMac | Reason::ForgedAddress),
                "{reason:?}"
            );
        }
        let nameless = Refusal { address: None, ..refusal(1, Reason::ForgedMac) };
        assert_eq!(refused_source(&nameless, &binding), None);
    }
}
