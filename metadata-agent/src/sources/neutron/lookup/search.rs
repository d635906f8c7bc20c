//! Requests to Neutron for look-ups in one scope.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::query::{InstancePort, LookupBatch, LookupResult, PortSelector};
use crate::ids::{NetworkId, NetworkOrRouter, RouterId};
use crate::inventory::{PortAddressing, PortRecord};
use crate::sources::neutron::api::{Api, ApiError, Filter, SINGLE_PORTS_LIMIT};
use crate::sources::neutron::ports::{IDENTITY_FIELDS, ParsedPort};

/// Maximum number of networks per request: their ids must fit into a URL of 8 KiB.
const NETWORKS: usize = 100;
/// Device owners of a router's ports (neutron_lib/constants.py, `ROUTER_INTERFACE_OWNERS`).
const ROUTER_INTERFACES: [&str; 3] = [
    "network:router_interface",
    "network:ha_router_replicated_interface",
    "network:router_interface_distributed",
];

/// Result of each look-up.
type Answers = BTreeMap<PortSelector, Result<LookupResult, Arc<ApiError>>>;

/// Results of a batch, and the networks of the router if they were requested.
pub(super) struct SearchResult {
    pub(super) answers: Answers,
    pub(super) networks: Option<Arc<[NetworkId]>>,
}

/// Searches in Neutron. Cached networks of a router are sufficient only for a confirmed result: the
/// router may be connected to another network with the same addresses by now.
pub(super) async fn search(
    api: &Api,
    LookupBatch { scope, targets }: &LookupBatch,
    known: Option<Arc<[NetworkId]>>,
) -> SearchResult {
    let router = match scope {
        NetworkOrRouter::Network(network) => {
            return SearchResult { answers: at(api, &[*network], targets).await, networks: None };
        }
        NetworkOrRouter::Router(router) => *router,
    };
    let mut answers = Answers::new();
    if let Some(networks) = known {
        let confirmable = targets.iter().copied().filter(|target| target.mac().is_some());
        answers = at(api, &networks, &confirmable.collect::<Vec<_>>()).await;
        answers
            .retain(|target, answer| answer.as_ref().map_or(true, |answer| answer.is_confirmed_by(*target)));
    }
    let others = targets.iter().copied().filter(|target| !answers.contains_key(target));
    let others: Vec<PortSelector> = others.collect();
    if others.is_empty() {
        return SearchResult { answers, networks: None };
    }
    match networks_of(api, router).await {
        Ok(networks) => {
            answers.extend(at(api, &networks, &others).await);
            SearchResult { answers, networks: Some(networks) }
        }
        Err(error) => {
            answers.extend(failed(&others, &error));
            SearchResult { answers, networks: None }
        }
    }
}

async fn networks_of(api: &Api, router: RouterId) -> Result<Arc<[NetworkId]>, Arc<ApiError>> {
    let owners = ROUTER_INTERFACES.map(|owner| ("device_owner", owner.to_owned()));
    let filters: Vec<Filter> = [("device_id", router.to_string())].into_iter().chain(owners).collect();
    let ports = api.ports(IDENTITY_FIELDS, &filters, SINGLE_PORTS_LIMIT, |_| true).await?;
    let networks = ports.into_iter().filter_map(|(_, row)| row.ok()?.record.addressing.network);
    let networks: BTreeSet<_> = networks.collect();
    Ok(networks.into_iter().collect())
}

/// Looks up ports on these networks. Each is selected by its own address.
async fn at(api: &Api, networks: &[NetworkId], targets: &[PortSelector]) -> Answers {
    if targets.is_empty() {
        return Answers::new();
    }
    let mut ports = Vec::new();
    for some in networks.chunks(NETWORKS) {
        let networks = some.iter().map(|network| ("network_id", network.to_string()));
        let filters: Vec<Filter> = targets.iter().map(|target| filter(*target)).chain(networks).collect();
        match api.ports(IDENTITY_FIELDS, &filters, SINGLE_PORTS_LIMIT, |_| true).await {
            Ok(found) => ports.extend(found),
            Err(error) => return failed(targets, &error).collect(),
        }
    }
    targets.iter().map(|target| (*target, Ok(select(&ports, networks, *target)))).collect()
}

fn failed(
    targets: &[PortSelector],
    error: &Arc<ApiError>,
) -> impl Iterator<Item = (PortSelector, Result<LookupResult, Arc<ApiError>>)> {
    targets.iter().map(|target| (*target, Err(Arc::clone(error))))
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
fn select(ports: &[ParsedPort], networks: &[NetworkId], target: PortSelector) -> LookupResult {
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
    let valid = ports.iter().filter_map(|(id, row)| Some((*id, &row.as_ref().ok()?.record)));
    let mut matching = valid.filter(|&(_, record)| matches(record));
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
        project: project.clone(),
        port,
        network: *network,
        mac: *mac,
        fixed_ips: fixed_ips.clone(),
    }))
}
