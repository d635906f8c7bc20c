//! Removes everything that the agent makes on a host: programs, pins and portal. `run` does it at
//! its end, `detach` after a crash.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::time::sleep;
use tracing::{debug, warn};

use crate::attach::qdisc;
use crate::datapath::{DatapathError, StaleState};
use crate::net::address_query;
use crate::net::netlink::Netlink;
use crate::net::netns::Netns;
use crate::net::portal::Portal;
use crate::net::probe_pair::ProbePair;

/// Longer than the second for which Linux ignores another reply after one (`LOCKTIME` of
/// net/ipv4/arp.c). The agent may have answered a guest just before it stopped.
const REPLY_LOCK: Duration = Duration::from_millis(1100);

/// Removes programs first: from then on, packets of guests bypass the agent. Goes on after an
/// error, and returns the first one.
///
/// # Errors
/// Something cannot be removed, or a running agent uses it.
pub(crate) async fn remove_all(bpffs_dir: &Path, portal_namespace: &str) -> Result<()> {
    let programs = remove_programs(bpffs_dir, portal_namespace).await;
    // Then everything that is there belongs to another agent.
    if programs.as_ref().is_err_and(is_in_use) {
        return programs;
    }
    let portal = Portal::remove(portal_namespace).await.context("remove the portal");
    let probe = remove_probe_pair().await.context("remove the probe's interfaces");
    programs.and(portal).and(probe)
}

async fn remove_probe_pair() -> Result<()> {
    Ok(ProbePair::remove(&Netlink::connect()?).await?)
}

async fn remove_programs(bpffs_dir: &Path, portal_namespace: &str) -> Result<()> {
    let Some(stale) = StaleState::find(bpffs_dir).context("find programs")? else {
        return Ok(());
    };
    if let Err(error) = redirect_neighbours(&stale, portal_namespace).await {
        warn!(
            error = format!("{error:#}"),
            "cannot correct guests' neighbour tables; their entries must expire"
        );
    }
    let netlink = Netlink::connect()?;
    let links = netlink.links().await?;
    let mut outcome = Ok(());
    // Filters on interfaces of the host.
    for mark in stale.filters()? {
        let removed = qdisc::remove_filter(&netlink, None, &links, mark).await.context("remove a filter");
        outcome = outcome.and(removed.and_then(|()| Ok(stale.forget_filter(mark.index)?)));
    }
    // Filters in network namespaces.
    for (inode, in_namespace) in stale.in_namespaces()? {
        outcome = outcome.and(remove_filters_in(inode, &in_namespace).await);
    }
    // Links and maps go with their pins.
    outcome.and(stale.remove().context("remove the programs"))
}

/// Lets guests on the link learn the MAC address of the host's own path. The programs must be
/// attached, because they translate the queries.
async fn redirect_neighbours(stale: &StaleState, portal_namespace: &str) -> Result<()> {
    let clients = stale.abandon_clients()?;
    if clients.is_empty() {
        return Ok(());
    }
    // Most guests have had no reply for a while and learn the address at once.
    address_query::send(portal_namespace, &clients)?;
    sleep(REPLY_LOCK).await;
    let queries = address_query::send(portal_namespace, &clients)?;
    debug!(queries, "queried the host's own path for guests on the link");
    Ok(())
}

/// Removes filters in one namespace. If the namespace is gone, its filters are gone too.
async fn remove_filters_in(inode: u32, stale: &StaleState) -> Result<()> {
    let marks = stale.filters()?;
    if marks.is_empty() {
        return Ok(());
    }
    let Some(netns) = Netns::by_inode(inode)? else {
        return marks.iter().try_for_each(|mark| Ok(stale.forget_filter(mark.index)?));
    };
    let netlink = Netlink::connect_in(&netns)?;
    let links = netlink.links().await?;
    let mut outcome = Ok(());
    for mark in marks {
        let removed = qdisc::remove_filter(&netlink, Some(&netns), &links, mark).await;
        let removed = removed.with_context(|| format!("remove a filter in {}", netns.name()));
        outcome = outcome.and(removed.and_then(|()| Ok(stale.forget_filter(mark.index)?)));
    }
    outcome
}

fn is_in_use(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(DatapathError::InUse { .. }))
}
