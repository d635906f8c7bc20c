//! Whom a haproxy of Neutron's says that it asks for: the headers that it sets on each request, and whoever knows the
//! instance behind them. A client that came through a router's or a DHCP server's namespace is named in the same way: by
//! that scope and its own address.
//!
//! A guest writes headers as well, and haproxy leaves most of them in. What is its own: `X-Forwarded-For`, which it adds
//! behind those of the guest, so the last one counts and no other; and one of `X-Neutron-Network-ID` and
//! `X-Neutron-Router-ID`, of which it deletes the other. OVN's driver adds `X-OVN-Network-ID` and deletes nothing. Which
//! driver made a haproxy cannot be seen, so a request with more than one of the three, or one of them twice, is refused: the
//! guest that sent the other one harms nobody but itself.

use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use metadata_ebpf::identity::{ClientAddress, GuestAddress};

use super::headers::X_FORWARDED_FOR;
use super::requester::{ClientIdentity, NetworkHeader};
use crate::ids::{MacAddress, NetworkOrRouter};

const X_NEUTRON_ROUTER_ID: HeaderName = HeaderName::from_static("x-neutron-router-id");

/// Who asks, as a haproxy knows it, or we do where many guests share an attachment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientQuery {
    /// Where the haproxy listens.
    pub scope: NetworkOrRouter,
    /// From which address it was asked; an IPv4 address that it saw as an IPv6 one is an IPv4 address.
    pub address: IpAddr,
    /// From which MAC address, if the kernel saw that.
    pub mac: Option<MacAddress>,
}

/// By what a port is known on its network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PortMatch {
    /// One of its fixed addresses.
    Address(IpAddr),
    /// Its MAC address.
    Mac(MacAddress),
}

/// Knows whose request a haproxy passes on. May ask elsewhere and take its time, within limits of its own.
pub trait ClientLookup: Send + Sync + 'static {
    /// Who it is.
    fn find(&self, caller: &ClientQuery) -> impl Future<Output = LookupOutcome> + Send;
}

impl<T: ClientLookup + ?Sized> ClientLookup for Arc<T> {
    fn find(&self, caller: &ClientQuery) -> impl Future<Output = LookupOutcome> + Send {
        (**self).find(caller)
    }
}

/// Who a [`ClientQuery`] is.
#[derive(Debug, Clone)]
pub enum LookupOutcome {
    /// This one.
    Identified(Arc<ClientIdentity>),
    /// No port has this address there.
    NotFound,
    /// Several ports have it. Never guessed.
    Ambiguous,
    /// A port that is not an instance's.
    NotAnInstance,
    /// That cannot be told now.
    Unavailable,
}

/// Asks the second where the first does not know; then its word is the last.
impl<A: ClientLookup, B: ClientLookup> ClientLookup for (A, B) {
    async fn find(&self, caller: &ClientQuery) -> LookupOutcome {
        match self.0.find(caller).await {
            LookupOutcome::NotFound | LookupOutcome::Unavailable => self.1.find(caller).await,
            certain @ (LookupOutcome::Identified(_)
            | LookupOutcome::Ambiguous
            | LookupOutcome::NotAnInstance) => certain,
        }
    }
}

/// Why a request does not tell who asks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClientQueryError {
    /// None of the three headers.
    #[error("the request names neither a network nor a router")]
    NoScope,
    /// More than one of the three headers.
    #[error("the request names more than one network or router")]
    AmbiguousScope,
    /// One of the three headers is no UUID.
    #[error("{header}: {value:?} is not a UUID")]
    InvalidScope {
        /// The header.
        header: HeaderName,
        /// Its value.
        value: HeaderValue,
    },
    /// Without `X-Forwarded-For`.
    #[error("the request names no address")]
    NoAddress,
    /// The last of `X-Forwarded-For` is no address.
    #[error("X-Forwarded-For: {value:?} does not end in an address")]
    InvalidAddress {
        /// Its value.
        value: HeaderValue,
    },
}

impl ClientQuery {
    /// A client of an attachment that all guests at a scope share, with the MAC address that the kernel saw it send from.
    #[must_use]
    pub fn of(scope: NetworkOrRouter, client: &ClientAddress, mac: Option<MacAddress>) -> Self {
        let address = match client.guest {
            GuestAddress::Ipv4(octets) => IpAddr::from(octets),
            GuestAddress::Ipv6LinkLocal([a, b, c, d, e, f, g, h]) => {
                IpAddr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a, b, c, d, e, f, g, h])
            }
        };
        Self { scope, address, mac }
    }

    /// Reads the headers of a request that came from a haproxy.
    pub(super) fn read(headers: &HeaderMap) -> Result<Self, ClientQueryError> {
        Ok(Self { scope: scope(headers)?, address: address(headers)?, mac: None })
    }

    /// By what its port is known at the scope, if by anything. Of a link-local address that is the MAC address that it was
    /// made of, and from which the caller must send where that was seen.
    #[must_use]
    pub fn mark(&self) -> Option<PortMatch> {
        match self.address {
            // No port has it among its fixed addresses.
            IpAddr::V6(address) if address.is_unicast_link_local() => {
                let of_address = self.mac_in_address()?;
                self.mac.is_none_or(|seen| seen == of_address).then_some(PortMatch::Mac(of_address))
            }
            address @ (IpAddr::V4(_) | IpAddr::V6(_)) => Some(PortMatch::Address(address)),
        }
    }

    /// The MAC address of a link-local address that was made from one (RFC 4291, appendix A).
    fn mac_in_address(&self) -> Option<MacAddress> {
        let IpAddr::V6(address) = self.address else { return None };
        match address.octets() {
            [0xfe, 0x80, 0, 0, 0, 0, 0, 0, a, b, c, 0xff, 0xfe, d, e, f] => {
                Some(MacAddress([a ^ 2, b, c, d, e, f]))
            }
            _ => None,
        }
    }
}

fn scope(headers: &HeaderMap) -> Result<NetworkOrRouter, ClientQueryError> {
    let mut found = None;
    for name in [NetworkHeader::Neutron.name(), NetworkHeader::Ovn.name(), X_NEUTRON_ROUTER_ID] {
        for value in headers.get_all(&name) {
            if found.replace((name.clone(), value)).is_some() {
                return Err(ClientQueryError::AmbiguousScope);
            }
        }
    }
    let (header, value) = found.ok_or(ClientQueryError::NoScope)?;
    if header == X_NEUTRON_ROUTER_ID {
        id(header, value).map(NetworkOrRouter::Router)
    } else {
        id(header, value).map(NetworkOrRouter::Network)
    }
}

fn id<T: FromStr>(header: HeaderName, value: &HeaderValue) -> Result<T, ClientQueryError> {
    let id = value.to_str().ok().and_then(|text| text.parse().ok());
    id.ok_or_else(|| ClientQueryError::InvalidScope { header, value: value.clone() })
}

fn address(headers: &HeaderMap) -> Result<IpAddr, ClientQueryError> {
    let value = headers.get_all(X_FORWARDED_FOR).iter().next_back().ok_or(ClientQueryError::NoAddress)?;
    let last = value.to_str().ok().and_then(|text| text.rsplit(',').next());
    let address = last.and_then(|last| last.trim().parse::<IpAddr>().ok());
    let address = address.ok_or_else(|| ClientQueryError::InvalidAddress { value: value.clone() })?;
    // A haproxy that listens on `::` sees IPv4 addresses so.
    Ok(address.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NETWORK: &str = "11111111-1111-4111-8111-111111111111";
    const OTHER: &str = "22222222-2222-4222-8222-222222222222";

    fn read(headers: &[(&str, &str)]) -> Result<ClientQuery, ClientQueryError> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            let value = HeaderValue::from_bytes(value.as_bytes()).unwrap();
            map.append(name.parse::<HeaderName>().unwrap(), value);
        }
        ClientQuery::read(&map)
    }

    fn address_of(values: &[&str]) -> Option<String> {
        let forwarded = values.iter().map(|value| ("X-Forwarded-For", *value));
        let headers: Vec<_> = forwarded.chain([("X-Neutron-Network-ID", NETWORK)]).collect();
        read(&headers).ok().map(|caller| caller.address.to_string())
    }

    #[test]
    fn the_last_address_is_the_one_that_haproxy_added() {
        for (values, want) in [
            (&["10.0.0.5"][..], Some("10.0.0.5")),
            (&["10.0.0.66", "10.0.0.5"], Some("10.0.0.5")),
            (&["10.0.0.66, 10.0.0.67 , 10.0.0.5"], Some("10.0.0.5")),
            (&["::ffff:10.0.0.5"], Some("10.0.0.5")),
            (&["rubbish", "fe80::f816:3eff:fe00:1"], Some("fe80::f816:3eff:fe00:1")),
            (&["10.0.0.5", "rubbish"], None),
            (&["10.0.0.5,"], None),
            (&["10.0.0.5:80"], None),
            (&["\u{fc}"], None),
            (&[], None),
        ] {
            assert_eq!(address_of(values).as_deref(), want, "{values:?}");
        }
    }

    #[test]
    fn exactly_one_header_names_a_place() {
        let of = |headers: &[(&'static str, &'static str)]| {
            read(&[headers, &[("x-forwarded-for", "10.0.0.5")]].concat()).map(|caller| caller.scope)
        };
        let network = NetworkOrRouter::Network(NETWORK.parse().unwrap());
        assert_eq!(of(&[("x-neutron-network-id", NETWORK)]), Ok(network));
        assert_eq!(of(&[("x-ovn-network-id", NETWORK)]), Ok(network));
        let router = NetworkOrRouter::Router(NETWORK.parse().unwrap());
        assert_eq!(of(&[("x-neutron-router-id", NETWORK)]), Ok(router));

        assert_eq!(of(&[]), Err(ClientQueryError::NoScope));
        for (one, other) in [
            ("x-neutron-network-id", "x-neutron-router-id"),
            ("x-neutron-network-id", "x-ovn-network-id"),
            ("x-ovn-network-id", "x-neutron-router-id"),
            ("x-ovn-network-id", "x-ovn-network-id"),
            ("x-neutron-network-id", "x-neutron-network-id"),
        ] {
            assert_eq!(
                of(&[(one, NETWORK), (other, OTHER)]),
                Err(ClientQueryError::AmbiguousScope),
                "{one} {other}"
            );
        }
        for bad in ["", "x", "\u{fc}", "11111111-1111-4111-8111-111111111111,"] {
            let got = of(&[("x-neutron-network-id", bad)]);
            assert!(matches!(got, Err(ClientQueryError::InvalidScope { .. })), "{bad:?}");
        }
    }

    #[test]
    fn a_mac_address_is_read_from_a_link_local_address_that_was_made_of_it() {
        let mac = |address: &str| {
            let scope = NetworkOrRouter::Network(NETWORK.parse().unwrap());
            let caller = ClientQuery { scope, address: address.parse().unwrap(), mac: None };
            caller.mac_in_address().map(|mac| mac.to_string())
        };
        assert_eq!(mac("fe80::f816:3eff:fe0a:b0c").as_deref(), Some("fa:16:3e:0a:0b:0c"));
        for other in ["fe80::1", "fe80:0:0:1:f816:3eff:fe0a:b0c", "fd00::f816:3eff:fe0a:b0c", "10.0.0.5"] {
            assert_eq!(mac(other), None, "{other}");
        }
    }

    #[test]
    fn a_link_local_address_is_its_senders_only_if_it_was_made_of_the_mac_address_that_it_sends_from() {
        let scope = NetworkOrRouter::Network(NETWORK.parse().unwrap());
        let mac = |text: &str| -> MacAddress { text.parse().unwrap() };
        let own = mac("fa:16:3e:0a:0b:0c");
        let another = mac("fa:16:3e:0a:0b:0d");
        let mark = |address: &str, mac| ClientQuery { scope, address: address.parse().unwrap(), mac }.mark();
        for seen in [None, Some(own)] {
            assert_eq!(mark("fe80::f816:3eff:fe0a:b0c", seen), Some(PortMatch::Mac(own)));
        }
        assert_eq!(mark("fe80::f816:3eff:fe0a:b0c", Some(another)), None);
        assert_eq!(mark("fe80::1", Some(own)), None);
        for seen in [None, Some(own), Some(another)] {
            let address: IpAddr = "10.0.0.5".parse().unwrap();
            assert_eq!(mark("10.0.0.5", seen), Some(PortMatch::Address(address)));
        }
    }

    /// Says the same to everybody.
    struct Oracle(LookupOutcome);

    impl ClientLookup for Oracle {
        fn find(&self, _: &ClientQuery) -> impl Future<Output = LookupOutcome> + Send {
            std::future::ready(self.0.clone())
        }
    }

    #[tokio::test]
    async fn the_second_is_asked_only_where_the_first_does_not_know() {
        let scope = NetworkOrRouter::Network(NETWORK.parse().unwrap());
        let caller = ClientQuery { scope, address: "10.0.0.5".parse().unwrap(), mac: None };
        for (first, asks) in [
            (LookupOutcome::NotFound, true),
            (LookupOutcome::Unavailable, true),
            (LookupOutcome::Ambiguous, false),
            (LookupOutcome::NotAnInstance, false),
        ] {
            let second = Oracle(LookupOutcome::Identified(Arc::new(ClientIdentity::on_network(
                NETWORK.parse().unwrap(),
                Vec::new(),
                NetworkHeader::Neutron,
            ))));
            let found = (Oracle(first.clone()), second).find(&caller).await;
            assert_eq!(matches!(found, LookupOutcome::Identified(_)), asks, "{first:?}");
        }
    }
}
