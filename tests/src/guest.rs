//! A guest: a namespace whose eth0 is the other end of a tap, and its raw HTTP to the metadata
//! service.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpStream};
use std::time::Duration;

use metadata_ebpf::identity::{METADATA_IPV4, METADATA_IPV6, METADATA_PORT};
use nix::net::if_::if_nametoindex;
use socket2::{Domain, Socket, Type};

use crate::http::{Connection, Response};
use crate::netns::Netns;
use crate::port::Port;
use crate::topology::{GuestSpec, Host, Network, NextHop};
use crate::wait::PATIENCE;

#[derive(Debug)]
pub struct Guest {
    pub port: Port,
    /// The host's end of its veth pair.
    pub tap: String,
    netns: Netns,
    host: Host,
}

impl Guest {
    pub(crate) fn plug(network: &Network, spec: GuestSpec) -> Self {
        let GuestSpec { port, next_hop, namespace } = spec;
        let tap = port.tap();
        let netns = namespace.map_or_else(|| Netns::new("guest"), |name| Netns::named(&name));
        let host = network.host();
        host.netns().ip(&format!(
            "link add {tap} type veth peer name eth0 address {mac} netns {guest}\n\
             link set {tap} master {bridge}\n\
             link set {tap} up",
            mac = port.mac,
            guest = netns.name(),
            bridge = network.bridge,
        ));
        netns.ip("link set eth0 up");
        if let Some(address) = port.ipv4() {
            let Network { prefix, gateway, gateway_mac, .. } = network;
            let metadata = Ipv4Addr::from(METADATA_IPV4);
            netns.ip(&format!("address add {address}/{prefix} dev eth0"));
            netns.ip(&match next_hop {
                NextHop::Gateway => format!(
                    "neighbour add {gateway} lladdr {gateway_mac} nud permanent dev eth0\n\
                     route add default via {gateway}\n\
                     route add {metadata} via {gateway}"
                ),
                NextHop::OnLink => format!("route add {metadata} dev eth0 scope link"),
            });
        }
        Self { port, tap, netns, host: host.clone() }
    }

    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Returns 169.254.169.254 as this guest reaches it.
    #[must_use]
    pub fn metadata_ipv4(&self) -> SocketAddr {
        (METADATA_IPV4, METADATA_PORT).into()
    }

    /// Returns fe80::a9fe:a9fe as this guest reaches it.
    #[must_use]
    pub fn metadata_ipv6(&self) -> SocketAddr {
        let scope = self.netns.enter(|| if_nametoindex("eth0"));
        let scope = scope.unwrap_or_else(|e| panic!("index of eth0 in {}: {e}", self.netns.name()));
        SocketAddrV6::new(Ipv6Addr::from(METADATA_IPV6), METADATA_PORT, 0, scope).into()
    }

    /// Returns the MAC address that the guest has resolved for an address.
    #[must_use]
    pub fn neighbour(&self, address: &str) -> Option<String> {
        let found = self.netns.run(&["ip", "neigh", "show", address, "dev", "eth0"]);
        Some(found.split_once("lladdr ")?.1.split(' ').next()?.to_owned())
    }

    /// Sends a GET request over IPv4 on a new connection.
    pub fn get(&self, path: &str) -> Response {
        self.try_get(path).unwrap_or_else(|e| panic!("{} gets {path}: {e}", self.netns.name()))
    }

    /// Sends a GET request over IPv4 on a new connection.
    ///
    /// # Errors
    /// Returns the error of the connection.
    pub fn try_get(&self, path: &str) -> io::Result<Response> {
        self.dial(self.metadata_ipv4(), None, PATIENCE)?.request("GET", path, &[("Connection", "close")], b"")
    }

    /// Sends a GET request over IPv6 on a new connection.
    pub fn get_v6(&self, path: &str) -> Response {
        self.connect_v6()
            .request("GET", path, &[("Connection", "close")], b"")
            .unwrap_or_else(|e| panic!("{} gets {path} over IPv6: {e}", self.netns.name()))
    }

    /// Sends a POST request over IPv4 on a new connection.
    pub fn post(&self, path: &str, body: &[u8]) -> Response {
        self.connect()
            .request("POST", path, &[("Connection", "close")], body)
            .unwrap_or_else(|e| panic!("{} posts to {path}: {e}", self.netns.name()))
    }

    pub fn connect(&self) -> Connection<TcpStream> {
        self.dial(self.metadata_ipv4(), None, PATIENCE)
            .unwrap_or_else(|e| panic!("{} connects: {e}", self.netns.name()))
    }

    pub fn connect_v6(&self) -> Connection<TcpStream> {
        self.dial(self.metadata_ipv6(), None, PATIENCE)
            .unwrap_or_else(|e| panic!("{} connects over IPv6: {e}", self.netns.name()))
    }

    /// Connects over IPv4 from this address and port.
    pub fn connect_from(&self, source: SocketAddr) -> Connection<TcpStream> {
        self.dial(self.metadata_ipv4(), Some(source), PATIENCE)
            .unwrap_or_else(|e| panic!("{} connects from {source}: {e}", self.netns.name()))
    }

    /// Connects to `to` within `patience`, from `source` if given. `patience` also bounds each read
    /// and write.
    ///
    /// # Errors
    /// Returns the error of the kernel, or `TimedOut` if there is no response.
    pub fn dial(
        &self,
        to: SocketAddr,
        source: Option<SocketAddr>,
        patience: Duration,
    ) -> io::Result<Connection<TcpStream>> {
        self.netns.enter(|| {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
            if let Some(source) = source {
                socket.set_reuse_address(true)?;
                socket.bind(&source.into())?;
            }
            socket.connect_timeout(&to.into(), patience)?;
            // Each write is its own segment, which tests of split requests rely on.
            socket.set_tcp_nodelay(true)?;
            socket.set_read_timeout(Some(patience))?;
            socket.set_write_timeout(Some(patience))?;
            Ok(Connection::new(TcpStream::from(socket)))
        })
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // The kernel removes a namespace asynchronously, but the host's end must be gone at once.
        let unplugged = self.host.netns().command("ip").args(["link", "del", &self.tap]).output();
        if let Err(e) = unplugged {
            eprintln!("unplug {}: {e}", self.tap);
        }
    }
}
