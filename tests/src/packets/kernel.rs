//! The programs in the kernel with their own maps, run frame by frame with `BPF_PROG_TEST_RUN`.

use std::collections::HashMap as StdHashMap;
use std::net::{SocketAddrV6, TcpListener, TcpStream};
use std::ops::Range;
use std::path::Path;

use aya::maps::xdp::DevMapHash;
use aya::maps::{Array, HashMap, MapData, PerCpuArray, ProgramArray, RingBuf};
use aya::programs::{ProgramInfo, SchedClassifier, TestRun, TestRunOptions};
use aya::{Ebpf, EbpfLoader};
use metadata_agent::datapath::{Clock, DISPATCHER, OBJECT, PROGRAMS, raise_memlock_limit};
use metadata_agent::net::netlink::Netlink;
use metadata_agent::net::netns::Netns;
use metadata_agent::net::portal::Portal;
use metadata_ebpf::abi::{
    self, AttachmentState, Client, ClientKey, GuestShares, Port, PortKey, Refusal, Refusals, Settings, names,
    slots,
};
use metadata_ebpf::identity::PORTAL_ADDRESS;
use metadata_ebpf::reason::{Reason, Verdict};
use tokio::runtime::{Builder, Runtime};

use super::world;
use super::{ATTACHMENT, CONNECTED_PORT, Program, State, port};
use crate::bpffs::Bpffs;
use crate::netns::Netns as RigNetns;

/// The five words of a packet (`skb->cb`) that any code on its path may use and that are not
/// cleared.
pub type ControlBlock = [u32; 5];

/// Their position in the context of a run, `struct __sk_buff` of linux/bpf.h.
const CONTROL_BLOCK: Range<usize> = 48..68;
/// Longer than any kernel's context. Everything beyond that must be zero.
const CONTEXT: usize = 256;

/// The programs and their maps.
pub struct Kernel {
    /// The programs of the host.
    ebpf: Ebpf,
    /// The programs of a router's namespace on the same maps: the dispatchers and their tail-call
    /// targets.
    routed: Ebpf,
    dispatched: Ebpf,
    /// True if the router's programs run next.
    is_routed: bool,
    nsid: u32,
    config: Array<MapData, Settings>,
    heartbeat: Array<MapData, u64>,
    ports: HashMap<MapData, PortKey, Port>,
    attachments: HashMap<MapData, u32, AttachmentState>,
    shares: HashMap<MapData, u32, GuestShares>,
    refusals: HashMap<MapData, u32, Refusals>,
    reports: RingBuf<MapData>,
    devices: DevMapHash<MapData>,
    clients: HashMap<MapData, ClientKey, Client>,
    stats: PerCpuArray<MapData, u64>,
}

impl Kernel {
    /// Loads the object with its maps pinned in `pins`, for the portal with this id in the caller's
    /// namespace.
    fn load(pins: &Path, nsid: u32) -> Self {
        raise_memlock_limit();
        let [mut ebpf, mut dispatched] = [0_u32, 1].map(|dispatched| {
            let mut loader = EbpfLoader::new();
            loader.override_global(names::DISPATCHED, &dispatched, true);
            load(loader.default_map_pin_directory(pins), OBJECT)
        });
        let context = world::netns_context(true, nsid);
        let mut loader = EbpfLoader::new();
        loader.override_global(names::NETNS_CONTEXT, &context, true);
        let mut routed = load(loader.default_map_pin_directory(pins), DISPATCHER);
        let mut slots: ProgramArray<_> =
            routed.take_map(names::PROGRAMS).expect("slots").try_into().expect("a program array");
        for (slot, name) in [(slots::FROM_GUEST, names::FROM_GUEST), (slots::TO_GUEST, names::TO_GUEST)] {
            slots.set(slot, classifier(&mut dispatched, name).fd().expect(name), 0).expect("a slot");
        }
        let mut take = |name| ebpf.take_map(name).unwrap_or_else(|| panic!("no map {name}"));
        Self {
            nsid,
            config: take(names::CONFIG).try_into().expect("an array"),
            heartbeat: take(names::HEARTBEAT).try_into().expect("an array"),
            ports: take(names::PORTS).try_into().expect("a hash table"),
            attachments: take(names::ATTACHMENTS).try_into().expect("a hash table"),
            shares: take(names::SHARES).try_into().expect("a hash table"),
            refusals: take(names::REFUSALS).try_into().expect("a hash table"),
            reports: take(names::REFUSAL_EVENTS).try_into().expect("a ring buffer"),
            devices: take(names::DEVICES).try_into().expect("a device map"),
            clients: take(names::CLIENTS).try_into().expect("a hash table"),
            stats: take(names::STATS).try_into().expect("a per-CPU array"),
            ebpf,
            routed,
            dispatched,
            is_routed: false,
        }
    }

    /// Returns `MD_NETNS` of the router's namespace or of the host.
    #[must_use]
    pub fn netns_context(&self, routed: bool) -> abi::NetnsContext {
        world::netns_context(routed, self.nsid)
    }

    /// Sets all maps to a state.
    pub fn set(&mut self, state: &State) {
        let now = Clock::now_ns();
        self.is_routed = state.routed;
        self.config.set(0, world::settings(state, self.nsid), 0).expect("settings");
        self.heartbeat.set(abi::heartbeat::DATA, world::heartbeat(state, now), 0).expect("a beat");
        self.attachments
            .insert(ATTACHMENT, world::attachment_state(state, now), 0)
            .expect("the attachment state");
        self.shares.insert(ATTACHMENT, world::guest_shares(state, now), 0).expect("the shares");
        self.refusals.insert(ATTACHMENT, Refusals::NONE, 0).expect("the refusals");
        if state.interface_there {
            self.devices.insert(ATTACHMENT, world::IFINDEX, None, 0).expect("the interface");
        } else {
            let _absent = self.devices.remove(ATTACHMENT);
        }
        for routed in [false, true] {
            let _absent = self.ports.remove(&world::port_key(routed));
        }
        if state.attached {
            self.ports.insert(world::port_key(state.routed), port(state), 0).expect("a port");
        }
        for key in self.clients().into_keys() {
            self.clients.remove(&key).expect("a client to remove");
        }
        if state.client_known {
            for identity in world::known() {
                self.clients.insert(ClientKey { identity }, world::client(), 0).expect("a client");
            }
        }
    }

    /// Runs a program on a frame and writes the resulting frame to `out`. Returns the verdict of
    /// linux/pkt_cls.h and the frame's length.
    pub fn test_run(&mut self, program: Program, frame: &[u8], out: &mut [u8]) -> (i32, usize) {
        let options =
            TestRunOptions { data_in: Some(frame), data_out: Some(out), ..TestRunOptions::default() };
        self.test_run_with(program, options)
    }

    /// Runs a program on a frame with this control block, which is then replaced by the result.
    pub fn test_run_behind(
        &mut self,
        block: &mut ControlBlock,
        program: Program,
        frame: &[u8],
        out: &mut [u8],
    ) -> (i32, usize) {
        let (mut before, mut after) = ([0; CONTEXT], [0; CONTEXT]);
        before[CONTROL_BLOCK].copy_from_slice(&block.map(u32::to_ne_bytes).concat());
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(out),
            ctx_in: Some(&before),
            ctx_out: Some(&mut after),
            ..TestRunOptions::default()
        };
        let made = self.test_run_with(program, options);
        let (words, _) = after[CONTROL_BLOCK].as_chunks();
        for (word, bytes) in block.iter_mut().zip(words) {
            *word = u32::from_ne_bytes(*bytes);
        }
        made
    }

    fn test_run_with(&mut self, program: Program, options: TestRunOptions<'_>) -> (i32, usize) {
        let name = match program {
            Program::FromGuest => names::FROM_GUEST,
            Program::ToGuest => names::TO_GUEST,
        };
        let ebpf = if self.is_routed { &mut self.routed } else { &mut self.ebpf };
        let frame = options.data_in;
        let result = classifier(ebpf, name).test_run(options);
        let result = result.unwrap_or_else(|error| panic!("{name} on {frame:02x?}: {error:?}"));
        (result.return_value.cast_signed(), usize::try_from(result.data_size_out).expect("a length"))
    }

    /// Returns `MD_STATS`, summed over all CPUs.
    #[must_use]
    pub fn counters(&self) -> Vec<u64> {
        let count = |reason: &Reason| self.stats.get(&reason.index(), 0).expect("a counter").iter().sum();
        Reason::ALL.iter().map(count).collect()
    }

    /// Returns the reasons counted since the counters were `before`.
    #[must_use]
    pub fn counted_since(&self, before: &[u64]) -> Vec<Reason> {
        let pairs = Reason::ALL.iter().zip(before.iter().zip(self.counters()));
        pairs.flat_map(|(reason, (before, after))| (*before..after).map(|_| *reason)).collect()
    }

    /// Returns the kernel's information about each accepted program, with the name of its copy.
    #[must_use]
    pub fn programs(&self) -> Vec<(&'static str, ProgramInfo)> {
        let info = |ebpf: &Ebpf, name: &str| {
            let program: &SchedClassifier = ebpf.program(name).expect(name).try_into().expect(name);
            program.info().expect(name)
        };
        let copies =
            [("of the host", &self.ebpf), ("of namespaces", &self.dispatched), ("before it", &self.routed)];
        let all = copies.iter().flat_map(|(copy, ebpf)| PROGRAMS.map(|name| (*copy, info(ebpf, name))));
        all.collect()
    }

    /// Returns the record of an identity address.
    #[must_use]
    pub fn client(&self, identity: [u8; 16]) -> Option<Client> {
        self.clients.get(&ClientKey { identity }, 0).ok()
    }

    /// Returns all entries of `MD_CLIENTS`.
    #[must_use]
    pub fn clients(&self) -> StdHashMap<ClientKey, Client> {
        self.clients.iter().map(|entry| entry.expect("a client")).collect()
    }

    /// Returns the refused packets of the guest's attachment.
    #[must_use]
    pub fn refusals(&self) -> Refusals {
        self.refusals.get(&ATTACHMENT, 0).expect("the refusals")
    }

    /// Returns the refused packets that were reported since the last call.
    pub fn reports(&mut self) -> Vec<Refusal> {
        let mut reports = Vec::new();
        while let Some(event) = self.reports.next() {
            reports.push(Refusal::from_event(&event).expect("an event of this length"));
        }
        reports
    }

    /// Returns the state of the guest's attachment.
    #[must_use]
    pub fn attachment(&self) -> AttachmentState {
        self.attachments.get(&ATTACHMENT, 0).expect("the attachment state")
    }
}

fn load(loader: &mut EbpfLoader<'_>, object: &[u8]) -> Ebpf {
    let mut ebpf = loader.load(object).expect("the object loads");
    for name in PROGRAMS {
        let accepted = classifier(&mut ebpf, name).load();
        accepted.unwrap_or_else(|error| panic!("the verifier refuses {name}: {error:?}"));
    }
    ebpf
}

fn classifier<'a>(ebpf: &'a mut Ebpf, name: &str) -> &'a mut SchedClassifier {
    ebpf.program_mut(name).expect(name).try_into().expect(name)
}

/// Returns a program's return value for a reason, as in linux/pkt_cls.h.
#[must_use]
pub fn verdict_of(reason: Option<Reason>) -> i32 {
    const TC_ACT_UNSPEC: i32 = -1;
    const TC_ACT_SHOT: i32 = 2;
    const TC_ACT_REDIRECT: i32 = 7;
    match reason.map(Reason::verdict) {
        None | Some(Verdict::Next) => TC_ACT_UNSPEC,
        Some(Verdict::Drop) => TC_ACT_SHOT,
        Some(Verdict::ToPortal | Verdict::ToGuest | Verdict::AsGuest) => TC_ACT_REDIRECT,
    }
}

/// Namespaces, a portal and a BPF file system that are removed after the work.
pub struct Fixture {
    portal_name: String,
    portal: Portal,
    bpffs: Bpffs,
}

impl Fixture {
    /// Runs `work` in its own namespace.
    pub fn set_up<T: Send>(label: &str, work: impl FnOnce(&Self) -> T + Send) -> T {
        let host = RigNetns::new(label);
        let portal_name = format!("{}-portal", host.name());
        // The portal adopts an existing namespace. This one is removed with its owner, even if a
        // frame fails.
        let _portal_netns = RigNetns::named(&portal_name);
        host.enter(|| {
            let portal = runtime().block_on(Portal::establish(&portal_name, 1500)).expect("a portal");
            let directory = tempfile::tempdir().expect("a directory");
            let bpffs = Bpffs::mount(&directory.path().join("bpf"));
            work(&Self { portal_name, portal, bpffs })
        })
    }

    #[must_use]
    pub fn load(&self) -> Kernel {
        Kernel::load(self.bpffs.path(), self.portal.nsid)
    }

    /// Listens in the portal and connects from sockets there with the identity addresses
    /// themselves.
    #[must_use]
    pub fn listen(&self) -> PortalEnds {
        let listener = self.portal.listen(16).expect("a listener");
        let inside = Netns::named(&self.portal_name).expect("readable").expect("there");
        let connect = || world::known().map(|identity| connect_as(identity, &listener));
        let connections = inside.run(connect).expect("the portal is entered");
        PortalEnds { _connections: connections, _listener: listener }
    }
}

/// The agent's listener in a portal, and both ends of the connections in the portal's socket table.
pub struct PortalEnds {
    _connections: [(TcpStream, TcpStream); 3],
    _listener: TcpListener,
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().expect("a runtime")
}

fn connect_as(identity: [u8; 16], listener: &TcpListener) -> (TcpStream, TcpStream) {
    runtime().block_on(async {
        let netlink = Netlink::connect().expect("netlink");
        let lo = netlink.link("lo").await.expect("links").expect("lo");
        netlink.set_address(lo.index, identity.into(), 128).await.expect("the identity address");
    });
    let socket = socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::STREAM, None).expect("a socket");
    socket.bind(&SocketAddrV6::new(identity.into(), CONNECTED_PORT, 0, 0).into()).expect("bound");
    socket.connect(&SocketAddrV6::new(PORTAL_ADDRESS.into(), 80, 0, 0).into()).expect("connected");
    listener.set_nonblocking(false).expect("blocking");
    let (accepted, _) = listener.accept().expect("accepted");
    (socket.into(), accepted)
}
