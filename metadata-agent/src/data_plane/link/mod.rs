//! The control process's end of the socket to one data plane.
//!
//! A guest may have taken the data plane over. So every report is limited in size, and every call
//! is refused unless the settings or the table of clients imply that it may be made.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::messages::{Answer, CallError, LONGEST_REPORT, Order, Query, Report, Settings};
use super::plan::Plan;
use crate::ipc::{Connection, IpcError, Message, Receiver, Sender};
use crate::proxy::LookupOutcome;

/// Orders that wait to be sent. Changes of clients do not wait here, so they take no memory.
const ORDERS: usize = 256;
/// Most calls that are answered at the same time; others wait in the socket. There are more than
/// connections of guests, so those that wait for a slow Neutron delay no other guest's.
const CALLS: usize = 16 * 1024;
/// The longest look-up of a name that is waited for.
const NAME: Duration = Duration::from_secs(30);

/// The news of a data plane.
#[derive(Debug)]
pub(super) enum Event {
    Serving,
    Drained,
    /// The socket cannot be used any more.
    Ended(IpcError),
}

/// The tasks that exchange messages with one data plane. Dropping it closes the socket.
#[derive(Debug)]
pub(super) struct Link {
    orders: mpsc::Sender<Message<Order>>,
    events: mpsc::Receiver<Event>,
    _tasks: JoinSet<()>,
}

impl Link {
    /// Sends the settings and starts the exchange, on the runtime of the caller.
    pub(super) fn start(
        socket: UnixStream,
        settings: Message<Settings>,
        plan: &Arc<Plan>,
    ) -> Result<Self, IpcError> {
        let (sender, receiver) = Connection::new(socket, LONGEST_REPORT).split()?;
        let (orders, queue) = mpsc::channel(ORDERS);
        let (event, events) = mpsc::channel(4);
        let mut tasks = JoinSet::new();
        tasks.spawn(write(sender, settings, Arc::clone(plan), queue, event.clone()));
        tasks.spawn(read(receiver, Arc::clone(plan), orders.clone(), event));
        tasks.spawn(follow_secrets(Arc::clone(plan), orders.clone()));
        tasks.spawn(follow_heartbeat(Arc::clone(plan), orders.clone()));
        tasks.spawn(follow_haproxies(Arc::clone(plan), orders.clone()));
        tasks.spawn(follow_log_level(Arc::clone(plan), orders.clone()));
        tasks.spawn(follow_tls(Arc::clone(plan), orders.clone()));
        Ok(Self { orders, events, _tasks: tasks })
    }

    /// Sends an order, unless the data plane has ended.
    pub(super) async fn order(&self, order: Order) {
        let _ = self.orders.send(Message::new(order, [])).await;
    }

    /// Waits for the next event. Cancelling the wait loses none.
    pub(super) async fn event(&mut self) -> Event {
        self.events.recv().await.unwrap_or(Event::Ended(IpcError::Ended))
    }
}

async fn write(
    mut sender: Sender,
    settings: Message<Settings>,
    plan: Arc<Plan>,
    mut queue: mpsc::Receiver<Message<Order>>,
    events: mpsc::Sender<Event>,
) {
    let feed = plan.table.feed();
    if let Err(error) = sender.send(&settings).await {
        let _ = events.send(Event::Ended(error)).await;
        return;
    }
    drop(settings);
    loop {
        let message = tokio::select! {
            message = queue.recv() => match message {
                Some(message) => message,
                None => return,
            },
            records = feed.next() => Message::new(Order::Entries(records), []),
        };
        if let Err(error) = sender.send(&message).await {
            let _ = events.send(Event::Ended(error)).await;
            return;
        }
    }
}

async fn read(
    mut receiver: Receiver,
    plan: Arc<Plan>,
    orders: mpsc::Sender<Message<Order>>,
    events: mpsc::Sender<Event>,
) {
    let room = Arc::new(Semaphore::new(CALLS));
    let mut calls = JoinSet::new();
    loop {
        let report = match receiver.receive::<Report>().await {
            Ok(message) => message.body,
            Err(error) => {
                let _ = events.send(Event::Ended(error)).await;
                return;
            }
        };
        match report {
            Report::Serving => drop(events.send(Event::Serving).await),
            Report::Drained => drop(events.send(Event::Drained).await),
            Report::Call { call, query } => {
                let permit = permit(&room).await;
                let (plan, orders) = (Arc::clone(&plan), orders.clone());
                calls.spawn(async move {
                    let (answer, descriptor) = plan.answer(query).await;
                    let _ = orders.send(Message::new(Order::Answer { call, answer }, descriptor)).await;
                    drop(permit);
                });
            }
            Report::Copied { version } => plan.table.acknowledge(version),
            Report::Preferred { generation, secret } => {
                if let Some(signer) = &plan.signer {
                    signer.status().accepted(generation, usize::try_from(secret).unwrap_or(usize::MAX));
                }
            }
            Report::SecretsRefused { generation } => {
                if let Some(signer) = &plan.signer {
                    signer.status().all_refused(generation);
                }
            }
            Report::TlsRefused { refusal } => {
                let permit = permit(&room).await;
                let check = check_tls(Arc::clone(&plan), refusal, orders.clone());
                calls.spawn(async move {
                    check.await;
                    drop(permit);
                });
            }
        }
        while calls.try_join_next().is_some() {}
    }
}

/// Waits until fewer than [`CALLS`] are being answered.
async fn permit(room: &Arc<Semaphore>) -> OwnedSemaphorePermit {
    let Ok(permit) = Arc::clone(room).acquire_owned().await else {
        unreachable!("this semaphore is never closed")
    };
    permit
}

/// Sends the generation of the secrets whenever they are replaced.
async fn follow_secrets(plan: Arc<Plan>, orders: mpsc::Sender<Message<Order>>) {
    let Some(signer) = &plan.signer else { return };
    loop {
        // Sent once more than necessary, but never too late.
        let generation = signer.generation();
        if orders.send(Message::new(Order::Secrets { generation }, [])).await.is_err() {
            return;
        }
        signer.replaced(generation).await;
    }
}

async fn follow_heartbeat(plan: Arc<Plan>, orders: mpsc::Sender<Message<Order>>) {
    loop {
        plan.resumed.notified().await;
        if orders.send(Message::new(Order::Beat, [])).await.is_err() {
            return;
        }
    }
}

/// Sends the listener for haproxies whenever it is bound again.
async fn follow_haproxies(plan: Arc<Plan>, orders: mpsc::Sender<Message<Order>>) {
    let Some(listeners) = &plan.haproxies else { return };
    let mut listeners = listeners.clone();
    listeners.mark_unchanged();
    while listeners.changed().await.is_ok() {
        let listener = listeners.borrow_and_update().as_ref().map(UnixListener::try_clone);
        match listener {
            Some(Ok(listener)) => {
                let message = Message::new(Order::HaproxyListener, [OwnedFd::from(listener)]);
                if orders.send(message).await.is_err() {
                    return;
                }
            }
            Some(Err(error)) => tracing::error!(%error, "cannot hand over the socket for haproxies"),
            None => {}
        }
    }
}

async fn follow_log_level(plan: Arc<Plan>, orders: mpsc::Sender<Message<Order>>) {
    let mut changes = plan.debug.clone();
    while changes.changed().await.is_ok() {
        let debug = *changes.borrow_and_update();
        if orders.send(Message::new(Order::LogLevel { debug }, [])).await.is_err() {
            return;
        }
    }
}

/// Sends the TLS material whenever a file was replaced.
async fn follow_tls(plan: Arc<Plan>, orders: mpsc::Sender<Message<Order>>) {
    let Some(tls) = &plan.tls else { return };
    let mut changes = tls.changes();
    while changes.changed().await.is_ok() {
        let material = changes.borrow_and_update().clone();
        if orders.send(Message::new(Order::Tls(material), [])).await.is_err() {
            return;
        }
    }
}

/// Has the TLS files checked, and sends what is in force then.
async fn check_tls(plan: Arc<Plan>, refusal: u64, orders: mpsc::Sender<Message<Order>>) {
    let Some(tls) = &plan.tls else { return };
    let material = tls.check().await;
    let _ = orders.send(Message::new(Order::Tls(material), [])).await;
    let _ = orders.send(Message::new(Order::TlsChecked { refusal }, [])).await;
}

impl Plan {
    /// Answers a call of the data plane.
    async fn answer(&self, query: Query) -> (Answer, Option<OwnedFd>) {
        match query {
            Query::Client(query) => {
                let may_ask = match query.mac {
                    Some(_) => self.table.is_shared(query.scope),
                    // A haproxy names the network, and no guest can.
                    None => self.haproxies.is_some(),
                };
                let outcome =
                    if may_ask { self.lookup.find(&query).await } else { LookupOutcome::Unavailable };
                (Answer::Client(outcome), None)
            }
            Query::Name { host, port } => {
                let is_ours = self.upstream.endpoints.iter().any(|endpoint| endpoint.is_at(&host, port));
                let found = if is_ours {
                    timeout(NAME, self.names.look_up(&host, port))
                        .await
                        .unwrap_or_else(|late| Err(late.into()))
                } else {
                    Err(Errno::EPERM.into())
                };
                (found.map_or_else(|error| failed(&error), Answer::Name), None)
            }
            Query::Socket { path } => {
                let is_ours = self.upstream.endpoints.iter().any(|endpoint| endpoint.is_socket(&path));
                let connected = async {
                    let stream = self.sockets.connect(&path).await?;
                    Ok(OwnedFd::from(stream.into_std()?))
                };
                let connected = if is_ours {
                    let limit = self.upstream.connect_timeout;
                    timeout(limit, connected).await.unwrap_or_else(|late| Err(late.into()))
                } else {
                    Err(Errno::EPERM.into())
                };
                match connected {
                    Ok(stream) => (Answer::Socket, Some(stream)),
                    Err(error) => (failed(&error), None),
                }
            }
        }
    }
}

fn failed(error: &io::Error) -> Answer {
    Answer::Failed(CallError::from(error))
}

#[cfg(test)]
mod tests;
