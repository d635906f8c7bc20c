//! Scans many namespaces for programs that were detached externally. The kernel reports nothing
//! when a TCX link is removed, and the query must run in the namespace of the interface.

use std::sync::Arc;
use std::time::Instant;

use metadata_ebpf::abi::names;

use super::programs::is_attached;
use crate::ids::IfIndex;
use crate::net::netns::{Netns, NetnsError};

/// The programs that a namespace should have: `md_from_guest` on each attached interface.
pub(crate) struct ExpectedPrograms {
    pub(super) netns: Arc<Netns>,
    pub(super) program: u32,
    pub(super) interfaces: Vec<(IfIndex, String)>,
}

/// Returns the interfaces that lack their program, for as many namespaces of `all` as the scan
/// reaches before `deadline`. An interface that cannot be queried counts as attached, because it is
/// being removed.
///
/// # Errors
/// The thread cannot be started, or may not enter a namespace.
pub(crate) fn find_detached(
    all: &[ExpectedPrograms],
    deadline: Instant,
) -> Result<Vec<Vec<IfIndex>>, NetnsError> {
    let detached = |expected: &ExpectedPrograms| {
        let is_detached = |(_, name): &&(IfIndex, String)| {
            is_attached(expected.program, names::FROM_GUEST, name).is_ok_and(|is_attached| !is_attached)
        };
        expected.interfaces.iter().filter(is_detached).map(|(index, _)| *index).collect()
    };
    let reached = all.iter().take_while(|_| Instant::now() < deadline);
    Netns::run_in_each(reached.map(|expected| (&*expected.netns, expected)), detached)
}
