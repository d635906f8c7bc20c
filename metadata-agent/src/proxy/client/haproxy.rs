//! Identifies the client on whose behalf a Neutron haproxy forwards a request.
//!
//! A guest can send any header, and haproxy passes most of them on. Two are haproxy's own:
//!
//! - `X-Forwarded-For`: haproxy appends it after the guest's, so only the last one counts.
//! - `X-Neutron-Network-ID` or `X-Neutron-Router-ID`: haproxy sets one and deletes the other. OVN's
//!   driver sets `X-OVN-Network-ID` and deletes nothing.
//!
//! The request does not show which driver configured the haproxy. So a request with more than one
//! of the three headers is refused. This harms only the guest that sent the extra header.

use std::net::IpAddr;
use std::str::FromStr;

use hyper::header::{HeaderMap, HeaderName, HeaderValue};

use super::{ClientQuery, NetworkHeader};
use crate::ids::NetworkOrRouter;
use crate::proxy::request::X_FORWARDED_FOR;

const X_NEUTRON_ROUTER_ID: HeaderName = HeaderName::from_static("x-neutron-router-id");

/// Headers that do not identify a client.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HaproxyHeaderError {
    #[error("the request names neither a network nor a router")]
    NoScope,
    #[error("the request names more than one network or router")]
    AmbiguousScope,
    #[error("{header}: {value:?} is not a UUID")]
    InvalidScope { header: HeaderName, value: HeaderValue },
    #[error("the request has no X-Forwarded-For header")]
    NoAddress,
    #[error("X-Forwarded-For: {value:?} does not end in an address")]
    InvalidAddress { value: HeaderValue },
}

/// Reads the headers of a request that came from a haproxy.
pub(super) fn client_query(headers: &HeaderMap) -> Result<ClientQuery, HaproxyHeaderError> {
    Ok(ClientQuery { scope: scope(headers)?, address: address(headers)?, mac: None })
}

fn scope(headers: &HeaderMap) -> Result<NetworkOrRouter, HaproxyHeaderError> {
    let mut found = None;
    for name in [NetworkHeader::Neutron.name(), NetworkHeader::Ovn.name(), X_NEUTRON_ROUTER_ID] {
        for value in headers.get_all(&name) {
            if found.replace((name.clone(), value)).is_some() {
                return Err(HaproxyHeaderError::AmbiguousScope);
            }
        }
    }
    let (header, value) = found.ok_or(HaproxyHeaderError::NoScope)?;
    if header == X_NEUTRON_ROUTER_ID {
        id(header, value).map(NetworkOrRouter::Router)
    } else {
        id(header, value).map(NetworkOrRouter::Network)
    }
}

fn id<T: FromStr>(header: HeaderName, value: &HeaderValue) -> Result<T, HaproxyHeaderError> {
    let id = value.to_str().ok().and_then(|text| text.parse().ok());
    id.ok_or_else(|| HaproxyHeaderError::InvalidScope { header, value: value.clone() })
}

fn address(headers: &HeaderMap) -> Result<IpAddr, HaproxyHeaderError> {
    let value = headers.get_all(X_FORWARDED_FOR).iter().next_back().ok_or(HaproxyHeaderError::NoAddress)?;
    let last = value.to_str().ok().and_then(|text| text.rsplit(',').next());
    let address = last.and_then(|last| last.trim().parse::<IpAddr>().ok());
    let address = address.ok_or_else(|| HaproxyHeaderError::InvalidAddress { value: value.clone() })?;
    // A haproxy that listens on `::` sees IPv4 clients as IPv4-mapped addresses.
    Ok(address.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NETWORK: &str = "11111111-1111-4111-8111-111111111111";
    const OTHER: &str = "22222222-2222-4222-8222-222222222222";

    fn read(headers: &[(&str, &str)]) -> Result<ClientQuery, HaproxyHeaderError> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            let value = HeaderValue::from_bytes(value.as_bytes()).unwrap();
            map.append(name.parse::<HeaderName>().unwrap(), value);
        }
        client_query(&map)
    }

    fn address_of(values: &[&str]) -> Option<String> {
        let forwarded = values.iter().map(|value| ("X-Forwarded-For", *value));
        let headers: Vec<_> = forwarded.chain([("X-Neutron-Network-ID", NETWORK)]).collect();
        read(&headers).ok().map(|query| query.address.to_string())
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
    fn exactly_one_header_names_a_network_or_router() {
        let of = |headers: &[(&'static str, &'static str)]| {
            read(&[headers, &[("x-forwarded-for", "10.0.0.5")]].concat()).map(|query| query.scope)
        };
        let network = NetworkOrRouter::Network(NETWORK.parse().unwrap());
        assert_eq!(of(&[("x-neutron-network-id", NETWORK)]), Ok(network));
        assert_eq!(of(&[("x-ovn-network-id", NETWORK)]), Ok(network));
        let router = NetworkOrRouter::Router(NETWORK.parse().unwrap());
        assert_eq!(of(&[("x-neutron-router-id", NETWORK)]), Ok(router));

        assert_eq!(of(&[]), Err(HaproxyHeaderError::NoScope));
        for (one, other) in [
            ("x-neutron-network-id", "x-neutron-router-id"),
            ("x-neutron-network-id", "x-ovn-network-id"),
            ("x-ovn-network-id", "x-neutron-router-id"),
            ("x-ovn-network-id", "x-ovn-network-id"),
            ("x-neutron-network-id", "x-neutron-network-id"),
        ] {
            assert_eq!(
                of(&[(one, NETWORK), (other, OTHER)]),
                Err(HaproxyHeaderError::AmbiguousScope),
                "{one} {other}"
            );
        }
        for bad in ["", "x", "\u{fc}", "11111111-1111-4111-8111-111111111111,"] {
            let got = of(&[("x-neutron-network-id", bad)]);
            assert!(matches!(got, Err(HaproxyHeaderError::InvalidScope { .. })), "{bad:?}");
        }
    }
}
