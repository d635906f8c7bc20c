//! What agents have left in the kernel, for who removes it.

use std::path::Path;

use super::pins::Pins;
use super::{DatapathError, FilterRecord};
use crate::ids::IfIndex;

/// Everything that agents of whatever version have left under a pin directory, for who removes it.
#[derive(Debug)]
pub struct StaleState(Pins);

impl StaleState {
    /// `None` if there is no such directory on a BPF file system.
    ///
    /// # Errors
    /// An agent works there, or the directory cannot be read.
    pub fn find(pin_directory: &Path) -> Result<Option<Self>, DatapathError> {
        Ok(Pins::find(pin_directory)?.map(Self))
    }

    /// Filters, which no pin holds, and which are to be taken off apart.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn filters(&self) -> Result<Vec<FilterRecord>, DatapathError> {
        self.0.filters()
    }

    /// Forgets a filter that was taken off.
    ///
    /// # Errors
    /// The note of it cannot be removed.
    pub fn forget_filter(&self, index: IfIndex) -> Result<(), DatapathError> {
        self.0.forget_filter(index)
    }

    /// What there is of other network namespaces, by their inodes.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn in_namespaces(&self) -> Result<Vec<(u32, Self)>, DatapathError> {
        let of = |inode| Ok((inode, Self(Pins::of_netns(self.0.directory(), inode)?)));
        self.0.netns()?.into_iter().map(of).collect()
    }

    /// Takes every link off, and removes every pin and, if nothing is left there, the directory.
    ///
    /// # Errors
    /// A pin cannot be removed.
    pub fn remove(self) -> Result<(), DatapathError> {
        self.0.remove_all()
    }
}
