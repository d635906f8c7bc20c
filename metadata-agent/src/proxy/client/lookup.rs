//! Finds a client by the network or router that it is on and by its address. This is how a haproxy
//! identifies clients, and how the agent distinguishes guests behind a shared attachment.

use std::fmt;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;

use metadata_ebpf::identity::{ClientAddress, GuestAddress};
use serde::{Deserialize, Serialize};

use super::ClientIdentity;
use crate::ids::{MacAddress, NetworkOrRouter};

/// A client's address, and the network or router on which it is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
pub struct ClientQuery {
    pub scope: NetworkOrRouter,
    /// An IPv4-mapped IPv6 address counts as the IPv4 address.
    pub address: IpAddr,
    /// The MAC address that the kernel saw the client send from; `None` behind a haproxy.
    pub mac: Option<MacAddress>,
}

/// The attribute that identifies a port on its network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum PortMatch {
    /// One of its fixed addresses.
    Address(IpAddr),
    Mac(MacAddress),
}

pub type LookupFuture<'a> = Pin<Box<dyn Future<Output = LookupOutcome> + Send + 'a>>;

/// Finds the port behind a [`ClientQuery`]. A look-up may query a remote service, and limits its
/// own time.
pub trait ClientLookup: fmt::Debug + Send + Sync + 'static {
    fn find<'a>(&'a self, query: &'a ClientQuery) -> LookupFuture<'a>;
}

/// The result of a [`ClientQuery`].
#[derive(Debug, Clone, Deserialize, Serialize)]
pub enum LookupOutcome {
    Identified(Arc<ClientIdentity>),
    /// No port has this address there.
    NotFound,
    /// Several ports have it. The proxy never guesses.
    Ambiguous,
    /// The port does not belong to an instance.
    NotAnInstance,
    /// The look-up cannot be answered now.
    Unavailable,
}

impl LookupOutcome {
    /// Asks `other` if this outcome is not conclusive. The outcome of `other` is final.
    pub(crate) async fn or_else<F: Future<Output = Self>>(self, other: impl FnOnce() -> F) -> Self {
        match self {
            Self::NotFound | Self::Unavailable => other().await,
            conclusive @ (Self::Identified(_) | Self::Ambiguous | Self::NotAnInstance) => conclusive,
        }
    }
}

impl ClientQuery {
    /// Describes a guest behind a shared attachment.
    #[must_use]
    pub(crate) fn from_guest(scope: NetworkOrRouter, client: &ClientAddress, mac: MacAddress) -> Self {
        Self { scope, address: guest_ip(client), mac: Some(mac) }
    }

    /// Returns the attribute by which to find the port, or `None` if the address identifies no
    /// port.
    ///
    /// A link-local address is not a fixed address. It identifies a port by the MAC address that it
    /// was made from. The client must send from that MAC address, if the kernel saw it.
    #[must_use]
    pub(crate) fn port_match(&self) -> Option<PortMatch> {
        match self.address {
            IpAddr::V6(address) if address.is_unicast_link_local() => {
                let embedded = MacAddress::from_link_local(address)?;
                self.mac.is_none_or(|seen| seen == embedded).then_some(PortMatch::Mac(embedded))
            }
            address @ (IpAddr::V4(_) | IpAddr::V6(_)) => Some(PortMatch::Address(address)),
        }
    }
}

/// Returns the address that a guest sent from.
pub(super) fn guest_ip(client: &ClientAddress) -> IpAddr {
    match client.guest {
        GuestAddress::Ipv4(octets) => IpAddr::from(octets),
        GuestAddress::Ipv6LinkLocal([a, b, c, d, e, f, g, h]) => {
            IpAddr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a, b, c, d, e, f, g, h])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::client::signatures::samples::signatures;

    const NETWORK: &str = "11111111-1111-4111-8111-111111111111";

    fn query(address: &str, mac: Option<MacAddress>) -> ClientQuery {
        let scope = NetworkOrRouter::Network(NETWORK.parse().unwrap());
        ClientQuery { scope, address: address.parse().unwrap(), mac }
    }

    #[test]
    fn a_link_local_address_must_match_the_source_mac() {
        let mac = |text: &str| -> MacAddress { text.parse().unwrap() };
        let own = mac("fa:16:3e:0a:0b:0c");
        let another = mac("fa:16:3e:0a:0b:0d");
        let port_match = |address, mac| query(address, mac).port_match();
        for seen in [None, Some(own)] {
            assert_eq!(port_match("fe80::f816:3eff:fe0a:b0c", seen), Some(PortMatch::Mac(own)));
        }
        assert_eq!(port_match("fe80::f816:3eff:fe0a:b0c", Some(another)), None);
        assert_eq!(port_match("fe80::1", Some(own)), None);
        for seen in [None, Some(own), Some(another)] {
            let address: IpAddr = "10.0.0.5".parse().unwrap();
            assert_eq!(port_match("10.0.0.5", seen), Some(PortMatch::Address(address)));
        }
    }

    #[tokio::test]
    async fn only_an_inconclusive_outcome_asks_the_next_lookup() {
        for (first, asks) in [
            (LookupOutcome::NotFound, true),
            (LookupOutcome::Unavailable, true),
            (LookupOutcome::Ambiguous, false),
            (LookupOutcome::NotAnInstance, false),
        ] {
            let second = LookupOutcome::Identified(Arc::new(ClientIdentity::new(
                NETWORK.parse().unwrap(),
                &"acme".parse().unwrap(),
                Vec::new(),
                signatures(1),
            )));
            let outcome = first.clone().or_else(|| std::future::ready(second)).await;
            assert_eq!(matches!(outcome, LookupOutcome::Identified(_)), asks, "{first:?}");
        }
    }
}
