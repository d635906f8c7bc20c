//! Address resolution in the name of guests, when the agent stops.
//!
//! A guest that reaches the metadata address on its link has learned the programs' MAC address. It
//! would send there until its neighbour table gives the address up. A datagram to the identity
//! address of such a client becomes a request in its name (`metadata_ebpf::to_guest`), to which the
//! host's own path replies.

use std::io;
use std::net::{Ipv6Addr, SocketAddrV6};

use metadata_ebpf::identity::{ClientAddress, PORTAL_ADDRESS};
use metadata_ebpf::to_guest::QUERY_PAYLOAD_LEN;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::net::netns::{Netns, NetnsError};

/// Any port: nothing receives the datagram.
const PORT: u16 = 9;
/// `MSG_MORE` of linux/socket.h. The kernel computes the checksum of a datagram in pieces itself,
/// instead of leaving it to a device that would write it into the request.
const MSG_MORE: i32 = 0x8000;

#[derive(Debug, thiserror::Error)]
pub(crate) enum AddressQueryError {
    #[error(transparent)]
    Netns(#[from] NetnsError),
    #[error("cannot open a socket in the portal: {source}")]
    Open { source: io::Error },
}

/// Sends a query for each client, and returns how many were sent. Those whose interface has gone
/// have no route, or are dropped by the program.
///
/// # Errors
/// The portal cannot be entered.
pub(crate) fn send(portal_namespace: &str, clients: &[ClientAddress]) -> Result<usize, AddressQueryError> {
    let Some(portal) = Netns::named(portal_namespace)? else { return Ok(0) };
    let sent = portal.run(|| {
        let socket = open()?;
        Ok(clients.iter().filter(|client| query(&socket, client).is_ok()).count())
    })?;
    sent.map_err(|source| AddressQueryError::Open { source })
}

fn open() -> io::Result<Socket> {
    let socket = Socket::new(Domain::IPV6, Type::DGRAM, Some(Protocol::UDP))?;
    socket.bind(&address(PORTAL_ADDRESS, 0))?;
    Ok(socket)
}

fn query(socket: &Socket, client: &ClientAddress) -> io::Result<()> {
    let to = address(client.identity(), PORT);
    let payload = [0; QUERY_PAYLOAD_LEN as usize];
    let (first, last) = payload.split_at(payload.len() / 2);
    socket.send_to_with_flags(first, &to, MSG_MORE)?;
    socket.send_to(last, &to)?;
    Ok(())
}

fn address(ip: [u8; 16], port: u16) -> SockAddr {
    SocketAddrV6::new(Ipv6Addr::from(ip), port, 0, 0).into()
}
