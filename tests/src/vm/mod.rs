//! Real guests: qemu without KVM, on a tap of the rig's host, plugged into a network as Nova plugs one.
//!
//! * [`SmallVm`]: a kernel and busybox, up in two seconds, which runs shell text and fetches paths on request.
//! * [`CloudVm`]: Debian with cloud-init, which boots once, reports what it took from the metadata service and
//!   powers off.
//! * [`Dhcp`]: what gives the latter its address and its route.
//! * [`KernelUnderTest`]: another kernel, which runs a test program inside.
//! * [`domain_xml`]: what libvirt would write about one.
//!
//! Guests know nothing of who answers at 169.254.169.254. Everything here blocks; from async code, call it on a
//! blocking thread. Every wait has a deadline, every process ends with its owner, and what the guest said on its
//! console is part of every error.

pub(crate) mod cache;
mod cloud;
mod cpio;
pub(crate) mod debian;
mod dhcp;
mod domain;
mod guest;
mod hex;
mod kernels;
mod qemu;
mod small;

pub use cloud::{CloudReport, CloudVm};
pub use dhcp::Dhcp;
pub use domain::domain_xml;
pub use kernels::KernelUnderTest;
pub use qemu::Offloads;
pub use small::{Answer, SmallVm, numbered_lines};

/// Builds the images of both kinds of guest, so that no test spends its deadline on it.
///
/// # Errors
/// When a package cannot be had or a tool is missing or fails.
pub fn prepare() -> anyhow::Result<()> {
    guest::Kernel::prepare()?;
    cloud::root_image()?;
    Ok(())
}
