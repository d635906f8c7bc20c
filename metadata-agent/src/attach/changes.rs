//! Input and result of a reconcile: links as they were observed, and the interfaces that changed.

use std::collections::BTreeSet;

use crate::ids::IfIndex;
use crate::net::netlink::Link;

/// Links as they were just observed.
#[derive(Debug)]
pub(crate) enum Links {
    /// All links of the namespace. An interface that is not among them is gone.
    All(Vec<Link>),
    /// Some links, while the others did not change.
    Some { present: Vec<Link>, gone: Vec<IfIndex> },
}

impl Links {
    /// Links that appeared or changed.
    pub(crate) fn present(present: Vec<Link>) -> Self {
        Self::Some { present, gone: Vec::new() }
    }
}

/// The interfaces that a reconcile changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use]
pub(crate) struct Changes {
    pub(crate) attached: BTreeSet<IfIndex>,
    /// Detached, or no longer listed in presence.
    pub(crate) detached: BTreeSet<IfIndex>,
    /// Known by another name, owner, network or presence.
    pub(crate) updated: BTreeSet<IfIndex>,
}

impl Changes {
    pub(super) fn is_empty(&self) -> bool {
        self.attached.is_empty() && self.detached.is_empty() && self.updated.is_empty()
    }

    pub(super) fn interfaces(&self) -> BTreeSet<IfIndex> {
        self.attached.iter().chain(&self.detached).chain(&self.updated).copied().collect()
    }

    pub(super) fn extend(&mut self, other: Self) {
        self.attached.extend(other.attached);
        self.detached.extend(other.detached);
        self.updated.extend(other.updated);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_of_a_long_reconcile_add_up() {
        let (mut all, mut later) = (Changes::default(), Changes::default());
        assert!(all.is_empty());
        all.attached.insert(IfIndex(3));
        later.updated.insert(IfIndex(3));
        later.detached.insert(IfIndex(4));
        all.extend(later);
        assert!(!all.is_empty());
        assert_eq!(all.attached, [IfIndex(3)].into());
        assert_eq!(all.interfaces(), [IfIndex(3), IfIndex(4)].into(), "each is published once");
    }
}
