//! Ingress qdiscs: creates them, records that they are ours, and gives them back.
//!
//! A filter needs a qdisc with an ingress hook. If there is none, we create it and record so
//! before. We delete it with our filter, unless another filter uses it by then. Everything else on
//! the interface stays.

use metadata_ebpf::abi::names;

use crate::datapath::{self, Datapath, DatapathError, FilterRecord, FilterRemoval};
use crate::ids::IfIndex;
use crate::net::netlink::{IngressQdisc, Link, Netlink, NetlinkError};
use crate::net::netns::{Netns, NetnsError};

/// A failure to create or remove a qdisc or the filter on it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QdiscError {
    #[error(transparent)]
    Datapath(#[from] DatapathError),
    #[error(transparent)]
    Netns(#[from] NetnsError),
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
}

/// Ensures that an interface has a qdisc with an ingress hook. A new one is recorded as ours before
/// it is created.
///
/// `netlink` is a socket in the namespace of `datapath`.
///
/// # Errors
/// The kernel refuses, or the record cannot be written.
pub(super) async fn ensure(
    netlink: &Netlink,
    datapath: &Datapath,
    index: IfIndex,
) -> Result<IngressQdisc, QdiscError> {
    let recorded = datapath.filter(index);
    datapath.set_qdisc_owned(index, true)?;
    let created = netlink.add_ingress_qdisc(index).await;
    // Undo the record if the qdisc is not new.
    match (&created, recorded) {
        (Ok(IngressQdisc::Created), _) => {}
        (Err(_), None) => datapath.forget_filter(index)?,
        (_, recorded) => datapath.set_qdisc_owned(index, recorded.is_some_and(|filter| filter.owns_qdisc))?,
    }
    Ok(created?)
}

/// Removes our filter from a guest interface, and the qdisc under it if it is ours and unused.
///
/// `netlink` is a socket in the namespace of the interface, and `netns` is that namespace unless it
/// is the host's. An interface that is not among `links`, the current links there, took its qdisc
/// along. The record of the filter stays, so that the caller can try again.
///
/// # Errors
/// The kernel refuses, or the namespace cannot be entered.
pub(crate) async fn remove_filter(
    netlink: &Netlink,
    netns: Option<&Netns>,
    links: &[Link],
    filter: FilterRecord,
) -> Result<(), QdiscError> {
    let Some(link) = links.iter().find(|link| link.index == filter.index) else {
        return Ok(());
    };
    let remove = || datapath::remove_filter(&link.name, names::FROM_GUEST);
    let removal = match netns {
        Some(netns) => netns.run(remove)??,
        None => remove()?,
    };
    // Without our filter, our qdisc is gone as well: the one that is there now belongs to another
    // program.
    if removal == FilterRemoval::Removed && filter.owns_qdisc {
        delete_unused(netlink, filter.index).await?;
    }
    Ok(())
}

/// Deletes a qdisc of ours, unless it has a filter of another program.
///
/// # Errors
/// The kernel refuses.
pub(super) async fn delete_unused(netlink: &Netlink, index: IfIndex) -> Result<(), NetlinkError> {
    if !netlink.has_filters(index).await? {
        netlink.delete_ingress_qdisc(index).await?;
    }
    Ok(())
}
