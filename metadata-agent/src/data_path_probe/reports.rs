//! The outcomes of probes, for `/ready`, `status` and the metrics.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use super::ProbeError;

/// Probes in a row that must fail before an agent that was ready is not. One failure may be a lost
/// packet or a busy host.
const FAILURES: u32 = 3;

/// A handle for the prober, which reports, and for those that show the reports.
#[derive(Clone, Debug, Default)]
pub(crate) struct ProbeReports(Option<Arc<Mutex<ProbeState>>>);

/// All that is known of probes.
#[derive(Clone, Debug, Default)]
pub(crate) struct ProbeState {
    pub(crate) last_success: Option<ProbeSuccess>,
    /// The error of the last probe.
    pub(crate) error: Option<ProbeError>,
    /// Probes that failed since the last success.
    pub(crate) failures: u32,
}

/// A probe that was answered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ProbeSuccess {
    pub(crate) at: Instant,
    pub(crate) time: SystemTime,
    pub(crate) took: Duration,
}

/// A change that readers see after a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transition {
    None,
    Failed,
    Recovered,
}

impl ProbeState {
    /// Returns the error while it keeps the agent from being ready.
    pub(crate) fn failing(&self) -> Option<&ProbeError> {
        self.error.as_ref().filter(|_| self.last_success.is_none() || self.failures >= FAILURES)
    }

    fn record(&mut self, outcome: Result<ProbeSuccess, ProbeError>) -> Transition {
        match outcome {
            Ok(success) => {
                let was_reported = self.failures >= FAILURES;
                *self = Self { last_success: Some(success), error: None, failures: 0 };
                if was_reported { Transition::Recovered } else { Transition::None }
            }
            Err(error) => {
                self.error = Some(error);
                self.failures = self.failures.saturating_add(1);
                if self.failures == FAILURES { Transition::Failed } else { Transition::None }
            }
        }
    }
}

impl ProbeReports {
    /// Reports of an agent that sends probes. The default is one that does not.
    pub(crate) fn enabled() -> Self {
        Self(Some(Arc::default()))
    }

    pub(super) fn record(&self, outcome: Result<ProbeSuccess, ProbeError>) -> Transition {
        self.lock().map_or(Transition::None, |mut state| state.record(outcome))
    }

    /// Returns all that is known; `None` if no probes are sent.
    pub(crate) fn state(&self) -> Option<ProbeState> {
        self.lock().map(|state| state.clone())
    }

    /// Returns what readiness waits for.
    pub(crate) fn waiting_for(&self) -> Option<String> {
        let state = self.lock()?;
        match (state.failing(), state.last_success) {
            (Some(error), _) => Some(format!("data path: {error}")),
            (None, None) => Some("data path".to_owned()),
            (None, Some(_)) => None,
        }
    }

    fn lock(&self) -> Option<MutexGuard<'_, ProbeState>> {
        self.0.as_ref().map(|state| state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data_path_probe::ProbeStep;

    fn success() -> ProbeSuccess {
        ProbeSuccess { at: Instant::now(), time: SystemTime::now(), took: Duration::ZERO }
    }

    fn failure() -> ProbeError {
        ProbeError::new(ProbeStep::Listener, "timed out")
    }

    #[test]
    fn readiness_waits_for_the_first_success() {
        let reports = ProbeReports::enabled();
        assert_eq!(reports.waiting_for().as_deref(), Some("data path"));
        reports.record(Err(failure()));
        assert_eq!(reports.waiting_for().as_deref(), Some("data path: listener: timed out"));
        reports.record(Ok(success()));
        assert_eq!(reports.waiting_for(), None);
    }

    #[test]
    fn readiness_falls_at_the_third_failure_in_a_row() {
        let reports = ProbeReports::enabled();
        reports.record(Ok(success()));
        for _ in 1..FAILURES {
            assert_eq!(reports.record(Err(failure())), Transition::None);
            assert_eq!(reports.waiting_for(), None);
        }
        reports.record(Ok(success()));
        for _ in 1..FAILURES {
            assert_eq!(reports.record(Err(failure())), Transition::None);
        }
        assert_eq!(reports.record(Err(failure())), Transition::Failed);
        assert_eq!(reports.record(Err(failure())), Transition::None, "it is logged once");
        assert_eq!(reports.waiting_for().as_deref(), Some("data path: listener: timed out"));
        assert_eq!(reports.record(Ok(success())), Transition::Recovered);
        assert_eq!(reports.waiting_for(), None);
    }

    #[test]
    fn an_agent_without_probes_does_not_wait_for_them() {
        let reports = ProbeReports::default();
        reports.record(Err(failure()));
        assert!(reports.waiting_for().is_none() && reports.state().is_none());
    }
}
