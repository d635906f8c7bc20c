//! The questions to Neutron that one look-up comes to.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::query::{Answer, Found, Query, Whom};
use crate::ids::{NetworkId, NetworkOrRouter, RouterId};
use crate::inventory::PortRecord;
use crate::sources::neutron::api::{Api, ApiError, Filter, SOME};
use crate::sources::neutron::ports::Told;

/// Networks of one router in one question: their ids must fit into a URL of 8 KiB.
const NETWORKS: usize = 100;
/// What ports of a router's are for (neutron_lib/constants.py, `ROUTER_INTERFACE_OWNERS`).
const ROUTER_INTERFACES: [&str; 3] = [
    "network:router_interface",
    "network:ha_router_replicated_interface",
    "network:router_interface_distributed",
];

/// What Neutron says, and the networks of the router if it was asked for them.
pub(super) struct Finding {
    pub(super) answer: Result<Answer, Arc<ApiError>>,
    pub(super) networks: Option<Arc<[NetworkId]>>,
}

/// Asks Neutron. Networks that a router had a while ago are good enough for an answer that is proven, and for no other: the
/// router may have another network with the same addresses by now.
pub(super) async fn find(api: &Api, query: Query, known: Option<Arc<[NetworkId]>>) -> Finding {
    let Query { scope, whom } = query;
    let router = match scope {
        NetworkOrRouter::Network(network) => {
            return Finding { answer: at(api, &[network], whom).await, networks: None };
        }
        NetworkOrRouter::Router(router) => router,
    };
    if let Some(networks) = known
        && whom.mac().is_some()
    {
        let answer = at(api, &networks, whom).await;
        if answer.as_ref().map_or(true, |answer| answer.is_proven_of(whom)) {
            return Finding { answer, networks: None };
        }
    }
    match networks_of(api, router).await {
        Ok(networks) => Finding { answer: at(api, &networks, whom).await, networks: Some(networks) },
        Err(error) => Finding { answer: Err(error), networks: None },
    }
}

async fn networks_of(api: &Api, router: RouterId) -> Result<Arc<[NetworkId]>, Arc<ApiError>> {
    let owners = ROUTER_INTERFACES.map(|owner| ("device_owner", owner.to_owned()));
    let filters: Vec<Filter> = [("device_id", router.to_string())].into_iter().chain(owners).collect();
    let told = api.ports(&filters, SOME, |_| true).await?;
    let networks = told.into_iter().filter_map(|(_, row)| row.ok()?.facts.network);
    let networks: BTreeSet<_> = networks.collect();
    Ok(networks.into_iter().collect())
}

async fn at(api: &Api, networks: &[NetworkId], whom: Whom) -> Result<Answer, Arc<ApiError>> {
    let mut there = Vec::new();
    for some in networks.chunks(NETWORKS) {
        let networks = some.iter().map(|network| ("network_id", network.to_string()));
        let filters: Vec<Filter> = std::iter::once(filter(whom)).chain(networks).collect();
        there.extend(api.ports(&filters, SOME, |_| true).await?);
    }
    Ok(judge(there, networks, whom))
}

fn filter(whom: Whom) -> Filter {
    match whom {
        Whom::Address(address, _) => ("fixed_ips", format!("ip_address={address}")),
        Whom::Mac(mac) => ("mac_address", mac.to_string()),
    }
}

/// What does not fit the question is left out, whatever the server makes of filters.
fn judge(there: Vec<Told>, networks: &[NetworkId], whom: Whom) -> Answer {
    let is_whom = |facts: &PortRecord| match whom {
        Whom::Address(address, _) => facts.fixed_ips.contains(&address),
        Whom::Mac(mac) => facts.mac == Some(mac),
    };
    let fits = |facts: &PortRecord| {
        facts.network.is_some_and(|network| networks.contains(&network)) && is_whom(facts)
    };
    let understood = there
        .into_iter()
        .map(|(id, row)| row.ok().map(|said| said.facts).filter(fits).map(|facts| (id, facts)));
    let mut fitting = understood.flatten();
    let Some((port, facts)) = fitting.next() else { return Answer::NotFound };
    if fitting.next().is_some() {
        return Answer::Ambiguous;
    }
    let PortRecord {
        tenant: Some(tenant),
        port_project: Some(project),
        network: Some(network),
        mac,
        fixed_ips,
        ..
    } = facts
    else {
        return Answer::NotAnInstance;
    };
    Answer::Instance(Arc::new(Found { instance: tenant.instance, project, port, network, mac, fixed_ips }))
}
