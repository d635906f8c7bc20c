//! The veth pair through which the agent sends requests to itself.
//!
//! ```text
//!  host namespace                 namespace without a name
//!    md-probe  <---- veth ---->  md-guest   169.254.169.253/30
//!    [md_from_guest]
//! ```
//!
//! The namespace lives as long as the agent has it open. So after a crash the kernel removes it,
//! and the pair with it. The next agent makes its own and shares nothing with the former one.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;

use metadata_ebpf::identity::{METADATA_IPV4, METADATA_PORT};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::sync::watch;

use super::netlink::{Link, Netlink, NetlinkError, VethPair};
use super::netns::{Netns, NetnsError};
use crate::ids::{IfIndex, MacAddress};

/// Name of the host end.
pub(crate) const HOST_END: &str = "md-probe";
const GUEST_END: &str = "md-guest";

/// MAC address of the host end. An interface with this name and another MAC address is not ours,
/// and stays.
const HOST_MAC: MacAddress = MacAddress([0x02, 0x6d, 0x64, 0x70, 0x72, 0x00]);
/// MAC address of the other end.
pub(crate) const GUEST_MAC: MacAddress = MacAddress([0x02, 0x6d, 0x64, 0x70, 0x72, 0x01]);

/// Address of the other end, whose subnet contains the metadata address. So the first probe
/// resolves that address by ARP, as a guest does.
pub(crate) const GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 253);
const PREFIX: u8 = 30;

const MTU: u32 = 1500;

#[derive(Debug, thiserror::Error)]
pub(crate) enum ProbePairError {
    #[error(transparent)]
    Netns(#[from] NetnsError),
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// Other software uses the name.
    #[error("another interface has the name {HOST_END}")]
    NameTaken,
    /// A link of the pair is gone or was changed.
    #[error("{name} is gone or was changed")]
    Damaged { name: &'static str },
    /// A link of the pair is down.
    #[error("{name} is down")]
    Down { name: &'static str },
}

/// The pair, as its owner made it.
#[derive(Debug)]
pub(crate) struct ProbePair {
    netns: Arc<Netns>,
    inside: Netlink,
    host_end: IfIndex,
    guest_end: IfIndex,
}

impl ProbePair {
    /// Creates the pair, with both ends down. Removes a former one.
    ///
    /// # Errors
    /// Another interface has the name, or the kernel refuses.
    pub(crate) async fn create(host: &Netlink) -> Result<Self, ProbePairError> {
        Self::remove(host).await?;
        if host_end(host).await?.is_some() {
            return Err(ProbePairError::NameTaken);
        }
        let netns = Netns::unnamed("of the probe")?;
        let inside = Netlink::connect_in(&netns)?;
        let pair = VethPair {
            name: HOST_END,
            peer: GUEST_END,
            peer_netns: &netns,
            mtu: MTU,
            mac: Some(HOST_MAC),
            peer_mac: Some(GUEST_MAC),
        };
        host.add_veth(&pair).await?;
        let outer = host_end(host).await?.ok_or(ProbePairError::Damaged { name: HOST_END })?;
        let inner = inside.link(GUEST_END).await?.ok_or(ProbePairError::Damaged { name: GUEST_END })?;
        Ok(Self { netns: Arc::new(netns), inside, host_end: outer.index, guest_end: inner.index })
    }

    /// Brings up both ends.
    ///
    /// # Errors
    /// An end is gone, or the kernel refuses.
    pub(crate) async fn set_up(&self, host: &Netlink) -> Result<(), ProbePairError> {
        for (netlink, end) in [(host, self.host_end), (&self.inside, self.guest_end)] {
            netlink.disable_link_local(end).await?;
            netlink.set_up(end, MTU).await?;
        }
        Ok(self.inside.set_ipv4_address(self.guest_end, GUEST_ADDRESS, PREFIX).await?)
    }

    /// Checks that both ends are as they were made, and up.
    ///
    /// # Errors
    /// They are not.
    pub(crate) async fn check(&self, host: &Netlink) -> Result<(), ProbePairError> {
        let outer = host_end(host).await?.filter(|link| link.index == self.host_end && is_ours(link));
        let outer = outer.filter(|link| link.peer_index == Some(self.guest_end) && link.controller.is_none());
        let inner = self.inside.link(GUEST_END).await?;
        let inner = inner.filter(|link| link.index == self.guest_end && link.mac == Some(GUEST_MAC));
        for (name, link) in [(HOST_END, outer), (GUEST_END, inner)] {
            if !link.ok_or(ProbePairError::Damaged { name })?.up {
                return Err(ProbePairError::Down { name });
            }
        }
        Ok(())
    }

    pub(crate) fn host_end(&self) -> IfIndex {
        self.host_end
    }

    /// Returns a function that opens a TCP socket at the guest end. It blocks for the time of a
    /// system call.
    pub(crate) fn socket(&self) -> impl FnOnce() -> Result<io::Result<Socket>, NetnsError> + Send + use<> {
        let netns = Arc::clone(&self.netns);
        move || {
            netns.run(|| {
                let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
                socket.set_nonblocking(true)?;
                Ok(socket)
            })
        }
    }

    /// Deletes the pair, whatever was made of its ends.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) async fn delete(self) -> Result<(), ProbePairError> {
        // The other end may have another name or namespace by now.
        Ok(self.inside.delete_link(self.guest_end).await?)
    }

    /// Deletes the pair of a former agent, if it is there.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) async fn remove(host: &Netlink) -> Result<(), ProbePairError> {
        match host_end(host).await?.filter(is_ours) {
            Some(link) => Ok(host.delete_link(link.index).await?),
            None => Ok(()),
        }
    }
}

/// Returns the address that probes are sent to.
pub(crate) fn target() -> SocketAddrV4 {
    SocketAddrV4::new(METADATA_IPV4.into(), METADATA_PORT)
}

/// Finds the link with the name of the host end. A link that has it only as an alternative name is
/// another one.
async fn host_end(host: &Netlink) -> Result<Option<Link>, NetlinkError> {
    Ok(host.link(HOST_END).await?.filter(|link| link.name == HOST_END))
}

fn is_ours(link: &Link) -> bool {
    link.name == HOST_END && link.kind == "veth" && link.mac == Some(HOST_MAC)
}

/// The host end of the pair that is in use, for those that attach programs.
#[derive(Clone, Debug)]
pub(crate) struct ProbeInterface(watch::Receiver<Option<IfIndex>>);

impl ProbeInterface {
    /// Returns the interface, and its owner's side.
    pub(crate) fn channel() -> (watch::Sender<Option<IfIndex>>, Self) {
        let (sender, receiver) = watch::channel(None);
        (sender, Self(receiver))
    }

    /// Returns true for the host end that is in use. Neither the name nor the index suffices: the
    /// kernel may give either to another interface.
    pub(crate) fn is(&self, link: &Link) -> bool {
        *self.0.borrow() == Some(link.index) && is_ours(link)
    }

    /// Waits for another interface.
    pub(crate) async fn changed(&mut self) {
        if self.0.changed().await.is_err() {
            // There are no probes, or no more.
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, name: &str, mac: MacAddress) -> Link {
        Link {
            index: IfIndex(index),
            name: name.to_owned(),
            mac: Some(mac),
            kind: "veth".to_owned(),
            mtu: MTU,
            up: true,
            controller: None,
            peer_index: None,
            peer_nsid: None,
        }
    }

    #[test]
    fn only_the_host_end_in_use_is_the_agents() {
        let (sender, interface) = ProbeInterface::channel();
        let own = link(7, HOST_END, HOST_MAC);
        assert!(!interface.is(&own), "none is in use");
        sender.send_replace(Some(IfIndex(7)));
        assert!(interface.is(&own));
        let tun = Link { kind: "tun".to_owned(), ..own.clone() };
        let other_mac = link(7, HOST_END, GUEST_MAC);
        let others = [link(8, HOST_END, HOST_MAC), link(7, "tap1", HOST_MAC), other_mac, tun];
        for other in others {
            assert!(!interface.is(&other), "{other:?}");
        }
    }

    #[test]
    fn the_metadata_address_is_in_the_subnet_of_the_guest_end() {
        let network = |address: Ipv4Addr| u32::from(address) >> (32 - PREFIX);
        assert_eq!(network(GUEST_ADDRESS), network(*target().ip()));
    }
}
