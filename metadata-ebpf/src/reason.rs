//! Why a packet went where it went: the closed list that counts in the kernel, labels in Prometheus and rows in
//! the operations page share.

/// What a program tells the kernel to do with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Not ours, or not now: the next program, and the host's own path, see it untouched.
    Next,
    /// Forged, hostile, or meant for nobody.
    Drop,
    /// Into the portal, where the agent listens.
    ToPortal,
    /// Out of the guest's interface.
    ToGuest,
    /// Out of the guests' interface, to whoever has the destination address there by the kernel's neighbour table.
    ToNeighbour,
}

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $label:literal => $verdict:ident,)+) => {
        /// The reason for a verdict. Index into `MD_STATS`, label in the metrics.
        ///
        /// A packet that is not metadata traffic has no reason: it leaves before any map is touched, and that
        /// includes the counters.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum Reason {
            $($(#[doc = $doc])+ $name,)+
        }

        impl Reason {
            /// Every reason, in the order of the counters.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// The label in metrics and in `status`.
            #[must_use]
            pub const fn label(self) -> &'static str {
                match self { $(Self::$name => $label,)+ }
            }

            /// The policy, on one screen: what becomes of a packet for this reason.
            #[must_use]
            #[inline(always)]
            pub const fn verdict(self) -> Verdict {
                match self { $(Self::$name => Verdict::$verdict,)+ }
            }

            /// What an operator reads about it.
            #[must_use]
            pub const fn describe(self) -> &'static str {
                match self { $(Self::$name => concat!($($doc),+),)+ }
            }
        }
    };
}

reasons! {
    /// A new connection, led into the portal.
    ConnectionOpened = "connection_opened" => ToPortal,
    /// A segment of a connection that the portal knows.
    Segment = "segment" => ToPortal,
    /// An answer, led back to the guest.
    Reply = "reply" => ToGuest,
    /// An answer, led back to a guest behind an interface that many share, by that namespace's neighbour table.
    RoutedReply = "routed_reply" => ToNeighbour,
    /// An ARP request for 169.254.169.254, answered in place.
    ArpReply = "arp_reply" => ToGuest,
    /// A neighbour solicitation for fe80::a9fe:a9fe, answered in place.
    NdReply = "nd_reply" => ToGuest,
    /// An ICMP echo request to a metadata address, answered in place.
    EchoReply = "echo_reply" => ToGuest,

    /// The agent's heartbeat is stale or nobody listens in the portal: the host's own path serves.
    AgentAbsent = "agent_absent" => Next,
    /// The interface carries the program but no attachment is known for it.
    NotAttached = "not_attached" => Next,
    /// A segment of a connection that did not begin with us.
    ForeignConnection = "foreign_connection" => Next,
    /// A metadata packet with a VLAN tag that no trunk subport on this interface has.
    Vlan = "vlan" => Next,
    /// A metadata packet over IPv6 whose source is not link-local.
    Ipv6Source = "ipv6_source" => Next,
    /// A metadata packet over IPv6 with extension headers, which we do not look behind.
    Ipv6Extension = "ipv6_extension" => Next,
    /// An IPv4 header with options, which we do not translate.
    Ipv4Options = "ipv4_options" => Next,
    /// A fragment, which has no ports to judge it by.
    Fragment = "fragment" => Next,
    /// A header that is cut short or contradicts itself.
    Malformed = "malformed" => Next,
    /// An IPv4 header whose checksum is wrong; translation would hide that.
    BadIpv4Checksum = "bad_ipv4_checksum" => Next,

    /// A packet in a router that would be left to a path that is not there, and would leave by the external gateway.
    Confined = "confined" => Drop,
    /// The source MAC address is not the port's.
    ForgedMac = "forged_mac" => Drop,
    /// The source IP address is none of the port's.
    ForgedAddress = "forged_address" => Drop,
    /// The guest claims 169.254.169.254 for itself by ARP.
    ForgedArp = "forged_arp" => Drop,
    /// The guest claims fe80::a9fe:a9fe for itself by neighbour discovery.
    ForgedNd = "forged_nd" => Drop,
    /// More new connections than the attachment's allowance.
    SynRate = "syn_rate" => Drop,
    /// More source addresses than one attachment may use.
    ClientQuota = "client_quota" => Drop,
    /// The client map is full.
    ClientsFull = "clients_full" => Drop,
    /// A packet out of the portal that is addressed to no client.
    NoClient = "no_client" => Drop,
    /// A packet out of the portal that is no answer of the metadata service.
    NotAnAnswer = "not_an_answer" => Drop,
    /// A kernel helper refused its work; the frame may be half rewritten and goes nowhere.
    HelperFailed = "helper_failed" => Drop,
}

impl Reason {
    /// How many there are: the size of `MD_STATS`.
    pub const COUNT: usize = Self::ALL.len();

    /// Position in `MD_STATS`.
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
        let labels: HashSet<_> = Reason::ALL.iter().map(|r| r.label()).collect();
        assert_eq!(labels.len(), Reason::COUNT, "labels are distinct");
    }
}
