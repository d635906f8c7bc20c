//! Failures of single interfaces: logged when they are new, and kept for `status` until the step
//! succeeds.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use arc_swap::ArcSwap;
use tracing::warn;

use crate::ids::IfIndex;

/// The last error of an interface or of a namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub interface: String,
    pub error: String,
}

/// The failures of one namespace, as `status` reads them.
pub(crate) type Failures = Arc<ArcSwap<Vec<Failure>>>;

/// A step that can fail for one interface while the other steps succeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Step {
    Attach,
    SetPolicy,
    AttachSubport,
    /// The interface is in more subnets than the program checks.
    FitSubnets,
    Reattach,
    RestorePins,
    Remove,
}

impl Step {
    /// Returns whether another reconcile of the interface repeats the step.
    ///
    /// Reattaching has its own schedule, and too many subnets stay too many.
    fn is_reconciled(self) -> bool {
        match self {
            Self::Attach | Self::SetPolicy | Self::AttachSubport => true,
            Self::FitSubnets | Self::Reattach | Self::RestorePins | Self::Remove => false,
        }
    }
}

/// The failures of one namespace, by interface and step.
#[derive(Debug, Default)]
pub(super) struct FailureTable {
    failures: BTreeMap<(IfIndex, Step), Failure>,
    published: Failures,
    is_stale: bool,
}

impl FailureTable {
    /// Records an error, and logs it unless it is the same as the last time.
    pub(super) fn record(
        &mut self,
        namespace: Option<&str>,
        (index, interface): (IfIndex, &str),
        step: Step,
        error: String,
    ) {
        let failure = Failure { interface: interface.to_owned(), error };
        if self.failures.get(&(index, step)) == Some(&failure) {
            return;
        }
        let error = &failure.error;
        match step {
            Step::Attach => warn!(namespace, interface, error, "cannot attach to guest interface; retrying"),
            Step::SetPolicy => warn!(namespace, interface, error, "cannot set the port policy; retrying"),
            Step::AttachSubport => {
                warn!(namespace, interface, error, "cannot attach trunk subport; retrying");
            }
            Step::FitSubnets => warn!(namespace, interface, error, "some subnets are not served"),
            Step::Reattach => warn!(namespace, interface, error, "cannot reattach BPF program; retrying"),
            Step::RestorePins => warn!(namespace, interface, error, "cannot restore pins; retrying"),
            Step::Remove => warn!(namespace, interface, error, "cannot remove attachment state; retrying"),
        }
        self.failures.insert((index, step), failure);
        self.is_stale = true;
    }

    pub(super) fn clear(&mut self, index: IfIndex, step: Step) {
        self.is_stale |= self.failures.remove(&(index, step)).is_some();
    }

    /// Clears all failures of an interface that is gone or not to be attached, except that its
    /// state could not be removed.
    pub(super) fn clear_interface(&mut self, index: IfIndex) {
        let steps = (index, Step::Attach)..(index, Step::Remove);
        while let Some(key) = self.failures.range(steps.clone()).next().map(|(key, _)| *key) {
            self.failures.remove(&key);
            self.is_stale = true;
        }
    }

    /// Returns the interfaces that another reconcile may help.
    pub(super) fn to_reconcile(&self) -> BTreeSet<IfIndex> {
        self.failures.keys().filter(|(_, step)| step.is_reconciled()).map(|(index, _)| *index).collect()
    }

    /// Returns the interfaces whose state could not be removed.
    pub(super) fn to_remove(&self) -> Vec<IfIndex> {
        self.failures.keys().filter(|(_, step)| *step == Step::Remove).map(|(index, _)| *index).collect()
    }

    /// Publishes the failures if they changed since the last call.
    pub(super) fn publish(&mut self) {
        if std::mem::take(&mut self.is_stale) {
            self.published.store(Arc::new(self.failures.values().cloned().collect()));
        }
    }

    /// Returns a handle that follows the published failures.
    pub(super) fn handle(&self) -> Failures {
        Arc::clone(&self.published)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn published(table: &FailureTable) -> Vec<(String, String)> {
        let failures = table.handle().load_full();
        failures.iter().map(|failure| (failure.interface.clone(), failure.error.clone())).collect()
    }

    fn pair(interface: &str, error: &str) -> (String, String) {
        (interface.to_owned(), error.to_owned())
    }

    #[test]
    fn failures_stay_published_until_their_step_succeeds() {
        let mut table = FailureTable::default();
        table.record(None, (IfIndex(3), "tap3"), Step::Attach, "busy".to_owned());
        assert!(published(&table).is_empty(), "not before they are published");
        table.publish();
        assert_eq!(published(&table), [pair("tap3", "busy")]);
        table.clear(IfIndex(3), Step::Reattach);
        table.publish();
        assert_eq!(published(&table), [pair("tap3", "busy")], "another step says nothing");
        table.clear(IfIndex(3), Step::Attach);
        table.publish();
        assert!(published(&table).is_empty());
    }

    #[test]
    fn reattach_errors_of_a_namespace_are_published_too() {
        let mut table = FailureTable::default();
        table.record(Some("qrouter-1"), (IfIndex(2), "qr-1"), Step::Reattach, "file exists".to_owned());
        table.publish();
        assert_eq!(published(&table), [pair("qr-1", "file exists")]);
        assert!(table.to_reconcile().is_empty(), "reattaching has its own schedule");
    }

    #[test]
    fn failures_go_with_their_interface_except_what_is_left() {
        let mut table = FailureTable::default();
        for (index, step) in [(2, Step::Remove), (3, Step::Attach), (3, Step::Remove), (4, Step::SetPolicy)] {
            table.record(None, (IfIndex(index), "tap"), step, "no".to_owned());
        }
        assert_eq!(table.to_reconcile(), [3, 4].map(IfIndex).into());
        table.clear_interface(IfIndex(3));
        assert_eq!(table.to_reconcile(), [IfIndex(4)].into());
        assert_eq!(
            table.to_remove(),
            [2, 3].map(IfIndex),
            "what is left in the kernel is still to be removed"
        );
    }
}
