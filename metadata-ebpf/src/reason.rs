//! The reasons for verdicts: one closed list, which indexes the kernel's counters and labels the
//! metrics.

/// The action that the kernel takes on a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Leave it, unchanged, to the next program and to the host's own path.
    Next,
    /// Drop it: forged, hostile, or without a receiver.
    Drop,
    /// Redirect it to the portal, where the agent listens.
    ToPortal,
    /// Send it out of the guest's interface, or of the interface that guests share.
    ToGuest,
    /// Receive it on the guest's interface, as if the guest had sent it.
    AsGuest,
}

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $label:literal => $verdict:ident,)+) => {
        /// The reason for a verdict: an index into `MD_STATS` and a label in the metrics.
        ///
        /// A packet that is not metadata traffic has no reason: it leaves before any map is
        /// touched, and that includes the counters.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum Reason {
            $($(#[doc = $doc])+ $name,)+
        }

        impl Reason {
            /// Every reason, in the order of the counters.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// Returns the label in metrics and in `status`.
            #[must_use]
            pub const fn label(self) -> &'static str {
                match self { $(Self::$name => $label,)+ }
            }

            /// Returns the verdict for packets with this reason.
            #[must_use]
            #[inline(always)]
            pub const fn verdict(self) -> Verdict {
                match self { $(Self::$name => Verdict::$verdict,)+ }
            }

            /// Returns the explanation for operators.
            #[must_use]
            pub const fn describe(self) -> &'static str {
                match self { $(Self::$name => concat!($($doc),+),)+ }
            }
        }
    };
}

reasons! {
    /// A new connection, redirected to the portal.
    ConnectionOpened = "connection_opened" => ToPortal,
    /// A segment of a connection that exists in the portal.
    Segment = "segment" => ToPortal,
    /// An ICMP error about a connection that exists in the portal.
    IcmpError = "icmp_error" => ToPortal,
    /// A reply, sent to the guest.
    Reply = "reply" => ToGuest,
    /// A reply, sent to the MAC address of a guest behind a shared interface.
    RoutedReply = "routed_reply" => ToGuest,
    /// An ARP request for 169.254.169.254, answered in place.
    ArpReply = "arp_reply" => ToGuest,
    /// A neighbour solicitation for fe80::a9fe:a9fe, answered in place.
    NdReply = "nd_reply" => ToGuest,
    /// An ICMP echo request to a metadata address, answered in place.
    EchoReply = "echo_reply" => ToGuest,
    /// At a stop, an ARP request or a solicitation in a guest's name, for the host's own path.
    AddressQuery = "address_query" => AsGuest,

    /// The agent's heartbeat is stale or the portal has no listener, so the host's own path serves.
    AgentAbsent = "agent_absent" => Next,
    /// The program runs on an interface that has no attachment.
    NotAttached = "not_attached" => Next,
    /// A segment or ICMP error of a connection that was not opened through the portal.
    ForeignConnection = "foreign_connection" => Next,
    /// A metadata packet whose VLAN tag does not match a trunk subport of this interface.
    Vlan = "vlan" => Next,
    /// A metadata packet over IPv6 whose source is not link-local.
    Ipv6Source = "ipv6_source" => Next,
    /// A packet over IPv6 on a shared interface from an address not derived from its MAC address.
    Ipv6Underived = "ipv6_underived" => Next,
    /// A metadata packet over IPv6 with extension headers, which are not parsed.
    Ipv6Extension = "ipv6_extension" => Next,
    /// An IPv4 header with a source route, which the kernel refuses by default as well.
    Ipv4SourceRoute = "ipv4_source_route" => Next,
    /// A fragment, which cannot be classified by its ports.
    Fragment = "fragment" => Next,
    /// A truncated or inconsistent header.
    Malformed = "malformed" => Next,
    /// An IPv4 header with a wrong checksum, which translation would hide.
    BadIpv4Checksum = "bad_ipv4_checksum" => Next,

    /// A packet in a router without a legacy path; it would leave by the external gateway.
    Confined = "confined" => Drop,
    /// The source MAC address is not the port's.
    ForgedMac = "forged_mac" => Drop,
    /// The source IP address is not one of the port's.
    ForgedAddress = "forged_address" => Drop,
    /// The guest claims 169.254.169.254 by ARP.
    ForgedArp = "forged_arp" => Drop,
    /// The guest claims fe80::a9fe:a9fe by neighbour discovery.
    ForgedNd = "forged_nd" => Drop,
    /// New connections above the attachment's rate limit.
    SynRate = "syn_rate" => Drop,
    /// New connections above one guest's share of the rate limit of a shared interface.
    GuestSynRate = "guest_syn_rate" => Drop,
    /// A kernel helper failed; the frame may be partly rewritten, so it is dropped.
    HelperFailed = "helper_failed" => Drop,
    /// A packet from the portal whose destination is not a client of an attachment.
    NoClient = "no_client" => Drop,
    /// A reply to a guest whose interface is gone, even if another one has its index now.
    InterfaceGone = "interface_gone" => Drop,
    /// A packet from the portal that is not a reply of the metadata service.
    NotAnAnswer = "not_an_answer" => Drop,
}

/// Number of [`Reason::REFUSALS`].
pub const REFUSAL_COUNT: usize = 8;

impl Reason {
    /// Number of reasons, which is the size of `MD_STATS`.
    pub const COUNT: usize = Self::ALL.len();

    /// The reasons for which packets of a guest are dropped. They follow each other in the list.
    pub const REFUSALS: [Self; REFUSAL_COUNT] = [
        Self::Confined,
        Self::ForgedMac,
        Self::ForgedAddress,
        Self::ForgedArp,
        Self::ForgedNd,
        Self::SynRate,
        Self::GuestSynRate,
        Self::HelperFailed,
    ];

    /// Returns the index into `MD_STATS`.
    #[must_use]
    #[inline(always)]
    pub const fn index(self) -> u32 {
        self as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn index_label_and_order_agree() {
        for (position, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(reason.index() as usize, position, "{reason:?}");
        }
        for (position, reason) in (Reason::Confined.index()..).zip(Reason::REFUSALS) {
            assert_eq!(reason.index(), position, "{reason:?}");
            assert_eq!(reason.verdict(), Verdict::Drop, "{reason:?}");
        }
        let labels: HashSet<_> = Reason::ALL.iter().map(|r| r.label()).collect();
        assert_eq!(labels.len(), Reason::COUNT, "labels are distinct");
    }
}
