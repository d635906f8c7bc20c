//! The one meaning of "ready", for `/ready`, `status` and systemd: the start is complete. What was
//! on the host has been attached, and every source has reported what it knows.
//!
//! A part of the start that was once finished stays so. Later errors are in the state and in the
//! metrics. But an agent is not ready while damage from outside is not repaired, or while its own
//! requests through the datapath fail.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::data_path_probe::ProbeReports;
use crate::net::damage::DamageReports;
use crate::sources::SourceState;

/// The start-up steps, sources, repairs and probes that readiness depends on.
#[derive(Clone, Debug)]
pub(crate) struct Readiness {
    startup: Startup,
    sources: Vec<watch::Receiver<SourceState>>,
    damage: DamageReports,
    probes: ProbeReports,
}

impl Readiness {
    pub(crate) fn new(
        startup: Startup,
        sources: Vec<watch::Receiver<SourceState>>,
        damage: DamageReports,
        probes: ProbeReports,
    ) -> Self {
        Self { startup, sources, damage, probes }
    }

    /// Returns the reports of damage.
    pub(crate) fn damage(&self) -> &DamageReports {
        &self.damage
    }

    /// Returns the reports of probes.
    pub(crate) fn probes(&self) -> &ProbeReports {
        &self.probes
    }

    /// Returns what is not finished. The agent is ready if that is nothing.
    pub(crate) fn waiting_for(&self) -> Vec<String> {
        let sources = self.sources.iter().map(|source| source.borrow());
        let waiting =
            sources.filter(|source| !source.ready).map(|source| format!("source {}", source.source));
        let repairs = self.damage.unrepaired();
        let probes = self.probes.waiting_for();
        self.startup.unfinished().into_iter().chain(waiting).chain(repairs).chain(probes).collect()
    }
}

/// Start-up steps that are not finished.
#[derive(Clone, Debug, Default)]
pub(crate) struct Startup(Arc<Mutex<Vec<&'static str>>>);

/// A step that readiness waits for until this guard is dropped.
#[derive(Debug)]
pub(crate) struct StartupStep {
    name: &'static str,
    startup: Startup,
}

impl Startup {
    /// Adds a step. Readiness waits until the returned guard is dropped.
    #[must_use]
    pub(crate) fn step(&self, name: &'static str) -> StartupStep {
        self.lock().push(name);
        StartupStep { name, startup: self.clone() }
    }

    fn unfinished(&self) -> Vec<String> {
        self.lock().iter().map(ToString::to_string).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<&'static str>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for StartupStep {
    fn drop(&mut self) {
        self.startup.lock().retain(|other| *other != self.name);
    }
}
