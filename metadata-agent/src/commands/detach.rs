//! `metadata-agent detach`: everything that the agent made, removed; nothing else touched.

use anyhow::{Context as _, Result, bail};
use std::time::Duration;

use crate::admin::client;
use crate::attach::qdisc;
use crate::config::Config;
use crate::datapath::{DatapathError, StaleState};
use crate::net::netlink::Netlink;
use crate::net::netns::Netns;
use crate::net::portal::Portal;
use crate::process::capabilities;

/// How long a running agent may take to answer before it counts as dead.
const ANSWER: Duration = Duration::from_secs(2);

/// Removes all, unless an agent runs, which would only make it anew.
///
/// # Errors
/// An agent runs, or something cannot be removed.
pub async fn run(config: &Config) -> Result<()> {
    capabilities::require(&capabilities::TO_DETACH)?;
    if client::get(&config.admin_socket, "/live", ANSWER).await.is_ok() {
        bail!("an agent answers on {}; stop it first, it detaches by itself", config.admin_socket.display());
    }
    remove(config).await
}

/// Programs first: from then on guests' packets go where they would go without us. One thing that stays does not keep the
/// others.
pub(crate) async fn remove(config: &Config) -> Result<()> {
    let programs = remove_programs(config).await;
    if programs.as_ref().is_err_and(is_in_use) {
        return programs;
    }
    let portal = Portal::remove(&config.portal_namespace).await.context("remove the portal");
    programs.and(portal)
}

async fn remove_programs(config: &Config) -> Result<()> {
    let Some(remains) = StaleState::find(&config.bpffs_dir).context("look for programs")? else {
        return Ok(());
    };
    let netlink = Netlink::connect()?;
    let links = netlink.links().await?;
    let mut outcome = Ok(());
    for mark in remains.filters()? {
        let taken = qdisc::take_off(&netlink, &links, mark).await.context("take a filter off");
        let forgotten = taken.and_then(|()| Ok(remains.forget_filter(mark.index)?));
        outcome = outcome.and(forgotten);
    }
    for (inode, branch) in remains.in_namespaces()? {
        outcome = outcome.and(remove_filters_in(inode, &branch).await);
    }
    outcome.and(remains.remove().context("take the programs off"))
}

/// Filters in a namespace that is gone went with it.
async fn remove_filters_in(inode: u32, branch: &StaleState) -> Result<()> {
    let marks = branch.filters()?;
    if marks.is_empty() {
        return Ok(());
    }
    let Some(netns) = Netns::by_inode(inode)? else {
        return marks.iter().try_for_each(|mark| Ok(branch.forget_filter(mark.index)?));
    };
    let netlink = Netlink::connect_in(&netns)?;
    let links = netlink.links().await?;
    let mut outcome = Ok(());
    for mark in marks {
        let taken = qdisc::take_off_in(&netns, &netlink, &links, mark).await;
        let taken = taken.with_context(|| format!("take a filter off in {}", netns.name()));
        outcome = outcome.and(taken.and_then(|()| Ok(branch.forget_filter(mark.index)?)));
    }
    outcome
}

/// Then all that is there is somebody else's.
fn is_in_use(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(DatapathError::InUse { .. }))
}
