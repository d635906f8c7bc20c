//! Listeners, proxy and upstream, on the data runtime.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::warn;

use super::TASK_END;
use super::haproxy_socket::HaproxySocket;
use crate::config::Config;
use crate::net::damage::DamageReports;
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
    /// Returns the socket of haproxies. Its file stays until the last request is answered.
    haproxies: Option<JoinHandle<Result<HaproxySocket>>>,
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
        Ok(Self { stop, guests, proxy, upstream, upstream_connections, haproxies: None })
    }

    /// Serves requests of haproxy as well, also if other software removes the socket's file
    /// meanwhile.
    pub(super) fn serve_haproxies(
        &mut self,
        data: &Runtime,
        mut socket: HaproxySocket,
        damage: DamageReports,
        critical: &CriticalTasks,
    ) {
        let _on_data_runtime = data.enter();
        let (proxy, stop, guests) = (Arc::clone(&self.proxy), self.stop.clone(), self.guests.clone());
        let serving = async move {
            loop {
                let (listener, users) = (socket.listener()?, socket.users());
                let (proxy, guests) = (Arc::clone(&proxy), guests.clone());
                tokio::select! {
                    () = proxy::serve_haproxies(listener, users, proxy, stop.clone(), guests) => {
                        return Ok(socket);
                    }
                    () = socket.restored(&damage) => {}
                }
            }
        };
        self.haproxies = Some(self.guests.spawn(critical.task("the listener for haproxies", serving)));
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
        if let Some(haproxies) = self.haproxies {
            // It has ended with the others, or is aborted with the runtime.
            drop(timeout(TASK_END, haproxies).await);
        }
    }
}
