//! Takes filters of ours off guests' interfaces, and their qdisc where it is ours and nobody else has come to use it. Everything else on the interface stays.

use metadata_ebpf::abi::names;

use crate::datapath::{self, DatapathError, FilterMark};
use crate::ids::IfIndex;
use crate::netlink::{Link, Netlink, NetlinkError};

/// Why something stays behind.
#[derive(Debug, thiserror::Error)]
pub enum ClassifierError {
    /// The filter.
    #[error(transparent)]
    Filter(#[from] DatapathError),
    /// The qdisc.
    #[error(transparent)]
    Qdisc(#[from] NetlinkError),
}

/// `links` are those of the host now; an interface that is not among them took its qdisc along.
///
/// # Errors
/// The kernel refuses. To be tried again: nothing is forgotten here.
pub async fn take_off(netlink: &Netlink, links: &[Link], mark: FilterMark) -> Result<(), ClassifierError> {
    let Some(link) = links.iter().find(|link| link.index == mark.index) else {
        return Ok(());
    };
    let had_filter = datapath::remove_filter(&link.name, names::FROM_GUEST)?;
    // Our qdisc went with our filter if that was not there: what is there now is somebody else's.
    if had_filter && mark.owns_qdisc {
        delete_unused_qdisc(netlink, mark.index).await?;
    }
    Ok(())
}

/// Removes a qdisc of ours unless somebody else has a filter on it.
///
/// # Errors
/// The kernel refuses.
pub async fn delete_unused_qdisc(netlink: &Netlink, index: IfIndex) -> Result<(), NetlinkError> {
    if !netlink.has_filters(index).await? {
        netlink.delete_ingress_qdisc(index).await?;
    }
    Ok(())
}
