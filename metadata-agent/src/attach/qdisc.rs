//! Takes filters of ours off guests' interfaces, and their qdisc where it is ours and nobody else has come to use it. Everything
//! else on the interface stays. And makes the qdisc, noted as ours.

use metadata_ebpf::abi::names;

use crate::datapath::{self, Datapath, DatapathError, FilterRecord};
use crate::ids::IfIndex;
use crate::net::netlink::{Link, Netlink, NetlinkError};
use crate::net::netns::{Netns, NetnsError};

/// Why something stays behind.
#[derive(Debug, thiserror::Error)]
pub enum ClassifierError {
    /// The filter.
    #[error(transparent)]
    Filter(#[from] DatapathError),
    /// The namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The qdisc.
    #[error(transparent)]
    Qdisc(#[from] NetlinkError),
}

/// `links` are those of the host now; an interface that is not among them took its qdisc along.
///
/// # Errors
/// The kernel refuses. To be tried again: nothing is forgotten here.
pub async fn take_off(netlink: &Netlink, links: &[Link], mark: FilterRecord) -> Result<(), ClassifierError> {
    take_off_by(netlink, links, mark, |link| Ok(datapath::remove_filter(link, names::FROM_GUEST)?)).await
}

/// The same in another namespace, of which `netlink` is a socket and `links` are the links.
///
/// # Errors
/// As [`take_off`], or the namespace cannot be entered.
pub async fn take_off_in(
    netns: &Netns,
    netlink: &Netlink,
    links: &[Link],
    mark: FilterRecord,
) -> Result<(), ClassifierError> {
    let remove = |link: &str| Ok(netns.run(|| datapath::remove_filter(link, names::FROM_GUEST))??);
    take_off_by(netlink, links, mark, remove).await
}

async fn take_off_by(
    netlink: &Netlink,
    links: &[Link],
    mark: FilterRecord,
    remove: impl FnOnce(&str) -> Result<bool, ClassifierError>,
) -> Result<(), ClassifierError> {
    let Some(link) = links.iter().find(|link| link.index == mark.index) else {
        return Ok(());
    };
    let had_filter = remove(&link.name)?;
    // Our qdisc went with our filter if that was not there: what is there now is somebody else's.
    if had_filter && mark.owns_qdisc {
        delete_unused_qdisc(netlink, mark.index).await?;
    }
    Ok(())
}

/// Gives an interface a qdisc with an ingress hook where it has none. Whether it was made: then it is ours, and noted before.
/// `netlink` is a socket of the namespace that `datapath` is of.
///
/// # Errors
/// The kernel refuses, or the note cannot be made.
pub async fn provide_qdisc(
    netlink: &Netlink,
    datapath: &Datapath,
    index: IfIndex,
) -> Result<bool, ClassifierError> {
    let noted = datapath.filter(index);
    datapath.set_qdisc_owned(index, true)?;
    let made = netlink.add_ingress_qdisc(index).await;
    match (&made, noted) {
        (Ok(true), _) => {}
        (Err(_), None) => datapath.forget_filter(index)?,
        (_, noted) => datapath.set_qdisc_owned(index, noted.is_some_and(|mark| mark.owns_qdisc))?,
    }
    Ok(made?)
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
