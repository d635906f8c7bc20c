//! The capabilities that the agent needs, and what for: asked for before anything is done, so that an error names what is
//! missing and not what failed for want of it.

use std::fmt;

use caps::{CapSet, Capability};

/// A capability and what it is for.
pub type Need = (Capability, &'static str);

/// `CAP_SYS_ADMIN` includes `CAP_BPF` and `CAP_PERFMON`, and network namespaces need it anyway.
const SYS_ADMIN: Need = (Capability::CAP_SYS_ADMIN, "network namespaces, BPF programs, maps and pins");
const NET_ADMIN: Need = (Capability::CAP_NET_ADMIN, "interfaces, routes and attaching programs");
const NET_BIND_SERVICE: Need = (Capability::CAP_NET_BIND_SERVICE, "port 80 in the portal");

/// What `run` needs.
pub const TO_RUN: [Need; 3] = [SYS_ADMIN, NET_ADMIN, NET_BIND_SERVICE];
/// What `detach` needs.
pub const TO_DETACH: [Need; 2] = [SYS_ADMIN, NET_ADMIN];

/// Capabilities that this process does not have.
#[derive(Debug, thiserror::Error)]
pub struct MissingRights(Vec<Need>);

impl fmt::Display for MissingRights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, (capability, purpose)) in self.0.iter().enumerate() {
            let separator = if position == 0 { "without " } else { ", without " };
            write!(f, "{separator}{capability} ({purpose})")?;
        }
        f.write_str("; run as root or grant what is missing")
    }
}

/// Whether all of them are in effect.
///
/// # Errors
/// Those that are not.
pub fn require(needs: &[Need]) -> Result<(), MissingRights> {
    require_of(needs, |capability| caps::has_cap(None, CapSet::Effective, capability).unwrap_or(false))
}

fn require_of(needs: &[Need], is_held: impl Fn(Capability) -> bool) -> Result<(), MissingRights> {
    let missing: Vec<Need> = needs.iter().copied().filter(|(capability, _)| !is_held(*capability)).collect();
    if missing.is_empty() { Ok(()) } else { Err(MissingRights(missing)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_is_missing_is_named_with_its_purpose() {
        let error = require_of(&TO_RUN, |capability| capability == Capability::CAP_SYS_ADMIN).unwrap_err();
        assert_eq!(
            error.to_string(),
            "without CAP_NET_ADMIN (interfaces, routes and attaching programs), without CAP_NET_BIND_SERVICE (port 80 \
             in the portal); run as root or grant what is missing"
        );
        assert!(require_of(&TO_RUN, |_| true).is_ok());
    }
}
