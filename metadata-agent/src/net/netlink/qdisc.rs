//! Qdiscs with an ingress hook, and the filters on it.

use futures_util::TryStreamExt;
use netlink_packet_route::tc::{TcAttribute, TcFilterBpfOption, TcHandle, TcMessage, TcOption};
use nix::errno::Errno;

use super::error::{absent_is_fine, errno, refused};
use super::{Netlink, NetlinkError};
use crate::ids::IfIndex;

impl Netlink {
    /// Gives a link an `ingress` qdisc. `false` if it has a qdisc with an ingress hook already, of whatever kind.
    ///
    /// `ingress`, and not the newer `clsact`: Open vSwitch, libvirt and Neutron all delete the `ingress` qdisc, if any, before
    /// they make theirs, and fail where they find one that is not called so.
    ///
    /// # Errors
    /// The link is gone, or the kernel refuses otherwise.
    pub async fn add_ingress_qdisc(&self, index: IfIndex) -> Result<bool, NetlinkError> {
        match self.handle.qdisc().add(index.0.cast_signed()).ingress().execute().await {
            Ok(()) => Ok(true),
            Err(error) if errno(&error) == Some(Errno::EEXIST) => Ok(false),
            Err(source) => Err(refused("add an ingress qdisc to link", index, source)),
        }
    }

    /// The ids of the BPF programs in the ingress filters of a link.
    ///
    /// # Errors
    /// The kernel refuses the dump.
    pub async fn filter_programs(&self, index: IfIndex) -> Result<Vec<u32>, NetlinkError> {
        let dump = self.handle.traffic_filter(index.0.cast_signed()).get().ingress().execute();
        let filters: Result<Vec<TcMessage>, _> = dump.try_collect().await;
        let filters = filters.map_err(|source| refused("list filters of", index, source))?;
        Ok(filters.iter().filter_map(program_of).collect())
    }

    /// Whether a link has filters on ingress or egress.
    ///
    /// # Errors
    /// The kernel refuses the dump.
    pub async fn has_filters(&self, index: IfIndex) -> Result<bool, NetlinkError> {
        let at = || self.handle.traffic_filter(index.0.cast_signed()).get();
        for request in [at().ingress(), at().egress()] {
            let filters: Result<Vec<TcMessage>, _> = request.execute().try_collect().await;
            if !filters.map_err(|source| refused("list filters of", index, source))?.is_empty() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Removes the qdisc with the ingress hook of a link, `ingress` or `clsact`, and every filter on it; fine if it, or the
    /// link, is gone.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn delete_ingress_qdisc(&self, index: IfIndex) -> Result<(), NetlinkError> {
        let mut request = self.handle.qdisc().del(index.0.cast_signed());
        request.message_mut().header.parent = TcHandle::CLSACT;
        request.message_mut().header.handle = TcHandle { major: 0xffff, minor: 0 };
        absent_is_fine(request.execute().await)
            .map_err(|source| refused("delete the ingress qdisc of link", index, source))
    }
}

pub(super) fn has_ingress_hook(qdisc: &TcMessage) -> bool {
    let hooks =
        |part: &TcAttribute| matches!(part, TcAttribute::Kind(kind) if kind == "clsact" || kind == "ingress");
    qdisc.attributes.iter().any(hooks)
}

/// The id of the BPF program that a filter runs.
fn program_of(filter: &TcMessage) -> Option<u32> {
    filter.attributes.iter().find_map(|part| {
        let TcAttribute::Options(options) = part else { return None };
        options.iter().find_map(|option| {
            if let TcOption::Bpf(TcFilterBpfOption::ProgId(id)) = option { Some(*id) } else { None }
        })
    })
}
