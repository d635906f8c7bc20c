//! `metadata-agent detach`: everything that the agent made, removed; nothing else touched.

use anyhow::{Context as _, Result, bail};
use std::time::Duration;

use crate::admin::client;
use crate::config::Config;
use crate::datapath;
use crate::netlink::Netlink;
use crate::portal::Portal;

/// How long a running agent may take to answer before it counts as dead.
const ANSWER: Duration = Duration::from_secs(2);

/// Removes all, unless an agent runs, which would only make it anew.
///
/// # Errors
/// An agent runs, or something cannot be removed.
pub async fn run(config: &Config) -> Result<()> {
    if client::get(&config.admin_socket, "/live", ANSWER).await.is_ok() {
        bail!("an agent answers on {}; stop it first, it detaches by itself", config.admin_socket.display());
    }
    remove(config).await
}

/// Programs first: from then on guests' packets go where they would go without us.
pub(crate) async fn remove(config: &Config) -> Result<()> {
    let leftovers = datapath::remove_all(&config.bpffs_dir).context("take the programs off")?;
    let netlink = Netlink::connect()?;
    for leftover in leftovers.into_iter().filter(|leftover| leftover.owns_clsact) {
        let exists = netlink.links().await?.iter().any(|link| link.index == leftover.index);
        if exists && !netlink.has_filters(leftover.index).await? {
            netlink.delete_clsact(leftover.index).await?;
        }
    }
    Portal::remove(&config.portal_namespace).await.context("remove the portal")
}
