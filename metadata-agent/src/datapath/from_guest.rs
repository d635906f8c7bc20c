//! The program on guest interfaces of the host's namespace, for those that only look for it.

use metadata_ebpf::abi::names;

use super::programs::is_attached;
use super::{Datapath, DatapathError, Hook};

/// `md_from_guest` as it is loaded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FromGuestProgram {
    /// The kernel's id of the program.
    pub(crate) id: u32,
    pub(crate) hook: Hook,
}

impl FromGuestProgram {
    /// Returns true if the program is attached to an interface by TCX.
    ///
    /// # Errors
    /// The kernel refuses the query, for example because the interface is gone.
    pub(crate) fn is_attached_by_tcx(self, interface: &str) -> Result<bool, DatapathError> {
        is_attached(self.id, names::FROM_GUEST, interface)
    }
}

impl Datapath {
    /// Returns the program of guest interfaces.
    ///
    /// # Errors
    /// The object lacks the program.
    pub(crate) fn guest_program(&self) -> Result<FromGuestProgram, DatapathError> {
        Ok(FromGuestProgram { id: self.programs.id(names::FROM_GUEST)?, hook: self.hook() })
    }
}
