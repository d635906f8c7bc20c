//! The task that sends probes, and finds the step at which one failed.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use metadata_ebpf::identity::{AttachmentId, ClientAddress};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::exchange::exchange;
use super::reports::{ProbeSuccess, Transition};
use super::{ProbeError, ProbeReports, ProbeStep};
use crate::data_plane::LastBeat;
use crate::datapath::{FromGuestProgram, Hook};
use crate::directory::Directory;
use crate::ids::IfIndex;
use crate::net::damage::DamageReports;
use crate::net::netlink::Netlink;
use crate::net::probe_pair::{self, ProbePair, ProbePairError};
use crate::process::blocking::blocking;
use crate::proxy::{ClientDirectory as _, expected_body};

/// The pause after a probe that failed.
const RETRY: Duration = Duration::from_secs(1);
/// Time for the owner of the datapath to attach to a new pair.
const ATTACH: Duration = Duration::from_secs(2);

/// The task that sends probes.
pub(crate) struct Prober {
    pub(crate) interval: Duration,
    pub(crate) host: Netlink,
    /// The interface for the owner of the datapath.
    pub(crate) interface: watch::Sender<Option<IfIndex>>,
    pub(crate) directory: Arc<Directory>,
    pub(crate) program: FromGuestProgram,
    pub(crate) last_beat: LastBeat,
    pub(crate) stale_after: Duration,
    pub(crate) damage: DamageReports,
    pub(crate) reports: ProbeReports,
}

impl Prober {
    /// Sends probes until cancelled. Then removes the pair.
    pub(crate) async fn run(self, cancel: CancellationToken) {
        let mut pair = None;
        let _cancelled = cancel.run_until_cancelled(self.repeat(&mut pair)).await;
        let removed = match pair.take() {
            Some(pair) => pair.delete().await,
            None => ProbePair::remove(&self.host).await,
        };
        if let Err(error) = removed {
            warn!(%error, "cannot remove the probe's interfaces");
        }
    }

    async fn repeat(&self, pair: &mut Option<ProbePair>) {
        loop {
            let outcome = self.probe(pair).await;
            // Whatever is wrong with the pair, another one may help.
            if let Err(ProbeError { step: ProbeStep::Link, .. }) = &outcome
                && let Some(pair) = pair.take()
                && let Err(error) = pair.delete().await
            {
                debug!(%error, "cannot remove the probe's interfaces");
            }
            let pause = if outcome.is_ok() { self.interval } else { RETRY.min(self.interval) };
            self.report(outcome);
            sleep(pause).await;
        }
    }

    fn report(&self, outcome: Result<ProbeSuccess, ProbeError>) {
        let error = outcome.as_ref().err().cloned();
        if let Some(error) = &error {
            debug!(%error, "data path probe failed");
        }
        match (self.reports.record(outcome), error) {
            (Transition::Failed, Some(ProbeError { step, found })) => {
                warn!(step = step.label(), found, "data path probes fail; not ready");
            }
            (Transition::Recovered, _) => info!("data path probes are answered again"),
            (Transition::None | Transition::Failed, _) => {}
        }
    }

    /// Sends one probe, and creates its pair if there is none.
    async fn probe(&self, pair: &mut Option<ProbePair>) -> Result<ProbeSuccess, ProbeError> {
        let pair = match pair {
            Some(pair) => pair,
            None => pair.insert(self.create_pair().await.map_err(|error| link_error(&error))?),
        };
        pair.check(&self.host).await.map_err(|error| link_error(&error))?;
        let attachment = self.attachment(pair.host_end()).await?;
        let began = Instant::now();
        match send(pair, attachment).await {
            Ok(()) => Ok(ProbeSuccess { at: Instant::now(), time: SystemTime::now(), took: began.elapsed() }),
            Err(error) => Err(self.fault(pair).await.unwrap_or(error)),
        }
    }

    async fn create_pair(&self) -> Result<ProbePair, ProbePairError> {
        let pair = ProbePair::create(&self.host).await?;
        self.interface.send_replace(Some(pair.host_end()));
        pair.set_up(&self.host).await?;
        Ok(pair)
    }

    /// Waits until the program is attached to this interface as the agent's own. A probe that is
    /// sent earlier would count as an unknown guest's.
    async fn attachment(&self, index: IfIndex) -> Result<AttachmentId, ProbeError> {
        let mut changes = self.directory.clients().changes();
        let attached = async {
            loop {
                changes.borrow_and_update();
                if let Some((id, found)) = self.directory.agent()
                    && found == index
                {
                    return Some(id);
                }
                changes.changed().await.ok()?;
            }
        };
        let attached = timeout(ATTACH, attached).await.ok().flatten();
        self.directory.clients().copied_within(ATTACH).await;
        attached.ok_or_else(|| ProbeError::new(ProbeStep::Program, "not attached yet"))
    }

    /// Looks for what keeps a probe from the listener, if that can be seen directly.
    async fn fault(&self, pair: &ProbePair) -> Option<ProbeError> {
        if let Err(error) = pair.check(&self.host).await {
            return Some(link_error(&error));
        }
        match self.is_attached(pair.host_end()).await {
            Ok(true) => {}
            Ok(false) => return Some(ProbeError::new(ProbeStep::Program, "detached externally")),
            Err(found) => return Some(ProbeError::new(ProbeStep::Program, found)),
        }
        if self.damage.stops_traffic() {
            return Some(ProbeError::new(ProbeStep::Heartbeat, "stopped because of damage"));
        }
        if !self.last_beat.is_within(self.stale_after) {
            return Some(ProbeError::new(ProbeStep::Heartbeat, "stale"));
        }
        None
    }

    async fn is_attached(&self, index: IfIndex) -> Result<bool, String> {
        match self.program.hook {
            Hook::Tcx => {
                self.program.is_attached_by_tcx(probe_pair::HOST_END).map_err(|error| error.to_string())
            }
            Hook::Clsact => match self.host.filter_programs(index).await {
                Ok(programs) => Ok(programs.contains(&self.program.id)),
                Err(error) => Err(error.to_string()),
            },
        }
    }
}

/// Sends a request from the guest end. The response must name the connection as the programs should
/// have translated it.
async fn send(pair: &ProbePair, attachment: AttachmentId) -> Result<(), ProbeError> {
    let socket = match blocking(pair.socket()).await {
        Some(Ok(Ok(socket))) => Ok(socket),
        Some(Ok(Err(error))) => Err(error.to_string()),
        Some(Err(error)) => Err(error.to_string()),
        None => Err("the agent is stopping".to_owned()),
    };
    let socket = socket.map_err(|found| ProbeError::new(ProbeStep::Link, found))?;
    let client =
        ClientAddress::from_ipv4(attachment, probe_pair::GUEST_ADDRESS.octets(), probe_pair::GUEST_MAC.0);
    exchange(socket, probe_pair::target().into(), &expected_body(&client)).await
}

fn link_error(error: &ProbePairError) -> ProbeError {
    ProbeError::new(ProbeStep::Link, error.to_string())
}
