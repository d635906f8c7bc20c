//! Listeners, proxy and upstream, on the data runtime.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::runtime::Runtime;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::warn;

use super::TASK_END;
use super::haproxy_socket::HaproxySocket;
use crate::config::Config;
use crate::net::portal::Portal;
use crate::process::supervisor::CriticalTasks;
use crate::proxy::metrics::Metrics;
use crate::proxy::{self, ClientDirectory, ClientLookup, Proxy, Upstream, UpstreamAccess, UpstreamConfig};

/// The running listeners and their upstream.
pub(super) struct DataPlane {
    stop: CancellationToken,
    guests: TaskTracker,
    proxy: Arc<Proxy>,
    upstream: Arc<Upstream>,
    upstream_connections: TaskTracker,
    /// Its file stays until the last request is answered.
    haproxy_socket: Option<HaproxySocket>,
}

/// How the proxy finds clients and reaches Nova.
pub(super) struct ProxyInputs {
    pub(super) directory: Arc<dyn ClientDirectory>,
    pub(super) lookup: Arc<dyn ClientLookup>,
    pub(super) upstream: UpstreamConfig,
    pub(super) access: UpstreamAccess,
}

impl DataPlane {
    /// Starts the listener for guests.
    pub(super) fn start(
        data: &Runtime,
        config: &Config,
        portal: &Portal,
        inputs: ProxyInputs,
        metrics: Arc<Metrics>,
        critical: &CriticalTasks,
    ) -> Result<Self> {
        let _on_data_runtime = data.enter();
        let (stop, guests, upstream_connections) =
            (CancellationToken::new(), TaskTracker::new(), TaskTracker::new());
        let ProxyInputs { directory, lookup, upstream, access } = inputs;
        let upstream = Upstream::new(upstream, access, Arc::clone(&metrics), upstream_connections.clone())?;
        let upstream = Arc::new(upstream);
        let proxy = Proxy::new(directory, lookup, Arc::clone(&upstream), config.proxy(), metrics);
        let listener = portal.listen(config.metadata_backlog)?;
        let listener = tokio::net::TcpListener::from_std(listener).context("watch the listener")?;
        let serving = proxy::serve_guests(listener, Arc::clone(&proxy), stop.clone(), guests.clone());
        guests.spawn(critical.task("the listener", serving));
        Ok(Self { stop, guests, proxy, upstream, upstream_connections, haproxy_socket: None })
    }

    /// Serves requests of haproxy as well.
    pub(super) fn serve_haproxies(
        &mut self,
        data: &Runtime,
        mut socket: HaproxySocket,
        critical: &CriticalTasks,
    ) -> Result<()> {
        let _on_data_runtime = data.enter();
        let (proxy, stop) = (Arc::clone(&self.proxy), self.stop.clone());
        let users = socket.users();
        let serving = proxy::serve_haproxies(socket.listener()?, users, proxy, stop, self.guests.clone());
        self.guests.spawn(critical.task("the listener for haproxies", serving));
        self.haproxy_socket = Some(socket);
        Ok(())
    }

    /// Closes the listeners, so that new connections bypass the agent at once, and waits for
    /// requests in flight.
    pub(super) async fn drain(self, drain_timeout: Duration) {
        self.stop.cancel();
        self.guests.close();
        if timeout(drain_timeout + TASK_END, self.guests.wait()).await.is_err() {
            warn!("drain timed out; aborting requests in flight");
        }
        // After the last response, every connection to Nova is idle.
        self.upstream.close_idle();
        self.upstream_connections.close();
        if timeout(TASK_END, self.upstream_connections.wait()).await.is_err() {
            warn!("closing of connections to Nova timed out; aborting them");
        }
        drop(self.haproxy_socket);
    }
}
