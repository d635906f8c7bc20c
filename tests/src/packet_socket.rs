//! Frames of an interface, byte for byte: sent past a guest's own stack, or received.

use std::io::{ErrorKind, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, bind, socket};
use socket2::Socket;

use crate::netns::Netns;
use crate::wait::PATIENCE;

/// Longer than any frame with segmentation offload.
pub(crate) const LARGEST: usize = 128 * 1024;

/// A packet socket on one interface.
#[derive(Debug)]
pub struct PacketSocket {
    socket: Socket,
    name: String,
}

impl PacketSocket {
    /// Opens a socket, which keeps frames from now on.
    #[must_use]
    pub fn open(netns: &Netns, interface: &str) -> Self {
        Self::with_protocol(netns, interface, Some(SockProtocol::EthAll))
    }

    /// Opens a socket that only sends.
    #[must_use]
    pub fn for_sending(netns: &Netns, interface: &str) -> Self {
        Self::with_protocol(netns, interface, None)
    }

    fn with_protocol(netns: &Netns, interface: &str, protocol: Option<SockProtocol>) -> Self {
        let name = format!("{interface} in {}", netns.name());
        let socket = netns.enter(|| {
            let link = link_address(interface).unwrap_or_else(|| panic!("no {name}"));
            let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)
                .unwrap_or_else(|e| panic!("a packet socket for {name}: {e}"));
            // The address does not name a protocol, so the socket keeps its own, or none.
            bind(socket.as_raw_fd(), &link).unwrap_or_else(|e| panic!("bind to {name}: {e}"));
            Socket::from(socket)
        });
        socket
            .set_read_timeout(Some(Duration::from_millis(50)))
            .unwrap_or_else(|e| panic!("time out on {name}: {e}"));
        Self { socket, name }
    }

    /// Sends a frame unchanged.
    pub fn send(&self, frame: &[u8]) {
        let sent = (&self.socket).write(frame).unwrap_or_else(|e| panic!("send on {}: {e}", self.name));
        assert_eq!(sent, frame.len(), "send on {}", self.name);
    }

    /// Sends a frame unless the device is out of room.
    pub fn send_if_room(&self, frame: &[u8]) {
        if let Err(e) = (&self.socket).write(frame) {
            let is_full = e.raw_os_error() == Some(Errno::ENOBUFS as i32);
            assert!(is_full, "send on {}: {e}", self.name);
        }
    }

    /// Reads one frame in either direction. Returns its length, or `None` if none arrives for 50
    /// ms.
    pub(crate) fn receive(&self, frame: &mut [u8]) -> Option<usize> {
        match (&self.socket).read(frame) {
            Ok(length) => Some(length),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => None,
            Err(e) => panic!("read from {}: {e}", self.name),
        }
    }

    /// Reads frames in either direction until `pick` returns a value for one. The kernel delivers
    /// VLAN-tagged frames without the tag.
    pub fn wait_for<T>(&self, what: &str, mut pick: impl FnMut(&[u8]) -> Option<T>) -> T {
        let end = Instant::now() + PATIENCE;
        let mut frame = vec![0; LARGEST];
        while Instant::now() < end {
            if let Some(found) = self.receive(&mut frame).and_then(|length| pick(&frame[..length])) {
                return found;
            }
        }
        panic!("no {what} after {PATIENCE:?} on {}", self.name)
    }
}

/// Returns the packet-socket address of an interface in the calling thread's namespace.
fn link_address(interface: &str) -> Option<LinkAddr> {
    let addresses = getifaddrs().unwrap_or_else(|e| panic!("list addresses: {e}"));
    addresses
        .filter(|address| address.interface_name == interface)
        .find_map(|address| address.address?.as_link_addr().copied())
}
