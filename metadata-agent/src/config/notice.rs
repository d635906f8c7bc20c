//! What becomes of an option that somebody set and that has not the effect it has in Neutron.

use std::fmt;

use serde::Serialize;

use super::setting::Origin;

/// An option that somebody set, and what becomes of it.
#[derive(Clone, Debug, Serialize)]
pub struct Notice {
    /// The section.
    pub group: &'static str,
    /// The option, or `*` for all of the section.
    pub name: &'static str,
    /// Where it is set.
    pub origin: Origin,
    /// What becomes of it.
    #[serde(flatten)]
    pub effect: Effect,
}

/// What becomes of an option.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "effect")]
pub enum Effect {
    /// It has no effect, because what it was for is not there.
    None {
        /// What it was for.
        reason: &'static str,
    },
    /// It is read but not obeyed yet.
    NotYet {
        /// What is missing.
        reason: &'static str,
    },
    /// It is obeyed, to the harm of guests.
    Harms {
        /// How.
        reason: &'static str,
    },
    /// Neutron removed it; another one has its meaning.
    Replaced {
        /// The other one.
        by: &'static str,
    },
    /// Its value stands for one of ours, whose bounds are narrower.
    Fitted {
        /// Ours.
        key: &'static str,
        /// What ours became.
        value: String,
    },
}

impl Notice {
    /// Whether an operator should change something.
    #[must_use]
    pub fn is_warning(&self) -> bool {
        match self.effect {
            Effect::NotYet { .. } | Effect::Harms { .. } | Effect::Replaced { .. } => true,
            Effect::None { .. } | Effect::Fitted { .. } => false,
        }
    }
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}] {} ({}) ", self.group, self.name, self.origin)?;
        match &self.effect {
            Effect::None { reason } => write!(f, "has no effect: {reason}"),
            Effect::NotYet { reason } => write!(f, "is not obeyed yet: {reason}"),
            Effect::Harms { reason } => write!(f, "harms guests: {reason}"),
            Effect::Replaced { by } => write!(f, "was removed from Neutron and has no effect; set {by}"),
            Effect::Fitted { key, value } => write!(f, "stands for {key}, which becomes {value}"),
        }
    }
}
