//! The parts that every data plane of this agent gets.

use std::fmt;
use std::io;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use socket2::SockRef;
use tls_files::{TlsMaterial, TlsSetupError};
use tokio::sync::{Notify, watch};

use super::client_table::ClientTable;
use super::last_beat::LastBeat;
use super::messages::{LogSettings, Settings, UserId};
use crate::ipc::Message;
use crate::nova_access::TlsUser;
use crate::proxy::metrics::MetricsTotals;
use crate::proxy::{ClientLookup, HaproxyUsers, NameLookup, ProxyConfig, SocketConnector, UpstreamConfig};
use crate::secrets::Signer;

/// The longest wait for a check of the TLS files.
const CHECK: Duration = Duration::from_secs(10);

/// The parts from which each data plane is started.
#[derive(Debug)]
pub(crate) struct Plan {
    pub log: LogSettings,
    /// The option `debug`, which may change.
    pub debug: watch::Receiver<bool>,
    pub user: UserId,
    pub workers: Option<u32>,
    pub proxy: ProxyConfig,
    pub upstream: UpstreamConfig,
    pub heartbeat_stale_after: Duration,
    pub haproxy_users: Option<HaproxyUsers>,
    /// The map of heartbeats.
    pub heartbeat: OwnedFd,
    pub listeners: Listeners,
    /// The current listener for haproxies, if they are served.
    pub haproxies: Option<watch::Receiver<Option<UnixListener>>>,
    pub table: Arc<ClientTable>,
    pub lookup: Arc<dyn ClientLookup>,
    pub names: Arc<dyn NameLookup>,
    pub sockets: Arc<dyn SocketConnector>,
    pub signer: Option<Signer>,
    pub tls: Option<TlsStock>,
    pub metrics: Arc<MetricsTotals>,
    pub last_beat: LastBeat,
    /// Notified when traffic may flow again.
    pub resumed: Arc<Notify>,
}

/// The listener for guests. While this process has it open, connections wait for the next data
/// plane if there is none.
#[derive(Debug)]
pub(crate) struct Listeners {
    guests: Mutex<Option<TcpListener>>,
    backlog: i32,
}

impl Listeners {
    /// `backlog` is that of the listener.
    pub(crate) fn new(guests: TcpListener, backlog: i32) -> Self {
        Self { guests: Mutex::new(Some(guests)), backlog }
    }

    /// Returns the listener for another data plane.
    fn for_next(&self) -> io::Result<TcpListener> {
        let guests = self.guests();
        let listener = guests.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        // The last one may have shut it down. Otherwise this changes nothing.
        SockRef::from(listener).listen(self.backlog)?;
        listener.try_clone()
    }

    /// Closes this process's listener. Once the data plane has closed its own, connections are
    /// refused.
    pub(super) fn close(&self) {
        self.guests().take();
    }

    fn guests(&self) -> MutexGuard<'_, Option<TcpListener>> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Plan {
    /// Makes the first message to a data plane with this memory.
    pub(super) fn settings(&self, memory: OwnedFd) -> io::Result<Message<Settings>> {
        let listener = self.listeners.for_next()?;
        let haproxies = self
            .haproxies
            .as_ref()
            .map(|haproxies| haproxies.borrow().as_ref().map(UnixListener::try_clone).transpose());
        let haproxies = haproxies.transpose()?.flatten();
        let settings = Settings {
            log: LogSettings { debug: *self.debug.borrow(), ..self.log },
            user: self.user,
            workers: self.workers,
            proxy: self.proxy.clone(),
            upstream: self.upstream.clone(),
            heartbeat_stale_after: self.heartbeat_stale_after,
            haproxy_users: self.haproxy_users.clone(),
            tls: self.tls.as_ref().map(TlsStock::material),
            generation: self.signer.as_ref().map_or(0, Signer::generation),
        };
        let descriptors = [OwnedFd::from(listener), self.heartbeat.try_clone()?, memory];
        let haproxies = haproxies.map(OwnedFd::from);
        Ok(Message::new(settings, descriptors.into_iter().chain(haproxies)))
    }
}

/// The TLS material in force, and checks of its files. Clones share it.
#[derive(Clone)]
pub(crate) struct TlsStock {
    material: Arc<watch::Sender<TlsMaterial>>,
    /// The number of checks that were asked for, and of those that were made.
    wanted: Arc<watch::Sender<u64>>,
    made: Arc<watch::Sender<u64>>,
}

impl fmt::Debug for TlsStock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TlsStock")
    }
}

impl TlsStock {
    /// # Errors
    /// The material cannot be used.
    pub(crate) fn new(material: TlsMaterial) -> Result<Self, TlsSetupError> {
        material.clone().client_config()?;
        Ok(Self {
            material: Arc::new(watch::Sender::new(material)),
            wanted: Arc::default(),
            made: Arc::default(),
        })
    }

    /// Returns the reader's end, which reads the files.
    pub(crate) fn reader(&self) -> TlsReader {
        TlsReader { wanted: self.wanted.subscribe(), stock: self.clone() }
    }

    fn material(&self) -> TlsMaterial {
        self.material.borrow().clone()
    }

    /// Waits for the next material.
    pub(super) fn changes(&self) -> watch::Receiver<TlsMaterial> {
        self.material.subscribe()
    }

    /// Has the files checked, and returns what is in force then.
    pub(super) async fn check(&self) -> TlsMaterial {
        let mut number = 0;
        self.wanted.send_modify(|wanted| {
            *wanted += 1;
            number = *wanted;
        });
        let mut made = self.made.subscribe();
        // The data plane does not wait for ever either.
        let _ = tokio::time::timeout(CHECK, made.wait_for(|made| *made >= number)).await;
        self.material()
    }
}

/// Puts what is read from the files into the stock.
#[derive(Debug)]
pub(crate) struct TlsReader {
    wanted: watch::Receiver<u64>,
    stock: TlsStock,
}

impl TlsUser for TlsReader {
    async fn refused(&mut self) -> u64 {
        if self.wanted.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
        *self.wanted.borrow_and_update()
    }

    fn replace(&self, material: TlsMaterial) -> Result<(), TlsSetupError> {
        material.clone().client_config()?;
        self.stock.material.send_replace(material);
        Ok(())
    }

    fn checked(&self, refusal: u64) {
        self.stock.made.send_replace(refusal);
    }
}
