//! The data-plane process: answers guests, without a privilege, a secret, or access to the host.
//!
//! Its parent is the control process, on standard input. It ends when its parent does.

use std::ffi::CStr;
use std::io;
use std::net::TcpListener;
use std::num::NonZero;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net;
use std::sync::Arc;
use std::thread;

use anyhow::{Context as _, Result};
use nix::sys::prctl;
use tokio::net::UnixListener;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use super::calls::Calls;
use super::messages::{LONGEST_ORDER, LogSettings, Order, Report, Settings};
use super::sandbox;
use super::shared_state::SharedState;
use super::{ClientTable, EntryRecords};
use crate::datapath::Heartbeat;
use crate::datapath::heartbeat::beat_data;
use crate::ipc::{Connection, IpcError, Message, Receiver, Sender};
use crate::proxy::{
    HaproxyUsers, Proxy, SecretStatus, TlsFeed, Upstream, UpstreamAccess, UpstreamTls, serve_guests,
    serve_haproxies,
};
use crate::sys;

/// The name of the process, as ps(1) shows it. The kernel keeps 15 characters.
const NAME: &CStr = c"md-data-plane";

/// Reports that wait to be sent.
const REPORTS: usize = 1024;

type SetDebug = Box<dyn Fn(bool) + Send>;

/// A data plane that has received its settings.
#[derive(Debug)]
pub(crate) struct DataPlaneProcess {
    connection: Connection,
    settings: Settings,
    listener: OwnedFd,
    heartbeat: Heartbeat,
    state: Arc<SharedState>,
    haproxies: Option<OwnedFd>,
}

impl DataPlaneProcess {
    /// Receives the settings from the parent.
    ///
    /// # Errors
    /// Standard input is not a socket of the control process.
    pub(crate) fn receive() -> Result<Self> {
        sys::close_inherited().context("close what other programs left open")?;
        // It is executed as /proc/self/exe.
        prctl::set_name(NAME).context("set the name of the process")?;
        let socket = io::stdin().as_fd().try_clone_to_owned().context("use standard input")?;
        let mut connection = Connection::new(net::UnixStream::from(socket), LONGEST_ORDER);
        let message = connection.receive_blocking();
        let mut message: Message<Settings> =
            message.context("`metadata-agent run` starts this command; it is of no use to people")?;
        let (listener, map, memory) = (message.descriptor()?, message.descriptor()?, message.descriptor()?);
        let haproxies = message.descriptors.pop_front();
        let heartbeat = Heartbeat::map(map.as_fd())?;
        let state = Arc::new(SharedState::map(memory.as_fd()).context("map the metrics")?);
        Ok(Self { connection, settings: message.body, listener, heartbeat, state, haproxies })
    }

    pub(crate) fn log_settings(&self) -> LogSettings {
        self.settings.log
    }

    /// Gives up every privilege, and serves guests until the parent ends. Calls `set_debug` when
    /// the option changes.
    ///
    /// # Errors
    /// The kernel refuses what serving needs.
    pub(crate) fn serve(self, set_debug: impl Fn(bool) + Send + 'static) -> Result<()> {
        // Reads files, so it comes before the sandbox.
        let workers = self.settings.workers.map(|workers| workers as usize);
        let workers = workers.or_else(|| thread::available_parallelism().ok().map(NonZero::get)).unwrap_or(1);
        // Threads inherit the sandbox, so it comes before them.
        for gap in sandbox::enter(self.settings.user) {
            warn!(%gap, "the data plane is less confined than it could be");
        }
        let mut runtime = Builder::new_multi_thread();
        let runtime = runtime.worker_threads(workers).enable_all().thread_name("md-data");
        let runtime = runtime.build().context("start the data runtime")?;
        let served = serve(&runtime, self, Box::new(set_debug));
        runtime.shutdown_background();
        served
    }
}

fn serve(runtime: &Runtime, process: DataPlaneProcess, set_debug: SetDebug) -> Result<()> {
    let DataPlaneProcess { connection, settings, listener, heartbeat, state, haproxies } = process;
    let _on_runtime = runtime.enter();
    let (reports, queue) = mpsc::channel(REPORTS);
    let (sender, receiver) = connection.split()?;
    let secrets = Arc::new(SecretStatus::default());
    secrets.begin(settings.generation);
    let table = Arc::new(ClientTable::new(Arc::clone(&secrets)));
    let calls = Calls::new(reports.clone());
    let (tls, feed) = match settings.tls {
        Some(material) => UpstreamTls::new(material).map(|(tls, feed)| (Some(tls), Some(feed)))?,
        None => (None, None),
    };
    let access = UpstreamAccess { names: calls.clone(), sockets: calls.clone(), tls };
    let (connections, metrics) = (TaskTracker::new(), Arc::clone(state.metrics()));
    let upstream = Upstream::new(settings.upstream, access, Arc::clone(&metrics), connections.clone())?;
    let upstream = Arc::new(upstream);
    let proxy = Proxy::new(table.clone(), calls.clone(), Arc::clone(&upstream), settings.proxy, metrics);

    let resumed = Arc::new(Notify::new());
    heartbeat.beat_data();
    state.mark_beat();
    let stale_after = settings.heartbeat_stale_after;
    runtime.spawn(beat_data(heartbeat, stale_after, move || state.mark_beat(), Arc::clone(&resumed)));
    let guests = Guests::new(proxy, upstream, connections);
    guests.accept(listener)?;
    let mut haproxies_served = Haproxies { users: settings.haproxy_users, serving: None };
    if let Some(listener) = haproxies {
        haproxies_served.accept(&guests, listener)?;
    }

    runtime.spawn(send(sender, queue));
    runtime.spawn(report_secrets(Arc::clone(&secrets), reports.clone()));
    reports.try_send(Report::Serving).context("report the start")?;
    let orders = Orders {
        table,
        secrets,
        calls,
        guests: Arc::new(guests),
        haproxies: haproxies_served,
        resumed,
        set_debug,
        reports,
    };
    match runtime.block_on(orders.follow(receiver, feed)) {
        // The parent has ended in order, or crashed. The next one starts a data plane of its own.
        Err(IpcError::Ended | IpcError::Receive(_)) => Ok(()),
        Err(error) => Err(error.into()),
        Ok(never) => match never {},
    }
}

async fn send(mut sender: Sender, mut queue: mpsc::Receiver<Report>) {
    while let Some(report) = queue.recv().await {
        if let Err(error) = sender.send(&Message::new(report, [])).await {
            // The end of the parent ends this process.
            return tracing::debug!(%error, "cannot report to the control process");
        }
    }
}

/// Reports what Nova thinks of the shared secrets.
async fn report_secrets(secrets: Arc<SecretStatus>, reports: mpsc::Sender<Report>) {
    loop {
        let report = tokio::select! {
            (generation, secret) = secrets.preference() => {
                Report::Preferred { generation, secret: u32::try_from(secret).unwrap_or(u32::MAX) }
            }
            () = secrets.refused() => Report::SecretsRefused { generation: secrets.generation() },
        };
        if reports.send(report).await.is_err() {
            return;
        }
    }
}

/// The connections of guests and haproxies.
#[derive(Debug)]
struct Guests {
    proxy: Arc<Proxy>,
    upstream: Arc<Upstream>,
    upstream_connections: TaskTracker,
    stop: CancellationToken,
    connections: TaskTracker,
}

impl Guests {
    fn new(proxy: Arc<Proxy>, upstream: Arc<Upstream>, upstream_connections: TaskTracker) -> Self {
        let (stop, connections) = (CancellationToken::new(), TaskTracker::new());
        Self { proxy, upstream, upstream_connections, stop, connections }
    }

    fn accept(&self, listener: OwnedFd) -> Result<()> {
        let listener = TcpListener::from(listener);
        let listener = tokio::net::TcpListener::from_std(listener).context("watch the listener")?;
        let (stop, connections) = (self.stop.clone(), self.connections.clone());
        self.connections.spawn(serve_guests(listener, Arc::clone(&self.proxy), stop, connections));
        Ok(())
    }

    /// Closes the listeners, and waits for requests in flight. They limit their own time.
    async fn drain(&self) {
        self.stop.cancel();
        self.connections.close();
        self.connections.wait().await;
        // After the last response, every connection to Nova is idle.
        self.upstream.close_idle();
        self.upstream_connections.close();
        self.upstream_connections.wait().await;
    }
}

/// The listener for haproxies, which may be replaced.
#[derive(Debug)]
struct Haproxies {
    users: Option<HaproxyUsers>,
    serving: Option<JoinHandle<()>>,
}

impl Haproxies {
    fn accept(&mut self, guests: &Guests, listener: OwnedFd) -> Result<()> {
        let Some(users) = self.users.clone() else { return Ok(()) };
        let listener = net::UnixListener::from(listener);
        let listener = UnixListener::from_std(listener).context("watch the listener for haproxies")?;
        let (proxy, stop, connections) =
            (Arc::clone(&guests.proxy), guests.stop.clone(), guests.connections.clone());
        let serving = serve_haproxies(listener, users, proxy, stop, connections);
        let former = self.serving.replace(guests.connections.spawn(serving));
        if let Some(former) = former {
            former.abort();
        }
        Ok(())
    }
}

/// Follows the orders of the control process.
struct Orders {
    table: Arc<ClientTable>,
    secrets: Arc<SecretStatus>,
    calls: Arc<Calls>,
    guests: Arc<Guests>,
    haproxies: Haproxies,
    resumed: Arc<Notify>,
    set_debug: SetDebug,
    reports: mpsc::Sender<Report>,
}

impl Orders {
    async fn follow(
        mut self,
        mut receiver: Receiver,
        mut tls: Option<TlsFeed>,
    ) -> Result<std::convert::Infallible, IpcError> {
        loop {
            let refused = async {
                match &mut tls {
                    Some(feed) => feed.refused().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                refusal = refused => {
                    // Without room, the connection that was refused gives up after its own limit.
                    let _ = self.reports.try_send(Report::TlsRefused { refusal });
                }
                message = receiver.receive() => self.obey(message?, tls.as_ref()),
            }
        }
    }

    fn obey(&mut self, mut message: Message<Order>, tls: Option<&TlsFeed>) {
        let descriptor = message.descriptors.pop_front();
        match message.body {
            Order::Entries(records) => self.apply(records),
            Order::Secrets { generation } => self.secrets.begin(generation),
            Order::Tls(material) => {
                if let Some(Err(error)) = tls.map(|feed| feed.replace(material)) {
                    let error = &error as &dyn std::error::Error;
                    warn!(error, "certificates for Nova cannot be used; keeping the last ones");
                }
            }
            Order::TlsChecked { refusal } => {
                if let Some(feed) = tls {
                    feed.checked(refusal);
                }
            }
            Order::Answer { call, answer } => self.calls.answer(call, answer, descriptor),
            Order::HaproxyListener => {
                let accepted = descriptor.map(|listener| self.haproxies.accept(&self.guests, listener));
                if let Some(Err(error)) = accepted {
                    warn!(error = &*error, "the listener for haproxies cannot be used");
                }
            }
            Order::LogLevel { debug } => (self.set_debug)(debug),
            Order::Beat => self.resumed.notify_one(),
            Order::Drain => {
                info!("draining");
                let (guests, reports) = (Arc::clone(&self.guests), self.reports.clone());
                tokio::spawn(async move {
                    guests.drain().await;
                    let _ = reports.send(Report::Drained).await;
                });
            }
        }
    }

    fn apply(&self, records: EntryRecords) {
        let version = records.version;
        self.table.apply(records.into_changes());
        if let Some(version) = version {
            // Without room, the next one comes soon.
            let _ = self.reports.try_send(Report::Copied { version });
        }
    }
}
