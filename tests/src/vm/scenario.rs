//! What guests do, whoever answers at 169.254.169.254. Who answers decides what must come of it, and compares.

use std::net::Ipv4Addr;

use anyhow::Result;

use super::{Answer, CloudReport, CloudVm, Dhcp, Lease, Nic, Offloads, Place, Route, SmallVm};

/// What [`small_vm_transfer`] asks for.
#[derive(Clone, Copy, Debug)]
pub struct Transfer<'a> {
    /// The path that takes the body.
    pub upload: &'a str,
    /// How many bytes of [`super::numbered_lines`] the body has.
    pub upload_length: usize,
    /// The path that gives one.
    pub download: &'a str,
}

/// What came back, and how.
#[derive(Clone, Debug)]
pub struct Transferred {
    /// What the guest's driver took of the offloads that it was offered.
    pub offloads: Offloads,
    /// The answer to the POST.
    pub upload: Answer,
    /// The answer to the GET.
    pub download: Answer,
}

/// A small guest sends a body and fetches one.
///
/// # Errors
/// When the guest does not come up or gets no whole answer.
pub fn small_vm_transfer(
    place: Place<'_>,
    nic: &Nic<'_>,
    address: (Ipv4Addr, u8),
    route: Route,
    transfer: &Transfer<'_>,
) -> Result<Transferred> {
    let mut guest = SmallVm::boot(place, nic, address, route)?;
    let offloads = guest.offloads()?;
    let upload = guest.post(transfer.upload, transfer.upload_length)?;
    let download = guest.get(transfer.download)?;
    Ok(Transferred { offloads, upload, download })
}

/// A guest with cloud-init boots with a lease from a DHCP server on `interface` at `dhcp`.
///
/// # Errors
/// When the guest does not power off in time with a whole report. A report that tells of a failure is a report.
pub fn cloud_init_boot(
    guest: Place<'_>,
    nic: &Nic<'_>,
    dhcp: Place<'_>,
    interface: &str,
    lease: &Lease,
) -> Result<CloudReport> {
    let _dhcp = Dhcp::serve(dhcp, interface, lease)?;
    CloudVm::start(guest, nic)?.report()
}
