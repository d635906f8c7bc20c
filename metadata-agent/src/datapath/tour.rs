//! A look for programs in many namespaces at once. The kernel tells nobody of a TCX link that is taken off, and whoever asks
//! must be where the interface is.

use std::sync::Arc;
use std::time::Instant;

use metadata_ebpf::abi::names;

use super::hook::{Hook, is_on};
use super::place::Place;
use super::{Datapath, DatapathError};
use crate::ids::IfIndex;
use crate::net::netns::{Netns, NetnsError};

/// What is to be found in a namespace: `md_from_guest` on its attached interfaces.
#[derive(Debug)]
pub struct ExpectedPrograms {
    netns: Arc<Netns>,
    program: u32,
    interfaces: Vec<(IfIndex, String)>,
}

impl Datapath {
    /// What [`find_detached`] shall find; `None` of the host's own namespace, and where programs are filters.
    ///
    /// # Errors
    /// The object lacks the program.
    pub fn expected_programs(&self) -> Result<Option<ExpectedPrograms>, DatapathError> {
        let Place::Netns { netns, .. } = &self.place else { return Ok(None) };
        if self.hook() != Hook::Tcx {
            return Ok(None);
        }
        let interface =
            |(index, attachment): (&IfIndex, &super::Attachment)| (*index, attachment.interface.clone());
        Ok(Some(ExpectedPrograms {
            netns: Arc::clone(netns),
            program: self.programs.id(names::FROM_GUEST)?,
            interfaces: self.attachments.iter().map(interface).collect(),
        }))
    }
}

/// The interfaces that lack their program, for each of `all` to which it comes until then. One that cannot be asked, as it is
/// going, lacks nothing.
///
/// # Errors
/// No thread is to be had, or it may not enter namespaces.
pub fn find_detached(all: &[ExpectedPrograms], until: Instant) -> Result<Vec<Vec<IfIndex>>, NetnsError> {
    let missing = |expected: &ExpectedPrograms| {
        let is_missing = |(_, name): &&(IfIndex, String)| {
            is_on(expected.program, names::FROM_GUEST, name).is_ok_and(|is_on| !is_on)
        };
        expected.interfaces.iter().filter(is_missing).map(|(index, _)| *index).collect()
    };
    let stops = all.iter().take_while(|_| Instant::now() < until);
    Netns::run_in_each(stops.map(|expected| (&*expected.netns, expected)), missing)
}
