//! Requests that the agent sends to itself through the datapath, to know that guests are served.
//!
//! A probe takes the way of a guest's request: `md_from_guest` on an interface of its own, the
//! portal, the listener, the proxy, and back through `md_to_guest`. The proxy answers it without
//! Nova. If a probe fails, the agent looks for the step at fault: what can be seen directly comes
//! first (the links, the program, the heartbeat), then how far the request got.

mod exchange;
mod prober;
mod reports;

pub(crate) use prober::Prober;
pub(crate) use reports::{ProbeReports, ProbeState};

/// A step of the way, in the order in which they are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ProbeStep {
    /// The pair of interfaces from which probes are sent.
    Link,
    /// The program on that interface.
    Program,
    /// The heartbeat, without which the program leaves packets to the host's own path.
    Heartbeat,
    /// The connection to the listener in the portal.
    Listener,
    /// A response of the proxy.
    Accept,
    /// The right response.
    Answer,
}

impl ProbeStep {
    pub(crate) const ALL: [Self; 6] =
        [Self::Link, Self::Program, Self::Heartbeat, Self::Listener, Self::Accept, Self::Answer];

    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Link => "link",
            Self::Program => "program",
            Self::Heartbeat => "heartbeat",
            Self::Listener => "listener",
            Self::Accept => "accept",
            Self::Answer => "answer",
        }
    }
}

/// The step at which a probe failed, and what was found there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {found}", step.label())]
pub(crate) struct ProbeError {
    pub(crate) step: ProbeStep,
    pub(crate) found: String,
}

impl ProbeError {
    fn new(step: ProbeStep, found: impl Into<String>) -> Self {
        Self { step, found: found.into() }
    }
}
