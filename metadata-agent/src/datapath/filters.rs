//! Filters and the qdiscs under them, where the kernel has no TCX. The kernel holds a filter until
//! a program removes it, so each has a record beside the pins.

use std::path::Path;

use metadata_ebpf::abi::names;

use super::pins::{FilterRecord, Pins};
use super::programs::{FilterRemoval, Programs, remove_filter};
use super::{Datapath, DatapathError};
use crate::ids::IfIndex;

impl Datapath {
    /// Records that the qdisc on an interface is ours, before it is created, or that it is not
    /// ours.
    ///
    /// # Errors
    /// The record cannot be created or removed.
    pub(crate) fn set_qdisc_owned(&self, index: IfIndex, owned: bool) -> Result<(), DatapathError> {
        if owned {
            self.pins.record_filter(FilterRecord { index, owns_qdisc: true })
        } else {
            self.pins.disown_qdisc(index)
        }
    }

    /// Returns the filters that this agent or an earlier one created.
    ///
    /// # Errors
    /// The pin directory cannot be read.
    pub(crate) fn filters(&self) -> Result<Vec<FilterRecord>, DatapathError> {
        self.pins.filters()
    }

    /// Returns the filter on one interface.
    pub(crate) fn filter(&self, index: IfIndex) -> Option<FilterRecord> {
        self.pins.filter(index)
    }

    /// Removes the record of a filter after the filter was removed.
    ///
    /// # Errors
    /// The record cannot be removed.
    pub(crate) fn forget_filter(&self, index: IfIndex) -> Result<(), DatapathError> {
        self.pins.forget_filter(index)
    }
}

/// Attaches the program as a filter. The filter is recorded first, so after a crash at any point
/// the next agent knows what to remove.
pub(super) fn attach_filter(
    programs: &mut Programs,
    pins: &Pins,
    index: IfIndex,
    interface: &str,
    made_qdisc: bool,
    pin: &Path,
) -> Result<(), DatapathError> {
    pins.record_filter(FilterRecord { index, owns_qdisc: made_qdisc })?;
    // An agent of another ABI may have left its filter at the same priority and handle. It is
    // removed by its name and not replaced, because the filter there may belong to another program.
    let removal = remove_filter(interface, names::FROM_GUEST)?;
    // If our qdisc was deleted externally, our filter went with it: without the filter, the qdisc
    // that is there now belongs to another program.
    if !made_qdisc && removal == FilterRemoval::Absent {
        pins.disown_qdisc(index)?;
    }
    programs.attach_from_guest(interface, index, pin)
}
