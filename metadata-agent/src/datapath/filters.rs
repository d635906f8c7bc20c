//! The notes of filters and of qdiscs, which no pin holds.

use super::pins::FilterRecord;
use super::{Datapath, DatapathError};
use crate::ids::IfIndex;

impl Datapath {
    /// Notes a qdisc on an interface as ours, before it is made, or after all as not ours.
    ///
    /// # Errors
    /// The note cannot be made or removed.
    pub fn set_qdisc_owned(&self, index: IfIndex, owned: bool) -> Result<(), DatapathError> {
        if owned {
            self.pins.record_filter(FilterRecord { index, owns_qdisc: true })
        } else {
            self.pins.disown_qdisc(index)
        }
    }

    /// The filters that this agent or an earlier one has made.
    ///
    /// # Errors
    /// The pin directory cannot be read.
    pub fn filters(&self) -> Result<Vec<FilterRecord>, DatapathError> {
        self.pins.filters()
    }

    /// The filter on one interface.
    #[must_use]
    pub fn filter(&self, index: IfIndex) -> Option<FilterRecord> {
        self.pins.filter(index)
    }

    /// Forgets a filter that was taken off.
    ///
    /// # Errors
    /// The note of it cannot be removed.
    pub fn forget_filter(&self, index: IfIndex) -> Result<(), DatapathError> {
        self.pins.forget_filter(index)
    }
}
