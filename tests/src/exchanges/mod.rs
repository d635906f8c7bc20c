//! A fuzzer for whole HTTP exchanges between guests and Nova, through the real agent, and through
//! Neutron's haproxies if there are any.
//!
//! Each guest has a secret [`Mark`], which stands in every request that it sends, and in no
//! request of another guest. The stand-in for Nova is the [`oracle`]: it reports a request whose
//! mark and instance do not belong together, and its answers name their instance and the mark of
//! the request. The [`player`] reports answers that are not the guest's own, or not in order.
//!
//! An [`Exchange`] is one connection of a guest or a haproxy. The [`generator`] makes valid ones,
//! whose answers are known, and mutated ones. Those that found a fault, and those that are
//! interesting by construction, are in the [`corpus`].

use std::fmt;

pub mod corpus;
pub mod fuzzer;
pub mod generator;
pub mod leaks;
pub mod oracle;
pub mod player;
mod received;
mod reduction;
mod worker;

/// A text that only one guest knows.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Mark(String);

impl Mark {
    #[must_use]
    pub fn new() -> Self {
        Self(format!("m{}", uuid::Uuid::new_v4().simple()))
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for Mark {
    fn default() -> Self {
        Self::new()
    }
}

/// One connection, from its start to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exchange {
    pub steps: Vec<Step>,
    pub ending: Ending,
    /// The answers in order, if they are known.
    pub expected: Option<Vec<Expected>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Sends bytes, in a segment of their own.
    Send(Vec<u8>),
    /// Reads one more of the expected answers.
    Receive,
}

/// The way in which a player ends its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Closes its sending side and reads to the end.
    Finish,
    /// Reads to the end without closing.
    Wait,
    /// Closes without reading.
    Abandon,
    /// Resets the connection.
    Reset,
}

/// An answer that is due.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    /// The request is HEAD, so that no body follows.
    pub is_head: bool,
    pub answer: ExpectedAnswer,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExpectedAnswer {
    /// Nova's, to the request with this target.
    Nova { target: String },
    /// The agent's own, with this status.
    Agent { status: u16 },
}

/// Something that must never happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation(pub String);

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Returns whether `text` contains `wanted`.
fn contains(text: &[u8], wanted: &str) -> bool {
    text.windows(wanted.len()).any(|window| window == wanted.as_bytes())
}
