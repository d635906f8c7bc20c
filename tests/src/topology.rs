//! A hypervisor in a namespace. Its networks are bridges, and guests are plugged into them with
//! taps, as by Neutron.
//!
//! ```text
//! guest namespace      host namespace                      legacy namespace (optional)
//!   eth0 ----------- tapXXXXXXXXXXX --- brqXXXXXXXXXXX --- eth0  the gateway, and 169.254.169.254
//! ```
//!
//! By default every network has the CIDR 10.0.0.0/24, so guests of two networks share addresses.

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

/// The folder with the folders of named hosts.
pub(crate) const RUN: &str = "/run";
/// The BPF file system in a host's folder.
pub(crate) const BPFFS: &str = "bpf";

/// A hypervisor: its namespace, and a BPF file system for the pins of an agent.
#[derive(Debug, Clone)]
pub struct Host {
    parts: Arc<Parts>,
}

/// Fields are in drop order: the file system is unmounted before its folder is removed.
#[derive(Debug)]
struct Parts {
    netns: Netns,
    bpffs: Bpffs,
    folder: TempDir,
}

impl Host {
    /// Creates an empty host.
    #[must_use]
    pub fn new() -> Self {
        Self::with(Netns::new("host"), tempfile::Builder::new().prefix("metadata-host-").tempdir())
    }

    /// Creates a host with a readable name, which is also the name of its folder in `/run`.
    /// [`leftovers`](crate::leftovers) removes one that was killed.
    #[must_use]
    pub fn named(name: &str) -> Self {
        Self::with(Netns::named(name), tempfile::Builder::new().prefix(name).rand_bytes(0).tempdir_in(RUN))
    }

    fn with(netns: Netns, folder: io::Result<TempDir>) -> Self {
        let folder = folder.unwrap_or_else(|e| panic!("create the folder of host {}: {e}", netns.name()));
        let bpffs = Bpffs::mount(&folder.path().join(BPFFS));
        Self { parts: Arc::new(Parts { netns, bpffs, folder }) }
    }

    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.parts.netns
    }

    /// Returns the path of its BPF file system.
    #[must_use]
    pub fn bpffs(&self) -> &Path {
        self.parts.bpffs.path()
    }

    /// Returns a folder for files that belong to the host.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.parts.folder.path()
    }

    /// Creates a network 10.0.0.0/24 with the gateway 10.0.0.1.
    #[must_use]
    pub fn network(&self) -> Network {
        self.network_at(Ipv4Addr::new(10, 0, 0, 1), 24)
    }

    /// Creates a network with this gateway.
    #[must_use]
    pub fn network_at(&self, gateway: Ipv4Addr, prefix: u8) -> Network {
        let id = Uuid::new_v4();
        let bridge = format!("brq{}", &id.to_string()[..11]);
        // Without snooping the bridge floods multicast, so neighbour discovery does not need a
        // querier.
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

    /// Creates a persistent tap device that is up and can be opened by name.
    pub fn tap(&self, name: &str) {
        self.netns().ip(&format!("tuntap add dev {name} mode tap\nlink set {name} up"));
    }
}

impl Default for Host {
    fn default() -> Self {
        Self::new()
    }
}

/// A guest's route to 169.254.169.254.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NextHop {
    /// A host route through the gateway, whose MAC address is known (DHCP option 121).
    Gateway,
    /// On link: the guest resolves the MAC address by ARP.
    OnLink,
}

/// A guest to be plugged.
#[derive(Clone, Debug)]
pub struct GuestSpec {
    pub port: Port,
    pub next_hop: NextHop,
    /// The name of its namespace. By default it is generated.
    pub namespace: Option<String>,
}

/// A tenant network on the host.
#[derive(Clone, Debug)]
pub struct Network {
    host: Host,
    pub id: NetworkId,
    /// The name of the bridge in the host's namespace.
    pub bridge: String,
    pub gateway: Ipv4Addr,
    pub gateway_mac: MacAddress,
    /// The length of the prefix.
    pub prefix: u8,
}

impl Network {
    #[must_use]
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Plugs a new guest with this address, which uses its gateway for metadata.
    #[must_use]
    pub fn guest(&self, address: impl Into<Ipv4Addr>) -> Guest {
        self.plug(self.spec(address))
    }

    /// Returns the specification that [`Self::guest`] uses, to be modified.
    #[must_use]
    pub fn spec(&self, address: impl Into<Ipv4Addr>) -> GuestSpec {
        GuestSpec { port: Port::new(self.id, address.into()), next_hop: NextHop::Gateway, namespace: None }
    }

    #[must_use]
    pub fn plug(&self, spec: GuestSpec) -> Guest {
        Guest::plug(self, spec)
    }

    /// Adds an interface of the host to this network's bridge.
    pub fn enslave(&self, interface: &str) {
        self.host.netns().ip(&format!("link set {interface} master {}", self.bridge));
    }

    /// Starts the legacy path of this network.
    #[must_use]
    pub fn legacy(&self) -> Legacy {
        Legacy::start(self)
    }
}
