//! Finds Neutron's endpoint in Keystone's service catalog.

use std::collections::BTreeSet;

use serde::Deserialize;

use super::access::{HttpUrl, NeutronInterface};

/// Service type of Neutron.
const NETWORK: &str = "network";

/// Service in the body of a token.
#[derive(Debug, Deserialize)]
pub(super) struct CatalogService {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    endpoints: Vec<CatalogEndpoint>,
}

#[derive(Debug, Deserialize)]
struct CatalogEndpoint {
    #[serde(default)]
    interface: String,
    region_id: Option<String>,
    /// Older name of `region_id`. Keystone sends both.
    region: Option<String>,
    url: String,
}

impl CatalogEndpoint {
    fn region(&self) -> Option<&str> {
        self.region_id.as_deref().or(self.region.as_deref())
    }
}

/// The catalog has no suitable endpoint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CatalogError {
    #[error(
        "has no {interface} endpoint of a service of type network in {}; it has {there} \
         (neutron_interface, neutron_region_name, or set neutron_endpoint_override)",
        region.as_deref().map_or_else(|| "any region".to_owned(), |name| format!("the region {name}"))
    )]
    NoEndpoint {
        interface: NeutronInterface,
        region: Option<String>,
        /// Existing endpoints of this type.
        there: String,
    },
    #[error("has several {interface} endpoints of type network: {there}; set neutron_region_name")]
    Several {
        interface: NeutronInterface,
        /// Matching endpoints.
        there: String,
    },
    #[error("has the endpoint {url:?}, which is not an http or https URL (or set neutron_endpoint_override)")]
    InvalidUrl { url: String },
}

/// Finds Neutron's endpoint for an interface and a region.
pub(super) fn network_endpoint(
    services: &[CatalogService],
    interface: NeutronInterface,
    region: Option<&str>,
) -> Result<HttpUrl, CatalogError> {
    let endpoints = || services.iter().filter(|one| one.kind == NETWORK).flat_map(|one| &one.endpoints);
    let matches = |one: &&CatalogEndpoint| {
        one.interface == interface.to_string() && region.is_none_or(|name| one.region() == Some(name))
    };
    let urls: BTreeSet<&str> = endpoints().filter(matches).map(|one| one.url.trim_end_matches('/')).collect();
    let mut urls = urls.into_iter();
    match (urls.next(), urls.next()) {
        (Some(url), None) => {
            HttpUrl::parse(url).ok_or_else(|| CatalogError::InvalidUrl { url: url.to_owned() })
        }
        (Some(_), Some(_)) => {
            Err(CatalogError::Several { interface, there: listed(endpoints().filter(matches)) })
        }
        (None, _) => Err(CatalogError::NoEndpoint {
            interface,
            region: region.map(str::to_owned),
            there: listed(endpoints()),
        }),
    }
}

fn listed<'a>(endpoints: impl Iterator<Item = &'a CatalogEndpoint>) -> String {
    let listed: Vec<_> = endpoints
        .map(|one| format!("{} ({}, region {})", one.url, one.interface, one.region().unwrap_or("none")))
        .collect();
    if listed.is_empty() { "none".to_owned() } else { listed.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn services(endpoints: &[(&str, &str, &str)]) -> Vec<CatalogService> {
        let endpoints: Vec<_> = endpoints
            .iter()
            .map(|(interface, region, url)| {
                json!({ "interface": interface, "region": region, "region_id": region, "url": url, "id": "x" })
            })
            .collect();
        let nova = json!([{ "interface": "internal", "region_id": "one", "url": "http://nova" }]);
        serde_json::from_value(json!([
            { "type": "compute", "name": "nova", "endpoints": nova },
            { "type": "network", "name": "neutron", "endpoints": endpoints },
        ]))
        .unwrap()
    }

    #[test]
    fn interface_and_region_select_the_endpoint() {
        let there = services(&[
            ("internal", "one", "http://a:9696/"),
            ("public", "one", "https://b:9696"),
            ("internal", "two", "http://c/network"),
        ]);
        let internal = NeutronInterface::Internal;
        let url = |interface, region| network_endpoint(&there, interface, region).map(|url| url.to_string());
        assert_eq!(url(internal, Some("one")).unwrap(), "http://a:9696");
        assert_eq!(url(internal, Some("two")).unwrap(), "http://c/network");
        assert_eq!(url(NeutronInterface::Public, None).unwrap(), "https://b:9696");
        let error = url(internal, None).unwrap_err().to_string();
        assert!(error.contains("http://a:9696/ (internal, region one), http://c/network"), "{error}");
        let error = url(NeutronInterface::Admin, Some("one")).unwrap_err().to_string();
        assert!(error.contains("no admin endpoint") && error.contains("the region one"), "{error}");
        assert!(error.contains("https://b:9696 (public, region one)"), "{error}");
    }

    #[test]
    fn equal_endpoints_count_once_and_other_services_never() {
        let twice = services(&[("internal", "one", "http://a:9696/"), ("internal", "two", "http://a:9696")]);
        let internal = NeutronInterface::Internal;
        assert_eq!(network_endpoint(&twice, internal, None).unwrap().as_str(), "http://a:9696");
        let none = network_endpoint(&services(&[]), internal, None).unwrap_err().to_string();
        assert!(none.contains("it has none"), "{none}");
        let odd = network_endpoint(&services(&[("internal", "one", "a:9696")]), internal, None);
        assert_eq!(odd, Err(CatalogError::InvalidUrl { url: "a:9696".to_owned() }));
    }
}
