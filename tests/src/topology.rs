//! A hypervisor in a namespace: networks are bridges, guests hang on them by taps, as Neutron plugs them.
//!
//! ```text
//! guest namespace        host namespace                      legacy namespace (optional)
//!   eth0 ------------- tapXXXXXXXXXXX --- brqXXXXXXXXXXX --- eth0  the gateway, and 169.254.169.254
//! ```
//!
//! Every network has the CIDR 10.0.0.0/24 unless told otherwise, so guests of two networks share addresses.

use std::io;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;

use metadata_agent::ids::{MacAddress, NetworkId};
use tempfile::TempDir;
use uuid::Uuid;

use crate::bpffs::Bpffs;
use crate::guest::Guest;
use crate::legacy::Legacy;
use crate::netns::Netns;
use crate::port::Port;

/// Where hosts with a name have their folder.
pub(crate) const RUN: &str = "/run";
/// The BPF file system in a host's folder.
pub(crate) const BPFFS: &str = "bpf";

/// The hypervisor: its namespace, and a BPF file system for what an agent pins there.
#[derive(Debug, Clone)]
pub struct Host {
    parts: Arc<Parts>,
}

/// In the order they go: the file system is unmounted before its folder is removed.
#[derive(Debug)]
struct Parts {
    netns: Netns,
    bpffs: Bpffs,
    folder: TempDir,
}

impl Host {
    /// A host with nothing on it.
    #[must_use]
    pub fn new() -> Self {
        Self::with(Netns::new("host"), tempfile::Builder::new().prefix("metadata-host-").tempdir())
    }

    /// A host under a name for people, which is also the name of its folder under `/run`. See
    /// [`leftovers`](crate::leftovers) for one that could not clean up.
    #[must_use]
    pub fn named(name: &str) -> Self {
        Self::with(Netns::named(name), tempfile::Builder::new().prefix(name).rand_bytes(0).tempdir_in(RUN))
    }

    fn with(netns: Netns, folder: io::Result<TempDir>) -> Self {
        let folder = folder.unwrap_or_else(|e| panic!("make the folder of host {}: {e}", netns.name()));
        let bpffs = Bpffs::mount(&folder.path().join(BPFFS));
        Self { parts: Arc::new(Parts { netns, bpffs, folder }) }
    }

    /// Its namespace.
    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.parts.netns
    }

    /// Its BPF file system.
    #[must_use]
    pub fn bpffs(&self) -> &Path {
        self.parts.bpffs.path()
    }

    /// A folder for files that go with it.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.parts.folder.path()
    }

    /// A new network, 10.0.0.0/24 with the gateway 10.0.0.1.
    #[must_use]
    pub fn network(&self) -> Network {
        self.network_at(Ipv4Addr::new(10, 0, 0, 1), 24)
    }

    /// A new network around this gateway.
    #[must_use]
    pub fn network_at(&self, gateway: Ipv4Addr, prefix: u8) -> Network {
        let id = Uuid::new_v4();
        let bridge = format!("brq{}", &id.to_string()[..11]);
        // Without snooping the bridge floods multicast, so neighbour discovery needs no querier.
        self.netns().ip(&format!("link add {bridge} type bridge mcast_snooping 0\nlink set {bridge} up"));
        let [a, b, c, ..] = *id.as_bytes();
        Network {
            host: self.clone(),
            id: NetworkId::new(id),
            bridge,
            gateway,
            gateway_mac: MacAddress([0xfa, 0x16, 0x3f, a, b, c]),
            prefix,
        }
    }

    /// A persistent tap device, up, for whoever opens it by name.
    pub fn tap(&self, name: &str) {
        self.netns().ip(&format!("tuntap add dev {name} mode tap\nlink set {name} up"));
    }
}

impl Default for Host {
    fn default() -> Self {
        Self::new()
    }
}

/// How a guest's packets for 169.254.169.254 find their way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NextHop {
    /// By a host route via the gateway, whose MAC address is known (DHCP option 121).
    Gateway,
    /// On the link: the guest asks for the MAC address by ARP.
    OnLink,
}

/// A guest to be plugged.
#[derive(Clone, Debug)]
pub struct GuestSpec {
    /// Who it is.
    pub port: Port,
    /// Its way to the metadata service.
    pub next_hop: NextHop,
    /// The name of its namespace; made up when absent.
    pub namespace: Option<String>,
}

/// One tenant network on the host.
#[derive(Clone, Debug)]
pub struct Network {
    host: Host,
    /// Neutron's id of it.
    pub id: NetworkId,
    /// The bridge in the host's namespace.
    pub bridge: String,
    /// The gateway's address.
    pub gateway: Ipv4Addr,
    /// The gateway's MAC address.
    pub gateway_mac: MacAddress,
    /// Length of the prefix.
    pub prefix: u8,
}

impl Network {
    /// The host it is on.
    #[must_use]
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Plugs a new guest with this address, which asks its gateway for metadata.
    #[must_use]
    pub fn guest(&self, address: impl Into<Ipv4Addr>) -> Guest {
        self.plug(self.spec(address))
    }

    /// What [`Self::guest`] plugs, to be changed first.
    #[must_use]
    pub fn spec(&self, address: impl Into<Ipv4Addr>) -> GuestSpec {
        GuestSpec { port: Port::new(self.id, address.into()), next_hop: NextHop::Gateway, namespace: None }
    }

    /// Plugs a guest.
    #[must_use]
    pub fn plug(&self, spec: GuestSpec) -> Guest {
        Guest::plug(self, spec)
    }

    /// Makes an interface of the host a port of this network's bridge.
    pub fn enslave(&self, interface: &str) {
        self.host.netns().ip(&format!("link set {interface} master {}", self.bridge));
    }

    /// Starts the legacy path of this network.
    #[must_use]
    pub fn legacy(&self) -> Legacy {
        Legacy::start(self)
    }
}
