//! `metadata-agent detach`: removes everything that an agent left on this host, and nothing else.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};

use super::cli::DetachArgs;
use super::{block_on, with_config};
use crate::admin::client;
use crate::config::Config;
use crate::process::capabilities;
use crate::teardown;

/// Time for a running agent to respond.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(2);

pub(super) fn run(args: &DetachArgs) -> ExitCode {
    with_config(&args.config, |config| block_on(detach(config)).map(|()| ExitCode::SUCCESS))
}

/// Refuses while an agent runs, because that agent would attach everything again.
async fn detach(config: &Config) -> Result<()> {
    capabilities::require(&capabilities::TO_DETACH)?;
    let socket = &config.admin_socket;
    if client::get(socket, "/live", RESPONSE_TIMEOUT).await.is_ok() {
        bail!("an agent answers on {}; stop it first, it detaches by itself", socket.display());
    }
    teardown::remove_all(&config.bpffs_dir, &config.portal_namespace).await
}
