//! Starts the data plane, and starts another one if it ends or hangs.
//!
//! This process keeps the listener open. So connections wait in the kernel for the next data plane,
//! and only requests in flight are lost.

use std::env;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tracing::{error, info, warn};

use super::link::{Event, Link};
use super::messages::Order;
use super::plan::Plan;
use super::shared_state::SharedState;
use crate::ipc::IpcError;

/// The time in which a data plane must serve.
const START: Duration = Duration::from_secs(10);
/// Pause before the next start, if a data plane did not come to serve.
const PAUSE: Duration = Duration::from_secs(1);
/// The interval at which the heartbeat is looked at, and the number of looks without another
/// heartbeat after which the data plane counts as hung. If this process is stopped with it, both
/// miss the same time.
const LOOK: Duration = Duration::from_secs(1);
const LOOKS: u32 = 15;
/// The time for the data plane to end once its socket is closed.
const END: Duration = Duration::from_secs(5);
/// Restarts are logged at most once in this time.
const LOG_PAUSE: Duration = Duration::from_secs(1);

/// The command of the data-plane process.
pub(crate) const COMMAND: &str = "data-plane";
/// The variables that it gets, which say how to log.
const VARIABLES: [&str; 2] = ["RUST_LOG", "NO_COLOR"];

#[derive(Debug, thiserror::Error)]
pub(crate) enum DataPlaneError {
    #[error("cannot create the memory of metrics: {0}")]
    Memory(Errno),
    #[error("cannot start the data plane: {0}")]
    Spawn(io::Error),
    #[error("cannot reach the data plane: {0}")]
    Link(#[from] IpcError),
    #[error("the data plane ended before it served ({0})")]
    Ended(ExitStatus),
    #[error("the data plane did not serve within {} s", START.as_secs())]
    Late,
}

/// The data plane, whichever process it is at the moment.
#[derive(Debug)]
pub(crate) struct DataPlane {
    drain: mpsc::Sender<(Duration, oneshot::Sender<()>)>,
    supervising: JoinHandle<()>,
}

/// The number of data planes that were started after the first.
#[derive(Clone, Debug, Default)]
pub(crate) struct Restarts(Arc<AtomicU64>);

impl Restarts {
    pub(crate) fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl DataPlane {
    /// Starts a data plane on the runtime of the caller, and waits until it serves.
    ///
    /// # Errors
    /// It cannot be started, or does not come to serve.
    pub(crate) async fn start(plan: Plan, restarts: Restarts) -> Result<Self, DataPlaneError> {
        let plan = Arc::new(plan);
        let first = Process::start(&plan).await?;
        let (drain, drains) = mpsc::channel(1);
        let supervising = tokio::spawn(supervise(plan, first, drains, restarts));
        Ok(Self { drain, supervising })
    }

    /// Closes the listeners, so that new connections bypass the agent at once, and waits for
    /// requests in flight, for up to `limit`. The heartbeat goes on.
    pub(crate) async fn drain(&self, limit: Duration) {
        let (done, drained) = oneshot::channel();
        if self.drain.send((limit, done)).await.is_ok() {
            let _ = drained.await;
        }
    }

    /// Ends the data plane.
    pub(crate) async fn end(self) {
        drop(self.drain);
        // A supervisor that panicked has dropped its process, which is killed by that.
        let _ = self.supervising.await;
    }
}

/// The reason for the end of a supervised process.
enum End {
    Exit(io::Result<ExitStatus>),
    Link(IpcError),
    Hung,
}

async fn supervise(
    plan: Arc<Plan>,
    first: Process,
    mut drains: mpsc::Receiver<(Duration, oneshot::Sender<()>)>,
    restarts: Restarts,
) {
    let mut process = first;
    let mut logged: Option<Instant> = None;
    loop {
        let end = tokio::select! {
            end = process.first_end() => end,
            drain = drains.recv() => {
                if let Some((limit, done)) = drain {
                    process.drain(&plan, limit).await;
                    let _ = done.send(());
                    // Until the end, it only writes heartbeats.
                    let _ = drains.recv().await;
                }
                return process.end(&plan).await;
            }
        };
        if logged.is_none_or(|at| at.elapsed() >= LOG_PAUSE) {
            logged = Some(Instant::now());
            match &end {
                End::Exit(Ok(status)) => error!(%status, "data plane ended; starting another one"),
                End::Exit(Err(error)) => error!(%error, "data plane is lost; starting another one"),
                End::Link(error) => error!(%error, "data plane does not answer; starting another one"),
                End::Hung => error!("data plane hangs; starting another one"),
            }
        }
        process.kill(&plan).await;
        process = loop {
            restarts.0.fetch_add(1, Ordering::Relaxed);
            match Process::start(&plan).await {
                Ok(started) => break started,
                Err(error) => warn!(%error, "cannot start the data plane; trying again"),
            }
            tokio::select! {
                () = sleep(PAUSE) => {}
                drain = drains.recv() => {
                    plan.listeners.close();
                    if let Some((_, done)) = drain {
                        let _ = done.send(());
                    }
                    return;
                }
            }
        };
    }
}

/// A data-plane process.
#[derive(Debug)]
struct Process {
    child: Child,
    link: Link,
    state: Arc<SharedState>,
}

impl Process {
    async fn start(plan: &Arc<Plan>) -> Result<Self, DataPlaneError> {
        let (memory, state) = SharedState::create().map_err(DataPlaneError::Memory)?;
        let state = Arc::new(state);
        let (ours, theirs) = UnixStream::pair().map_err(DataPlaneError::Spawn)?;
        let settings = plan.settings(memory).map_err(DataPlaneError::Spawn)?;
        // The program that this process runs, even if its file was replaced.
        let mut command = Command::new("/proc/self/exe");
        command.arg0("metadata-agent").arg(COMMAND).env_clear().kill_on_drop(true);
        command.envs(VARIABLES.iter().filter_map(|name| Some((name, env::var_os(name)?))));
        command.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null());
        let child = command.spawn().map_err(DataPlaneError::Spawn)?;
        // It holds the other end open until then.
        drop(command);

        let link = Link::start(ours, settings, plan)?;
        plan.metrics.add(Arc::clone(state.metrics()));
        plan.last_beat.follow(Arc::clone(&state));
        let mut process = Self { child, link, state };
        match timeout(START, process.serving()).await {
            Ok(Ok(())) => Ok(process),
            Ok(Err(error)) => {
                process.kill(plan).await;
                Err(error)
            }
            Err(_) => {
                process.kill(plan).await;
                Err(DataPlaneError::Late)
            }
        }
    }

    async fn serving(&mut self) -> Result<(), DataPlaneError> {
        loop {
            tokio::select! {
                // What it reported before its end comes first.
                biased;
                event = self.link.event() => match event {
                    Event::Serving => return Ok(()),
                    Event::Drained => {}
                    Event::Ended(error) => {
                        return match timeout(END, self.child.wait()).await {
                            Ok(Ok(status)) => Err(DataPlaneError::Ended(status)),
                            Ok(Err(_)) | Err(_) => Err(error.into()),
                        };
                    }
                },
                status = self.child.wait() => {
                    return Err(status.map_or_else(DataPlaneError::Spawn, DataPlaneError::Ended));
                }
            }
        }
    }

    /// Waits until the process ends, cannot be reached, or hangs.
    async fn first_end(&mut self) -> End {
        let Self { child, link, state } = self;
        let mut look = interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut last, mut looks) = (state.last_beat(), 0);
        loop {
            tokio::select! {
                status = child.wait() => return End::Exit(status),
                event = link.event() => {
                    if let Event::Ended(error) = event {
                        // Mostly because it ended.
                        return match timeout(END, child.wait()).await {
                            Ok(status) => End::Exit(status),
                            Err(_) => End::Link(error),
                        };
                    }
                }
                _ = look.tick() => {
                    let beat = state.last_beat();
                    looks = if beat == last { looks + 1 } else { 0 };
                    last = beat;
                    if looks > LOOKS {
                        return End::Hung;
                    }
                }
            }
        }
    }

    async fn drain(&mut self, plan: &Plan, limit: Duration) {
        plan.listeners.close();
        self.link.order(Order::Drain).await;
        let drained = async {
            loop {
                tokio::select! {
                    status = self.child.wait() => return warn!(?status, "data plane ended while draining"),
                    event = self.link.event() => match event {
                        Event::Drained => return,
                        Event::Serving => {}
                        Event::Ended(error) => return warn!(%error, "data plane was lost while draining"),
                    },
                }
            }
        };
        if timeout(limit, drained).await.is_err() {
            warn!("drain timed out; aborting requests in flight");
        }
    }

    /// Ends the process in order: it notices that its socket is closed.
    async fn end(self, plan: &Plan) {
        let Self { mut child, link, state } = self;
        drop(link);
        match timeout(END, child.wait()).await {
            Ok(Ok(status)) if status.success() => info!("data plane ended"),
            Ok(Ok(status)) => warn!(%status, "data plane ended"),
            Ok(Err(error)) => warn!(%error, "data plane is lost"),
            Err(_) => {
                warn!("data plane did not end in time; killing it");
                if let Err(error) = child.kill().await {
                    warn!(%error, "cannot kill the data plane");
                }
            }
        }
        plan.metrics.end(state.metrics());
    }

    async fn kill(&mut self, plan: &Plan) {
        // It may have ended already.
        let _ = self.child.start_kill();
        match timeout(END, self.child.wait()).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => warn!(%error, "cannot kill the data plane"),
            // It answers no one any more, and the runtime waits for it.
            Err(_) => warn!("data plane was killed, but the kernel has not ended it yet"),
        }
        plan.metrics.end(self.state.metrics());
    }
}
