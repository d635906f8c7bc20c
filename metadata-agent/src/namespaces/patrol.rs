//! Looks for TCX links that were detached externally, in many namespaces at once.
//!
//! The kernel does not report them, and a query must run in the namespace of the interface. One
//! thread goes from namespace to namespace, for a short turn at a time.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::watched::{NamespaceError, WatchedNamespace};
use crate::datapath;
use crate::ids::IfIndex;

/// The time for one patrol.
const TURN: Duration = Duration::from_millis(20);

/// The result of one patrol.
pub(super) struct Patrol {
    /// The interfaces that lack their program, by namespace.
    pub(super) missing: Vec<(Arc<str>, Vec<IfIndex>)>,
    /// The last namespace that was visited, unless it was the last one of all.
    pub(super) last: Option<Arc<str>>,
}

/// Visits the namespaces after `last`, the last one of the patrol before.
pub(super) fn patrol(
    watched: &BTreeMap<Arc<str>, WatchedNamespace>,
    last: Option<&Arc<str>>,
) -> Result<Patrol, NamespaceError> {
    let after = last.map_or(Bound::Unbounded, Bound::Excluded);
    let (mut names, mut expected) = (Vec::new(), Vec::new());
    for (name, namespace) in watched.range::<Arc<str>, _>((after, Bound::Unbounded)) {
        let Some(attacher) = &namespace.attacher else { continue };
        if let Some(programs) = attacher.expected_programs()? {
            names.push(Arc::clone(name));
            expected.push(programs);
        }
    }
    let found = datapath::find_detached(&expected, Instant::now() + TURN)?;
    let is_complete = found.len() == names.len();
    let last = if is_complete { None } else { names[..found.len()].last().or(last).cloned() };
    let missing = names.into_iter().zip(found).filter(|(_, missing)| !missing.is_empty()).collect();
    Ok(Patrol { missing, last })
}
