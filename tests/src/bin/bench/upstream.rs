//! The upstream of every peer: nginx with two workers in its own namespace, over a veth from the
//! end of the peer's path.
//!
//! It responds at minimum cost, so that differences are those of the peers. Measurements with Nova
//! itself as upstream, in the same namespace with as many processes, show the effect for a guest in
//! a cloud.

use std::cell::Cell;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, bail};
use metadata_agent::ids::NetworkId;
use metadata_tests::nova::SECRET;
use metadata_tests::processes;
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{Netns, OpenStack, Port};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// The path that accepts a posted body and confirms it.
pub const STORE: &str = "/store";
pub const STORED: &[u8] = b"stored";
/// The available bodies, by size in bytes. Every other path returns the first one.
pub const SIZES: [usize; 3] = [1024, 64 * 1024, 1024 * 1024];
const PORT: u16 = 80;
/// The number of processes of nginx and of Nova.
const WORKERS: usize = 2;
/// 198.18.0.0/15 is for benchmarks (RFC 2544). Each veth pair has four of its addresses.
const CABLES: u32 = u32::from_be_bytes([198, 18, 0, 0]);

/// Fields are in drop order.
pub struct Upstream {
    server: Child,
    _folder: TempDir,
    openstack: Option<OpenStack>,
    netns: Netns,
    cables: Cell<u32>,
    server_kind: Cell<UpstreamServer>,
}

/// The server behind a veth pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpstreamServer {
    Nginx,
    Nova,
}

impl Upstream {
    /// Starts the upstream, with OpenStack's servers if a peer needs them.
    pub fn start(with_openstack: bool) -> anyhow::Result<Self> {
        let netns = Netns::new("upstream");
        let folder = tempfile::Builder::new().prefix("upstream-").tempdir().context("a folder for nginx")?;
        for size in SIZES {
            fs::write(folder.path().join(size.to_string()), body(size)).context("write an answer")?;
        }
        let path = folder.path().display().to_string();
        let config = folder.path().join("nginx.conf");
        fs::write(&config, rendered(&path)).context("write nginx's configuration")?;
        let mut command: Command = netns.command("nginx");
        command.args(["-p", &path, "-e", "stderr", "-c"]).arg(&config).stdin(Stdio::null());
        let server = command.spawn().context("run nginx")?;
        let (cables, server_kind) = (Cell::new(0), Cell::new(UpstreamServer::Nginx));
        let mut upstream = Self { server, _folder: folder, openstack: None, netns, cables, server_kind };
        wait::poll(PATIENCE, || {
            upstream.netns.enter(|| TcpStream::connect((Ipv4Addr::LOCALHOST, PORT))).ok()
        })
        .context("nginx does not listen")?;
        upstream.openstack = with_openstack.then(|| OpenStack::start(&upstream.netns, WORKERS, SECRET));
        Ok(upstream)
    }

    /// Selects the server for all further veth pairs.
    pub fn select(&self, server: UpstreamServer) {
        self.server_kind.set(server);
    }

    /// Returns true if the server needs the identity of clients.
    pub fn wants_identity(&self) -> bool {
        self.server_kind.get() == UpstreamServer::Nova
    }

    /// Returns the servers behind Neutron's metadata agent.
    pub fn openstack(&self) -> anyhow::Result<&OpenStack> {
        let Some(openstack) = &self.openstack else { bail!("OpenStack's servers were not started") };
        Ok(openstack)
    }

    /// Adds guests to the server if it needs their identity.
    pub fn introduce<'a>(
        &self,
        networks: impl IntoIterator<Item = NetworkId>,
        ports: impl IntoIterator<Item = &'a Port>,
    ) {
        if let Some(openstack) = self.openstack.as_ref().filter(|_| self.wants_identity()) {
            openstack.add(networks, ports);
        }
    }

    /// Connects a namespace by a new veth pair and returns the upstream's address at the other end.
    pub fn cable(&self, netns: &Netns) -> SocketAddr {
        let number = self.cables.replace(self.cables.get() + 1);
        let address = |host: u32| Ipv4Addr::from(CABLES + 4 * number + host);
        let cable = Cable { number, addresses: [address(1), address(2)] };
        cable.lay((&self.netns, &format!("cable{number}")), (netns, "upstream"));
        open_ports(netns);
        let port = match self.server_kind.get() {
            UpstreamServer::Nginx => PORT,
            UpstreamServer::Nova => OpenStack::NOVA_PORT,
        };
        (address(1), port).into()
    }

    /// Returns the processes of nginx.
    pub fn processes(&self) -> Vec<u32> {
        processes::with_children(self.server.id())
    }
}

/// A veth pair with static neighbour entries. The kernel has one neighbour table for all
/// namespaces, and hundreds of guests that resolve addresses at once would overflow it.
pub struct Cable {
    /// A number that is unique among veth pairs.
    pub number: u32,
    pub addresses: [Ipv4Addr; 2],
}

impl Cable {
    /// Connects two namespaces, each with the name of its end.
    pub fn lay(&self, one: (&Netns, &str), other: (&Netns, &str)) {
        let mac = |side: u8| {
            let [a, b, c, d] = self.number.to_be_bytes();
            format!("02:{side:02x}:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
        };
        one.0.ip(&format!(
            "link add {} address {} type veth peer name {} address {} netns {}",
            one.1,
            mac(0),
            other.1,
            mac(1),
            other.0.name()
        ));
        let [near, far] = self.addresses;
        for ((netns, device), own, neighbour, side) in [(one, near, far, 1), (other, far, near, 0)] {
            netns.ip(&format!(
                "address add {own}/30 dev {device}\n\
                 link set {device} up\n\
                 neighbour add {neighbour} lladdr {} nud permanent dev {device}",
                mac(side)
            ));
        }
    }
}

/// Allows a namespace as many connections to one address as there are ports.
pub fn open_ports(netns: &Netns) {
    netns.sysctl("ipv4/ip_local_port_range", "1024 65535");
}

/// Returns the body of this size.
pub fn body(size: usize) -> Vec<u8> {
    (b'a'..=b'z').cycle().take(size).collect()
}

impl Drop for Upstream {
    fn drop(&mut self) {
        // SIGKILL would leave its workers behind.
        let pid = Pid::from_raw(self.server.id().cast_signed());
        if kill(pid, Signal::SIGTERM).is_ok() {
            drop(self.server.wait());
        }
    }
}

fn rendered(folder: &str) -> String {
    let [small, ..] = SIZES;
    format!(
        "daemon off;
user root;
worker_processes {WORKERS};
error_log stderr crit;
pid {folder}/pid;
events {{ worker_connections 16384; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    open_file_cache max=16;
    keepalive_requests 1000000000;
    keepalive_timeout 300;
    client_body_temp_path {folder}/bodies;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen {PORT} backlog=4096;
        root {folder};
        location = {STORE} {{ return 200 \"{stored}\"; }}
        location / {{ try_files $uri /{small} =404; }}
    }}
}}
",
        stored = String::from_utf8_lossy(STORED),
    )
}
