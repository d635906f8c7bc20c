//! Refused packets of guests, as the kernel reports and records them.
//!
//! A ring buffer wakes the agent. The kernel reports each attachment and reason once a second at
//! most, so a guest that floods costs the agent nothing more.

use std::io;
use std::net::{IpAddr, Ipv6Addr};

use aya::maps::{MapData, RingBuf};
use metadata_ebpf::abi;
use metadata_ebpf::identity::AttachmentId;
use metadata_ebpf::reason::Reason;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::DatapathError;
use crate::ids::MacAddress;

/// One packet of a guest that the kernel dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub attachment: AttachmentId,
    pub reason: Reason,
    /// Source of the packet; `None` if it is not known.
    pub mac: Option<MacAddress>,
    pub address: Option<IpAddr>,
    /// `CLOCK_MONOTONIC` nanoseconds, see [`super::Clock`].
    pub at_ns: u64,
}

impl Refusal {
    fn from_abi(refusal: &abi::Refusal) -> Option<Self> {
        let abi::Refusal { at_ns, attachment, reason, address, mac, .. } = *refusal;
        Some(Self {
            attachment: AttachmentId::new(attachment)?,
            reason: *Reason::ALL.get(usize::try_from(reason).ok()?)?,
            mac: Some(MacAddress(mac)).filter(|_| mac != [0; 6]),
            address: Some(Ipv6Addr::from(address).to_canonical()).filter(|_| address != [0; 16]),
            at_ns,
        })
    }
}

/// The refused packets of one attachment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RefusalRecord {
    /// Packets by reason, without zeroes.
    pub packets: Vec<(Reason, u64)>,
    pub last: Refusal,
}

impl RefusalRecord {
    /// Returns `None` if no packet was refused.
    pub(super) fn from_entry(refusals: &abi::Refusals) -> Option<Self> {
        let packets = Reason::REFUSALS.into_iter().zip(refusals.packets);
        let packets = packets.filter(|(_, count)| *count > 0).collect();
        Some(Self { packets, last: Refusal::from_abi(&refusals.last)? })
    }
}

/// The refused packets that the kernel reports.
pub(crate) struct RefusalStream {
    events: AsyncFd<RingBuf<MapData>>,
}

impl RefusalStream {
    /// Follows the ring buffer. Must be called in a runtime.
    #[expect(
        deprecated,
        reason = "its replacement is unsafe, for descriptors that may change; a ring buffer keeps its own"
    )]
    pub(super) fn new(events: RingBuf<MapData>) -> Result<Self, DatapathError> {
        let events = AsyncFd::with_interest(events, Interest::READABLE);
        events.map(|events| Self { events }).map_err(|source| DatapathError::WatchRefusals { source })
    }

    /// Waits for the next report. Cancel safe.
    ///
    /// # Errors
    /// The runtime cannot poll the ring buffer.
    pub(crate) async fn next(&mut self) -> io::Result<Refusal> {
        loop {
            let mut guard = self.events.readable_mut().await?;
            while let Some(event) = guard.get_inner_mut().next() {
                let refusal = abi::Refusal::from_event(&event);
                drop(event);
                if let Some(refusal) = refusal.as_ref().and_then(Refusal::from_abi) {
                    return Ok(refusal);
                }
            }
            guard.clear_ready();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(reason: Reason, address: [u8; 16]) -> abi::Refusal {
        let mac = [0xfa, 0x16, 0x3e, 0, 0, 5];
        abi::Refusal { at_ns: 9, attachment: 7, reason: reason.index(), address, mac, _pad: [0; 2] }
    }

    #[test]
    fn a_record_counts_by_reason_and_names_the_last_source() {
        let mut entry = abi::Refusals::NONE;
        assert_eq!(RefusalRecord::from_entry(&entry), None);
        entry.packets[2] = 5;
        let mapped = Ipv6Addr::from_bits(0xffff_0a00_0009).octets();
        entry.last = refusal(Reason::ForgedAddress, mapped);
        let record = RefusalRecord::from_entry(&entry).unwrap();
        assert_eq!(record.packets, [(Reason::ForgedAddress, 5)]);
        assert_eq!(record.last.address, Some("10.0.0.9".parse().unwrap()));
        assert_eq!(record.last.attachment, AttachmentId::new(7).unwrap());
    }

    #[test]
    fn an_event_with_unknown_values_is_not_a_refusal() {
        let unknown = abi::Refusal { reason: 1000, ..refusal(Reason::ForgedMac, [0; 16]) };
        assert_eq!(Refusal::from_abi(&unknown), None);
        let nameless = abi::Refusal { attachment: 0, ..unknown };
        assert_eq!(Refusal::from_abi(&nameless), None);
        let failed = abi::Refusal { mac: [0; 6], ..refusal(Reason::HelperFailed, [0; 16]) };
        let failed = Refusal::from_abi(&failed).unwrap();
        assert_eq!((failed.mac, failed.address), (None, None));
    }
}
