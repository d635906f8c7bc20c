//! Requests to Neutron for one look-up.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::query::{InstancePort, LookupQuery, LookupResult, PortSelector};
use crate::ids::{NetworkId, NetworkOrRouter, RouterId};
use crate::inventory::{PortAddressing, PortRecord};
use crate::sources::neutron::api::{Api, ApiError, Filter, SINGLE_PORTS_LIMIT};
use crate::sources::neutron::ports::ParsedPort;

/// Maximum number of networks per request: their ids must fit into a URL of 8 KiB.
const NETWORKS: usize = 100;
/// Device owners of a router's ports (neutron_lib/constants.py, `ROUTER_INTERFACE_OWNERS`).
const ROUTER_INTERFACES: [&str; 3] = [
    "network:router_interface",
    "network:ha_router_replicated_interface",
    "network:router_interface_distributed",
];

/// Result of a look-up, and the networks of the router if they were requested.
pub(super) struct SearchResult {
    pub(super) answer: Result<LookupResult, Arc<ApiError>>,
    pub(super) networks: Option<Arc<[NetworkId]>>,
}

/// Searches in Neutron. Cached networks of a router are sufficient only for a confirmed result: the
/// router may be connected to another network with the same addresses by now.
pub(super) async fn search(api: &Api, query: LookupQuery, known: Option<Arc<[NetworkId]>>) -> SearchResult {
    let LookupQuery { scope, target } = query;
    let router = match scope {
        NetworkOrRouter::Network(network) => {
            return SearchResult { answer: at(api, &[network], target).await, networks: None };
        }
        NetworkOrRouter::Router(router) => router,
    };
    if let Some(networks) = known
        && target.mac().is_some()
    {
        let answer = at(api, &networks, target).await;
        if answer.as_ref().map_or(true, |answer| answer.is_confirmed_by(target)) {
            return SearchResult { answer, networks: None };
        }
    }
    match networks_of(api, router).await {
        Ok(networks) => SearchResult { answer: at(api, &networks, target).await, networks: Some(networks) },
        Err(error) => SearchResult { answer: Err(error), networks: None },
    }
}

async fn networks_of(api: &Api, router: RouterId) -> Result<Arc<[NetworkId]>, Arc<ApiError>> {
    let owners = ROUTER_INTERFACES.map(|owner| ("device_owner", owner.to_owned()));
    let filters: Vec<Filter> = [("device_id", router.to_string())].into_iter().chain(owners).collect();
    let ports = api.ports(&filters, SINGLE_PORTS_LIMIT, |_| true).await?;
    let networks = ports.into_iter().filter_map(|(_, row)| row.ok()?.record.addressing.network);
    let networks: BTreeSet<_> = networks.collect();
    Ok(networks.into_iter().collect())
}

async fn at(api: &Api, networks: &[NetworkId], target: PortSelector) -> Result<LookupResult, Arc<ApiError>> {
    let mut ports = Vec::new();
    for some in networks.chunks(NETWORKS) {
        let networks = some.iter().map(|network| ("network_id", network.to_string()));
        let filters: Vec<Filter> = std::iter::once(filter(target)).chain(networks).collect();
        ports.extend(api.ports(&filters, SINGLE_PORTS_LIMIT, |_| true).await?);
    }
    Ok(select(ports, networks, target))
}

fn filter(target: PortSelector) -> Filter {
    match target {
        PortSelector::Ip(address, _) => ("fixed_ips", format!("ip_address={address}")),
        PortSelector::Mac(mac) => ("mac_address", mac.to_string()),
    }
}

/// Chooses the only port that matches. Filters again, in case the server ignores filters.
///
/// If the kernel saw the guest's MAC address, it must be the port's own. Otherwise a guest that may
/// send from any address could choose its neighbour's.
fn select(ports: Vec<ParsedPort>, networks: &[NetworkId], target: PortSelector) -> LookupResult {
    let is_target = |record: &PortRecord| match target {
        PortSelector::Ip(address, seen) => {
            let is_own_mac = seen.is_none() || seen == record.addressing.mac;
            is_own_mac && record.addressing.fixed_ips.contains(&address)
        }
        PortSelector::Mac(mac) => record.addressing.mac == Some(mac),
    };
    let matches = |record: &PortRecord| {
        record.addressing.network.is_some_and(|network| networks.contains(&network)) && is_target(record)
    };
    let valid = ports
        .into_iter()
        .map(|(id, row)| row.ok().map(|details| details.record).filter(matches).map(|record| (id, record)));
    let mut matching = valid.flatten();
    let Some((port, record)) = matching.next() else { return LookupResult::NotFound };
    if matching.next().is_some() {
        return LookupResult::Ambiguous;
    }
    let PortRecord {
        tenant: Some(tenant),
        port_project: Some(project),
        addressing: PortAddressing { network: Some(network), mac, fixed_ips, .. },
        ..
    } = record
    else {
        return LookupResult::NotAnInstance;
    };
    LookupResult::Instance(Arc::new(InstancePort {
        instance: tenant.instance,
        project,
        port,
        network,
        mac,
        fixed_ips,
    }))
}
