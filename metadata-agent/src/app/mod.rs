//! `metadata-agent run`: starts and connects all components, and stops them in order.
//!
//! This is the control process. Its control runtime, on the main thread, runs sources, inventory,
//! attachments and the admin socket. Its link runtime talks to the data plane, which is a process
//! of its own, so neither a scrape nor a slow source delays a guest.
//!
//! [`control`] starts what runs from the beginning to the end, [`guest_service`] what serves
//! guests.

mod control;
mod data_plane;
mod guest_service;
mod haproxy_socket;
mod reload;
mod source_tasks;
mod stop_deadline;
mod systemd;

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::{info, warn};

use crate::admin::{AdminSocket, logging, state_log};
use crate::config::{Config, ConfigArgs};
use crate::process::capabilities;
use crate::process::signals::{HeldSignals, SignalActions};
use crate::teardown;
use control::Control;
use guest_service::GuestService;
use haproxy_socket::HaproxySocket;
use reload::{LiveSettings, Reloader};
use systemd::{ServiceManager, feed_watchdog};

/// Time for tasks to end after they are cancelled.
const TASK_END: Duration = Duration::from_secs(5);

/// Serves guests until SIGTERM or SIGINT, then removes everything that it made on the host.
///
/// # Errors
/// Another agent runs, a capability is missing, or the kernel rejects a step.
pub(crate) fn run(config: &Config, args: &ConfigArgs, held: HeldSignals) -> Result<()> {
    let log_level = logging::init(config.debug, config.log_format)?;
    let signals = held.handle()?;
    log_notices(config);
    capabilities::require(&capabilities::TO_RUN)?;
    raise_descriptor_limit();
    let link = link_runtime()?;
    let control = control_runtime()?;
    let (live, manager) = (LiveSettings::new(config), ServiceManager::default());
    let reloader = Reloader::new(args, config, log_level, live.clone());
    let outcome = control.block_on(async {
        tokio::select! {
            outcome = start_and_stop(config, &link, live, &signals, &manager) => outcome,
            never = reloader.run(&signals, &manager) => match never {},
        }
    });
    // Tasks have ended or had their time. A blocking call may never return.
    link.shutdown_background();
    control.shutdown_background();
    outcome
}

async fn start_and_stop(
    config: &Config,
    link: &Runtime,
    live: LiveSettings,
    actions: &SignalActions,
    manager: &ServiceManager,
) -> Result<()> {
    // The admin socket comes first: a second agent fails here, before it changes anything.
    let admin_socket = AdminSocket::bind(&config.admin_socket)?;
    // From here on, a signal stops the agent in order.
    let mut signals = StopSignals::watch()?;
    stop_deadline::enforce(link, config.drain_timeout)?;
    let haproxy_socket = HaproxySocket::bind(config)?;

    let (mut control, inputs) = Control::start(config, admin_socket, live);
    let state = Arc::clone(&control.state);
    actions.set_log_state(move || state_log::log(&*state));
    let progress = control.progress.clone();
    let starting = GuestService::start(config, link, &control, inputs, haproxy_socket);
    let started = tokio::select! {
        started = starting => started.map(Some),
        () = signals.received() => Ok(None),
        never = manager.report_start(&progress) => match never {},
    };
    let outcome = match started {
        Ok(Some(service)) => serve(config, &mut control, service, &mut signals, manager).await,
        Ok(None) => Ok(()),
        Err(error) => Err(error),
    };

    control.stop();
    let removed = teardown::remove_all(&config.bpffs_dir, &config.portal_namespace).await;
    control.end().await;
    outcome.and(removed)
}

/// Serves until a signal arrives or a critical task ends, and then drains.
async fn serve(
    config: &Config,
    control: &mut Control,
    service: GuestService,
    signals: &mut StopSignals,
    manager: &ServiceManager,
) -> Result<()> {
    drop(control.guest_interfaces.take());
    info!(host = config.host_name(), portal = config.portal_namespace, "serving");

    let (last_beat, stale_after) = (control.last_beat.clone(), config.heartbeat_stale_after);
    let readiness = control.readiness.clone();
    let notifying = async {
        manager.announce_ready(&readiness, &last_beat, stale_after).await;
        feed_watchdog(&last_beat, stale_after).await
    };
    let outcome = tokio::select! {
        () = signals.received() => Ok(()),
        name = control.critical.first_end() => {
            Err(anyhow!("{name} ended by itself; the agent cannot serve guests without it"))
        }
        never = notifying => match never {},
    };

    info!("stopping");
    manager.stopping();
    service.end(config.drain_timeout).await;
    outcome
}

fn log_notices(config: &Config) {
    for warning in config.warnings() {
        warn!("{warning}");
    }
    for notice in config.notices() {
        if notice.is_warning() { warn!("{notice}") } else { info!("{notice}") }
    }
}

/// Raises the soft limit of open files to the hard limit. Each guest connection takes one or two
/// descriptors, and the usual soft limit is 1024.
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        warn!(%error, "cannot raise the limit of open files");
    }
}

/// Two threads, so that a look-up that takes long does not delay the others.
fn link_runtime() -> Result<Runtime> {
    let mut builder = Builder::new_multi_thread();
    builder.worker_threads(2).enable_all().thread_name("md-link").build().context("start the link runtime")
}

fn control_runtime() -> Result<Runtime> {
    Builder::new_current_thread().enable_all().build().context("start the control runtime")
}

/// SIGTERM and SIGINT. While they are watched, they do not end the process.
struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignals {
    fn watch() -> Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate()).context("watch for SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).context("watch for SIGINT")?,
        })
    }

    async fn received(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
