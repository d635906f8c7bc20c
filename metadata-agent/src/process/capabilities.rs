//! Capabilities that the agent needs. They are checked before anything else, so that an error names
//! the missing capability instead of the step that failed without it.

use std::fmt;

use caps::{CapSet, Capability};

/// A capability and its purpose.
pub type CapabilityNeed = (Capability, &'static str);

/// `CAP_SYS_ADMIN` includes `CAP_BPF` and `CAP_PERFMON`. Network namespaces need it anyway.
const SYS_ADMIN: CapabilityNeed =
    (Capability::CAP_SYS_ADMIN, "network namespaces, BPF programs, maps and pins");
const NET_ADMIN: CapabilityNeed = (Capability::CAP_NET_ADMIN, "interfaces, routes and attaching programs");
const NET_BIND_SERVICE: CapabilityNeed = (Capability::CAP_NET_BIND_SERVICE, "port 80 in the portal");

const SETUID: CapabilityNeed = (Capability::CAP_SETUID, "the data plane's own user");
const SETGID: CapabilityNeed = (Capability::CAP_SETGID, "the data plane's own group");

/// Capabilities for `run`. The data plane gives all of them up.
pub const TO_RUN: [CapabilityNeed; 5] = [SYS_ADMIN, NET_ADMIN, NET_BIND_SERVICE, SETUID, SETGID];
/// Capabilities for `detach`.
pub(crate) const TO_DETACH: [CapabilityNeed; 2] = [SYS_ADMIN, NET_ADMIN];

/// Capabilities that this process lacks.
#[derive(Debug, thiserror::Error)]
pub(crate) struct MissingCapabilitiesError(Vec<CapabilityNeed>);

impl fmt::Display for MissingCapabilitiesError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, (capability, purpose)) in self.0.iter().enumerate() {
            let separator = if position == 0 { "without " } else { ", without " };
            write!(f, "{separator}{capability} ({purpose})")?;
        }
        f.write_str("; run as root or grant what is missing")
    }
}

/// Requires capabilities to be effective.
///
/// # Errors
/// Names those that are missing.
pub(crate) fn require(needs: &[CapabilityNeed]) -> Result<(), MissingCapabilitiesError> {
    require_of(needs, |capability| caps::has_cap(None, CapSet::Effective, capability).unwrap_or(false))
}

fn require_of(
    needs: &[CapabilityNeed],
    is_held: impl Fn(Capability) -> bool,
) -> Result<(), MissingCapabilitiesError> {
    let missing: Vec<CapabilityNeed> =
        needs.iter().copied().filter(|(capability, _)| !is_held(*capability)).collect();
    if missing.is_empty() { Ok(()) } else { Err(MissingCapabilitiesError(missing)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_missing_capability_is_named_with_its_purpose() {
        let error = require_of(&TO_RUN, |capability| capability == Capability::CAP_SYS_ADMIN).unwrap_err();
        assert_eq!(
            error.to_string(),
            "without CAP_NET_ADMIN (interfaces, routes and attaching programs), without CAP_NET_BIND_SERVICE (port 80 \
             in the portal), without CAP_SETUID (the data plane's own user), without CAP_SETGID (the data plane's own \
             group); run as root or grant what is missing"
        );
        assert!(require_of(&TO_RUN, |_| true).is_ok());
    }
}
