//! The part of the agent that guests talk to: listeners, proxy and the way to Nova.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::runtime::Runtime;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::warn;

use super::END;
use super::haproxies::HaproxySocket;
use crate::config::Config;
use crate::net::portal::Portal;
use crate::process::supervisor::CriticalTasks;
use crate::proxy::metrics::Metrics;
use crate::proxy::{self, ClientLookup, Proxy, Upstream};

/// The listeners and what is behind them.
pub(super) struct DataPlane {
    stop: CancellationToken,
    guests: TaskTracker,
    upstream: Arc<Upstream>,
    upstream_connections: TaskTracker,
    /// Its file stays until the last request is answered.
    haproxies: Option<HaproxySocket>,
}

impl DataPlane {
    pub(super) fn start(
        data: &Runtime,
        config: &Config,
        portal: &Portal,
        directory: impl proxy::Directory,
        metrics: &Arc<Metrics>,
        vital: &CriticalTasks,
    ) -> Result<Self> {
        let _on_data_runtime = data.enter();
        let (stop, guests, upstream_connections) =
            (CancellationToken::new(), TaskTracker::new(), TaskTracker::new());
        let upstream =
            Upstream::new(config.upstream_config()?, Arc::clone(metrics), upstream_connections.clone())?;
        let upstream = Arc::new(upstream);
        let proxy = Proxy::new(directory, Arc::clone(&upstream), config.proxy(), Arc::clone(metrics));
        let listener = portal.listen(config.metadata_backlog)?;
        let listener = tokio::net::TcpListener::from_std(listener).context("watch the listener")?;
        guests.spawn(vital.task("the listener", proxy::serve(listener, proxy, stop.clone(), guests.clone())));
        Ok(Self { stop, guests, upstream, upstream_connections, haproxies: None })
    }

    /// Answers requests of haproxies as well.
    pub(super) fn answer_haproxies(
        &mut self,
        data: &Runtime,
        config: &Config,
        mut socket: HaproxySocket,
        callers: impl ClientLookup,
        metrics: Arc<Metrics>,
        vital: &CriticalTasks,
    ) -> Result<()> {
        let _on_data_runtime = data.enter();
        let proxy = Proxy::new(callers, Arc::clone(&self.upstream), config.proxy(), metrics);
        let serving =
            proxy::serve_haproxies(socket.listener()?, proxy, self.stop.clone(), self.guests.clone());
        self.guests.spawn(vital.task("the listener for haproxies", serving));
        self.haproxies = Some(socket);
        Ok(())
    }

    /// Closes the listener, so that new connections go aside at once, and waits for requests in flight. Only when the last
    /// of them is answered is every connection to Nova idle.
    pub(super) async fn drain(self, patience: Duration) {
        self.stop.cancel();
        self.guests.close();
        if timeout(patience + END, self.guests.wait()).await.is_err() {
            warn!("requests in flight were cut off");
        }
        self.upstream.close_idle();
        self.upstream_connections.close();
        if timeout(END, self.upstream_connections.wait()).await.is_err() {
            warn!("connections to Nova were cut off");
        }
        drop(self.haproxies);
    }
}
