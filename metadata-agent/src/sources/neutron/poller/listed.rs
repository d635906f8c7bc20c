//! Ids of the ports that Neutron listed for this host. Nothing else of them is kept, because it may
//! be out of date when an interface appears.

use std::collections::BTreeSet;

use crate::ids::PortId;
use crate::inventory::DeviceName;

/// Ids in the last response about the whole host.
#[derive(Debug, Default)]
pub(super) struct ListedPorts(BTreeSet<PortId>);

impl ListedPorts {
    pub(super) fn new(ids: BTreeSet<PortId>) -> Self {
        Self(ids)
    }

    /// Returns the ports whose tap has this name.
    pub(super) fn at(&self, device: &DeviceName) -> Vec<PortId> {
        let bound = |rest| -> Option<PortId> {
            format!("{}{rest}", device.as_str().strip_prefix("tap")?).parse().ok()
        };
        let (first, last) = (bound("00-0000-0000-000000000000"), bound("ff-ffff-ffff-ffffffffffff"));
        let range = first.zip(last).map(|(first, last)| self.0.range(first..=last));
        range.into_iter().flatten().copied().collect()
    }
}
