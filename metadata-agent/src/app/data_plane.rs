//! Starts the data plane with what the other components provide.

use std::fs;
use std::io::ErrorKind;
use std::num::NonZero;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::runtime::Runtime;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::TASK_END;
use super::control::Control;
use super::haproxy_socket::HaproxySocket;
use crate::admin::logging::LogFormat;
use crate::config::Config;
use crate::data_plane::{self, Listeners, LogSettings, Plan, TlsStock, UserId};
use crate::datapath::Datapath;
use crate::directory::Directory;
use crate::net::damage::DamageReports;
use crate::net::portal::Portal;
use crate::nova_access::{HostSockets, SystemResolver, TlsFileWatch, TlsSetupError};
use crate::process::blocking::blocking;
use crate::proxy::metrics::MetricsTotals;
use crate::proxy::{ClientLookup, UpstreamConfig};
use crate::secrets::Signer;

/// User of the data plane, if the host has it. Any user without rights will do: the packages create
/// this one, so that nothing else runs as it.
const USER: &str = "metadata-agent";
/// The local users (passwd(5)).
const PASSWD: &str = "/etc/passwd";
/// User and group `nobody` of the kernel (`overflowuid`), which own no file.
const NOBODY: UserId = UserId { user: 65_534, group: 65_534 };

/// The running data plane, and the socket of haproxies that it serves.
pub(super) struct DataPlane {
    process: data_plane::DataPlane,
    /// Returns the socket. Its file stays until the last request is answered.
    haproxies: Option<JoinHandle<HaproxySocket>>,
    stop_haproxies: CancellationToken,
}

/// Parts that other components provide.
pub(super) struct DataPlaneInputs<'a> {
    pub(super) datapath: &'a Datapath,
    pub(super) portal: &'a Portal,
    pub(super) directory: &'a Directory,
    pub(super) lookup: Arc<dyn ClientLookup>,
    pub(super) signer: Option<Signer>,
    pub(super) metrics: Arc<MetricsTotals>,
    pub(super) haproxy_socket: Option<HaproxySocket>,
    pub(super) resumed: Arc<Notify>,
}

impl DataPlane {
    /// Starts the process, and waits until it serves guests. What it needs of this process runs on
    /// the `link` runtime, so that a main thread that is busy delays no guest.
    pub(super) async fn start(
        config: &Config,
        link: &Runtime,
        control: &Control,
        inputs: DataPlaneInputs<'_>,
        stop: CancellationToken,
    ) -> Result<Self> {
        let DataPlaneInputs { datapath, portal, directory, lookup, signer, metrics, haproxy_socket, resumed } =
            inputs;
        let upstream = config.upstream_config()?;
        let tls = tls_stock(config, link, &upstream, stop).await?;
        let users = haproxy_socket.as_ref().map(HaproxySocket::users);
        let stop_haproxies = CancellationToken::new();
        let (listeners, haproxies) = watch::channel(None);
        let haproxy_socket = haproxy_socket.map(|socket| {
            let keeping = keep(socket, listeners, control.damage.clone(), stop_haproxies.clone());
            link.spawn(control.critical.task("the socket for haproxies", keeping))
        });
        let haproxies = match haproxy_socket {
            Some(_) => Some(bound(haproxies).await?),
            None => None,
        };
        let plan = Plan {
            log: LogSettings { debug: config.debug, json: config.log_format == LogFormat::Json },
            debug: control.live.debug.subscribe(),
            user: user().await,
            workers: config.metadata_workers.map(NonZero::get),
            proxy: config.proxy(),
            upstream,
            heartbeat_stale_after: config.heartbeat_stale_after,
            haproxy_users: users,
            heartbeat: datapath.heartbeat_descriptor()?,
            listeners: Listeners::new(portal.listen(config.metadata_backlog)?, config.metadata_backlog),
            haproxies,
            table: Arc::clone(directory.clients()),
            lookup,
            names: Arc::new(SystemResolver),
            sockets: Arc::new(HostSockets),
            signer,
            tls,
            metrics,
            last_beat: control.last_beat.clone(),
            resumed,
        };
        let starting = data_plane::DataPlane::start(plan, control.restarts.clone());
        let process = link.spawn(starting).await.context("start the data plane")??;
        Ok(Self { process, haproxies: haproxy_socket, stop_haproxies })
    }

    /// Closes the listeners, so that new connections bypass the agent at once, and waits for
    /// requests in flight. The heartbeat goes on.
    pub(super) async fn drain(&mut self, drain_timeout: Duration) {
        // They end before that by themselves.
        self.process.drain(drain_timeout + 2 * TASK_END).await;
        self.stop_haproxies.cancel();
        if let Some(haproxies) = self.haproxies.take() {
            // A task that panicked has dropped the socket.
            drop(haproxies.await);
        }
    }

    /// Ends the process.
    pub(super) async fn end(self) {
        self.process.end().await;
    }
}

async fn keep(
    mut socket: HaproxySocket,
    listeners: watch::Sender<Option<UnixListener>>,
    damage: DamageReports,
    stop: CancellationToken,
) -> HaproxySocket {
    let _stopped = stop.run_until_cancelled(socket.keep(listeners, damage)).await;
    socket
}

/// Waits for the first listener.
async fn bound(
    mut listeners: watch::Receiver<Option<UnixListener>>,
) -> Result<watch::Receiver<Option<UnixListener>>> {
    listeners.wait_for(Option::is_some).await.context("the socket for haproxies was lost")?;
    Ok(listeners)
}

/// Reads the TLS files for Nova if an endpoint uses https, and keeps them up to date.
async fn tls_stock(
    config: &Config,
    link: &Runtime,
    upstream: &UpstreamConfig,
    stop: CancellationToken,
) -> Result<Option<TlsStock>> {
    if !upstream.uses_tls() {
        return Ok(None);
    }
    let files = config.nova_tls();
    let read = move || {
        // A file that is replaced meanwhile is read once more.
        let versions = files.versions();
        let stock = TlsStock::new(files.read()?)?;
        let watch = TlsFileWatch::new(files, versions, stock.reader());
        Ok::<_, TlsSetupError>((stock, watch))
    };
    let (stock, watch) = blocking(read).await.context("read the TLS files for Nova")??;
    link.spawn(watch.keep(stop));
    Ok(Some(stock))
}

/// Returns the user of the data plane.
///
/// It is a local user, so its file is read. The C library would load modules (nsswitch.conf), and a
/// static program crashes on those of another C library.
async fn user() -> UserId {
    match blocking(|| fs::read_to_string(PASSWD)).await {
        Some(Ok(users)) => user_in(&users).unwrap_or(NOBODY),
        Some(Err(error)) if error.kind() != ErrorKind::NotFound => {
            warn!(user = USER, %error, "cannot look the user of the data plane up; using nobody");
            NOBODY
        }
        // No such file, as in an image that has one program only.
        Some(Err(_)) | None => NOBODY,
    }
}

/// Finds the user in the lines of passwd(5).
fn user_in(users: &str) -> Option<UserId> {
    let mut fields = users.lines().map(|line| line.split(':')).find_map(|mut fields| {
        // Name and password.
        (fields.next() == Some(USER) && fields.next().is_some()).then_some(fields)
    })?;
    Some(UserId { user: fields.next()?.parse().ok()?, group: fields.next()?.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_user_is_found_in_the_file_of_users() {
        let root = "root:x:0:0:root:/root:/bin/bash\n";
        for (line, found) in [
            ("metadata-agent:x:990:985::/nonexistent:/usr/sbin/nologin\n", Some((990, 985))),
            ("metadata-agent-2:x:1:1::/:/bin/sh\n", None),
            ("metadata-agent:x:many:1::/:/bin/sh\n", None),
            ("metadata-agent\n", None),
            ("", None),
        ] {
            let found = found.map(|(user, group)| UserId { user, group });
            assert_eq!(user_in(&format!("{root}{line}")), found, "{line}");
        }
    }
}
