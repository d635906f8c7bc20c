//! Keeps secrets in the process, and privileges from growing, however it is started.
//!
//! The configuration, its environment variables and the answers on their way to guests are in
//! memory. A core dump would write them to a file, or hand them to a crash reporter.

use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};

/// The kernel refuses one of the restrictions.
#[derive(Debug, thiserror::Error)]
#[error("cannot {restriction}: {source}")]
pub(crate) struct HardeningError {
    restriction: &'static str,
    source: Errno,
}

/// Restricts this process for the rest of its life.
///
/// # Errors
/// The kernel refuses a restriction.
pub(crate) fn restrict_process() -> Result<(), HardeningError> {
    let failed = |restriction| move |source| HardeningError { restriction, source };
    // The limit alone does not stop dumps that the kernel pipes to a program (core(5)). A process
    // that is not dumpable has none, and cannot be traced by others of the same user. It can still
    // read all of its own /proc/self.
    prctl::set_dumpable(false).map_err(failed("forbid core dumps"))?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(failed("set the size limit of core dumps"))?;
    // Kubernetes cannot set it for a container with CAP_SYS_ADMIN. The agent executes no program.
    prctl::set_no_new_privs().map_err(failed("set no_new_privs"))
}
