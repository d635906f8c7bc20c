//! Real guests: qemu on a tap of the rig's host, plugged into a network as by Nova. KVM is not
//! used: in a virtual machine, `/dev/kvm` may exist although a guest with it does not start.
//!
//! * [`SmallVm`]: a kernel and busybox, up in two seconds, which runs shell text and fetches paths.
//! * [`CloudVm`]: Debian with cloud-init, which boots, reports its configuration and powers off.
//! * [`Dhcp`]: provides the address and the route of the latter.
//! * [`KernelUnderTest`]: another kernel, which runs a test program inside.
//! * [`domain_xml`]: libvirt's file of a guest.
//!
//! Guests do not know which service responds at 169.254.169.254. Everything here blocks; async code
//! must call it on a blocking thread. Every wait has a deadline, every process ends with its owner,
//! and errors contain the guest's console output.

mod cloud;
mod cpio;
pub(crate) mod debian;
mod dhcp;
mod domain;
mod guest;
pub(crate) mod hex;
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
/// Returns an error if a package cannot be downloaded, or a tool is missing or fails.
pub fn prepare() -> anyhow::Result<()> {
    guest::Kernel::prepare()?;
    cloud::root_image()?;
    Ok(())
}
