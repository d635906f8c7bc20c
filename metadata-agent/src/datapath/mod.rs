//! The kernel side as the agent handles it: programs loaded, attached and pinned, maps kept in step. The only module
//! that names aya.
//!
//! State lives in the kernel, pinned under one bpffs directory. [`Datapath::open`] adopts what a dead agent of the same ABI left and rebuilds everything else, so there is
//! one way in, whatever was there before.
//!
//! A redirection works inside one network namespace, and interface indexes repeat between namespaces. So for each
//! namespace but the host's the programs are loaded once more ([`Branches`]), as a copy that knows where it is. All
//! copies share the maps: an attachment id is of one interface on the host, and what is there is counted once.

mod branches;
mod hook;
mod maps;
mod object;
mod pins;
#[cfg(feature = "trace-log")]
mod trace_log;

pub use branches::Branches;
pub use hook::{AttachMode, Hook, remove_filter};
pub use maps::{ClientRecord, Clock, Counters, Heartbeat};
pub use object::OBJECT;
pub use pins::FilterMark;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use metadata_ebpf::abi::{
    ABI_VERSION, CHECK_IPV4, CHECK_MAC, CONFINED, Ipv4Prefix, MAX_PORT_IPV4, Port, PortKey, Settings, Site,
    names,
};
use metadata_ebpf::identity::AttachmentId;

use crate::ids::{IfIndex, MacAddress, NetworkId, VlanId};
use crate::netns::{Netns, NetnsError};
use hook::Programs;
use maps::Maps;
use object::Loader;
use pins::Pins;

/// Source addresses that one attachment may use at the same time. A port has few; what is more is made up by its guest.
const CLIENT_QUOTA: u32 = 256;
/// The same of an attachment that all guests of a network share.
const SHARED_CLIENT_QUOTA: u32 = 4096;

/// What can go wrong with the kernel side. Always with the object that it went wrong with.
#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    /// The pin directory cannot be used.
    #[error("cannot use {} for pins: {source} (is a bpf file system mounted there? mount -t bpf bpf /sys/fs/bpf)", path.display())]
    PinDirectory {
        /// The directory.
        path: std::path::PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// Somebody else holds the lock.
    #[error("{} is in use by another agent, or by detach", path.display())]
    InUse {
        /// The directory.
        path: std::path::PathBuf,
    },
    /// The object was refused, by aya or by the kernel's verifier.
    #[error("cannot load the BPF programs: {source}")]
    Load {
        /// Why.
        source: Box<aya::EbpfError>,
    },
    /// The object lacks a program or map that this agent knows.
    #[error("the BPF object has no {name}")]
    Missing {
        /// Its name.
        name: &'static str,
    },
    /// A program was refused.
    #[error("cannot {operation} {program} on {interface}: {source}")]
    Program {
        /// What was tried.
        operation: &'static str,
        /// The program.
        program: &'static str,
        /// The interface, or `the kernel`.
        interface: String,
        /// Why not.
        source: Box<aya::programs::ProgramError>,
    },
    /// A link cannot be pinned.
    #[error("cannot pin the link of {interface} at {}: {source}", path.display())]
    Pin {
        /// The interface.
        interface: String,
        /// The pin.
        path: std::path::PathBuf,
        /// Why not.
        source: Box<aya::pin::PinError>,
    },
    /// The interface went away, or its name to another one, while the program was attached.
    #[error("interface {interface} vanished while it was attached")]
    Vanished {
        /// Its name.
        interface: String,
    },
    /// A VLAN was to be attached on an interface that is not.
    #[error("interface {index} is not attached")]
    NotAttached {
        /// Its index.
        index: IfIndex,
    },
    /// The namespace cannot be worked in.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// A map refused.
    #[error("cannot {operation} {map}: {source}")]
    Map {
        /// What was tried.
        operation: &'static str,
        /// The map.
        map: &'static str,
        /// Why not.
        source: Box<aya::maps::MapError>,
    },
}

/// A guest-facing interface that carries `md_from_guest`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// Its id, which the identity addresses of its clients bear.
    pub id: AttachmentId,
    /// The interface's name.
    pub interface: String,
    /// The ids of the VLANs on it that are attachments of their own.
    pub subports: BTreeMap<VlanId, AttachmentId>,
}

/// What the kernel shall know of the port behind an attachment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortPolicy {
    /// For the client records.
    pub network: Option<NetworkId>,
    /// The only source MAC address allowed; `None` allows any.
    pub mac: Option<MacAddress>,
    /// The only source addresses allowed, as prefixes; `None` allows any.
    pub addresses: Option<Vec<(Ipv4Addr, u8)>>,
    /// Whether many guests share the attachment.
    pub shared: bool,
    /// Whether packets that would be left to a legacy path are dropped while none listens.
    pub confined: bool,
}

/// Where `md_from_guest` sends packets, and how patient it is.
#[derive(Clone, Copy, Debug)]
pub struct PortalLink {
    /// Index of the host end of the portal's veth.
    pub ifindex: IfIndex,
    /// Namespace id of the portal.
    pub nsid: u32,
    /// MAC address of the portal's end.
    pub mac: MacAddress,
}

/// Limits that the kernel side keeps by itself.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Without a beat for so long, packets go where they would go without us.
    pub heartbeat_stale_after: Duration,
    /// New connections per second and attachment; 0 for no limit.
    pub syn_rate: u32,
    /// New connections that may come at once.
    pub syn_burst: u32,
}

/// The programs, maps and attachments of one network namespace.
pub struct Datapath {
    maps: Arc<Mutex<Maps>>,
    pins: Pins,
    programs: Programs,
    place: Place,
    attachments: BTreeMap<IfIndex, Attachment>,
    portal: Option<IfIndex>,
    is_adopted: bool,
}

/// The namespace that a datapath works in.
enum Place {
    Host,
    Netns { netns: Arc<Netns>, inode: u32 },
}

impl Place {
    /// As the keys of the kernel have it.
    fn number(&self) -> u32 {
        match self {
            Self::Host => 0,
            Self::Netns { inode, .. } => *inode,
        }
    }

    fn key(&self, index: IfIndex, vlan: Option<VlanId>) -> PortKey {
        PortKey { netns: self.number(), ifindex: index.0, vlan: vlan.map_or(0, |vlan| vlan.get().into()) }
    }

    /// Interfaces are found by name, and so by a thread that is where they are.
    fn run<T: Send>(
        &self,
        work: impl FnOnce() -> Result<T, DatapathError> + Send,
    ) -> Result<T, DatapathError> {
        match self {
            Self::Host => work(),
            Self::Netns { netns, .. } => netns.run(work)?,
        }
    }
}

impl Datapath {
    /// Loads the programs, on the pinned maps of an earlier agent if they speak the same ABI.
    ///
    /// # Errors
    /// Without `CAP_BPF` (or `CAP_SYS_ADMIN`), without bpffs, or when the verifier refuses.
    pub fn open(pin_directory: &Path, mode: AttachMode) -> Result<Self, DatapathError> {
        let pins = Pins::open(pin_directory)?;
        let is_adopted = object::abi_matches(&pins);
        if !is_adopted {
            pins.clear()?;
        }
        let mut ebpf = Loader::new(&pins).load(Site::default())?;
        #[cfg(feature = "trace-log")]
        trace_log::follow(&mut ebpf);
        let maps = Maps::take(&mut ebpf)?;
        let programs = Programs::load(ebpf, mode)?;
        Ok(Self {
            maps: Arc::new(Mutex::new(maps)),
            pins,
            programs,
            place: Place::Host,
            attachments: BTreeMap::new(),
            portal: None,
            is_adopted,
        })
    }

    /// Whether maps of an earlier agent go on to be used. If not, attachment ids begin anew, and nothing that still knows ids of
    /// before may stay: the portal's connections.
    #[must_use]
    pub fn is_adopted(&self) -> bool {
        self.is_adopted
    }

    /// How programs are attached on this kernel.
    #[must_use]
    pub fn hook(&self) -> Hook {
        self.programs.hook()
    }

    /// What makes datapaths for other namespaces.
    #[must_use]
    pub fn branches(&self) -> Branches {
        Branches::new(Arc::clone(&self.maps), &self.pins, self.hook())
    }

    fn maps(&self) -> MutexGuard<'_, Maps> {
        lock(&self.maps)
    }

    /// Attaches `md_to_guest` to the portal and tells `md_from_guest` where it is.
    ///
    /// # Errors
    /// The kernel refuses the attachment.
    pub fn connect_portal(
        &mut self,
        interface: &str,
        portal: PortalLink,
        limits: Limits,
    ) -> Result<(), DatapathError> {
        let next_attachment = self.maps().settings()?.next_attachment.max(1);
        self.programs.attach_to_guest(interface, portal.ifindex, &self.pins.portal())?;
        self.portal = Some(portal.ifindex);
        let syn_interval_ns = 1_000_000_000_u64.checked_div(u64::from(limits.syn_rate)).unwrap_or(0);
        self.maps().put_settings(Settings {
            abi_version: ABI_VERSION,
            portal_ifindex: portal.ifindex.0,
            portal_nsid: portal.nsid,
            next_attachment,
            stale_after_ns: u64::try_from(limits.heartbeat_stale_after.as_nanos()).unwrap_or(u64::MAX),
            syn_interval_ns,
            syn_burst_ns: syn_interval_ns * u64::from(limits.syn_burst),
            portal_mac: portal.mac.0,
            _pad: [0; 2],
        })
    }

    /// Adopts the attachment that is there on an interface, if it lives: an earlier agent may have left it.
    ///
    /// # Errors
    /// The map refuses.
    pub fn adopt(&mut self, index: IfIndex, interface: &str) -> Result<Option<AttachmentId>, DatapathError> {
        if let Some(attachment) = self.attachments.get(&index) {
            return Ok(Some(attachment.id));
        }
        let pin = self.pins.guest(index);
        let Some(port) = self.maps().port(self.place.key(index, None))? else { return Ok(None) };
        let Self { place, programs, .. } = self;
        let is_adopted = place.run(|| Ok(programs.adopt_from_guest(interface, &pin)))?;
        let id = AttachmentId::new(port.attachment).filter(|_| is_adopted);
        if let Some(id) = id {
            self.note(id, index, interface);
        }
        Ok(id)
    }

    /// An id for [`Self::attach_as`], so that whoever needs it can prepare.
    ///
    /// # Errors
    /// The map refuses.
    pub fn reserve(&mut self) -> Result<AttachmentId, DatapathError> {
        self.maps().next_attachment()
    }

    /// Attaches `md_from_guest` to an interface that carries none, under an id from [`Self::reserve`], and with a policy from
    /// the first packet on. Where that takes a qdisc it must be there; `made_qdisc`: the caller made it just now.
    ///
    /// A filter of an earlier agent stays where programs are attached by TCX now: see [`Self::filter`].
    ///
    /// # Errors
    /// The interface is gone, or the kernel refuses. Only what [`Self::filter`] tells can be left behind then.
    pub fn attach_as(
        &mut self,
        id: AttachmentId,
        index: IfIndex,
        interface: &str,
        made_qdisc: bool,
        policy: &PortPolicy,
    ) -> Result<(), DatapathError> {
        self.attach_anew(id, index, interface, made_qdisc, policy)?;
        self.note(id, index, interface);
        Ok(())
    }

    fn note(&mut self, id: AttachmentId, index: IfIndex, interface: &str) {
        let attachment = Attachment { id, interface: interface.to_owned(), subports: BTreeMap::new() };
        self.attachments.insert(index, attachment);
    }

    fn attach_anew(
        &mut self,
        id: AttachmentId,
        index: IfIndex,
        interface: &str,
        made_qdisc: bool,
        policy: &PortPolicy,
    ) -> Result<(), DatapathError> {
        let pin = self.pins.guest(index);
        Pins::remove(&pin)?;
        let key = self.place.key(index, None);
        // The entry stands before the program runs: no packet of the guest meets an unknown interface.
        self.maps().put_gate(id)?;
        self.maps().put_port(key, port_entry(id, policy))?;
        let Self { place, programs, pins, .. } = self;
        let attached = place.run(|| match programs.hook() {
            Hook::Tcx => programs.attach_from_guest(interface, index, &pin),
            Hook::Clsact => attach_filter(programs, pins, index, interface, made_qdisc, &pin),
        });
        if attached.is_err() {
            self.maps().remove_port(key, id)?;
        }
        attached
    }

    /// Whether the program of an interface, a guest's or the portal's, is on it by TCX. `interface` is its name now.
    ///
    /// # Errors
    /// The kernel does not tell, as of an interface that is gone.
    pub fn is_on(&self, index: IfIndex, interface: &str) -> Result<bool, DatapathError> {
        self.place.run(|| self.programs.is_on(self.program_of(index), interface))
    }

    /// The kernel's id of the program of an interface, a guest's or the portal's.
    ///
    /// # Errors
    /// The object lacks the program.
    pub fn program_id(&self, index: IfIndex) -> Result<u32, DatapathError> {
        self.programs.id(self.program_of(index))
    }

    fn program_of(&self, index: IfIndex) -> &'static str {
        if self.portal == Some(index) { names::TO_GUEST } else { names::FROM_GUEST }
    }

    /// The host end of the portal, once it is connected.
    #[must_use]
    pub fn portal(&self) -> Option<IfIndex> {
        self.portal
    }

    /// Puts the program back on an interface that somebody took it off, a guest's or the portal's. `interface` is its name now.
    /// It is the same attachment: connections go on.
    ///
    /// # Errors
    /// The interface is gone or has no qdisc where the program needs one, or the kernel refuses otherwise.
    pub fn put_back(&mut self, index: IfIndex, interface: &str) -> Result<(), DatapathError> {
        let Self { place, programs, pins, portal, attachments, .. } = self;
        if *portal == Some(index) {
            let pin = pins.portal();
            return place.run(|| programs.attach_to_guest(interface, index, &pin));
        }
        if !attachments.contains_key(&index) {
            return Err(DatapathError::NotAttached { index });
        }
        let pin = pins.guest(index);
        Pins::remove(&pin)?;
        if programs.hook() == Hook::Clsact {
            pins.mark_filter(FilterMark { index, owns_qdisc: false })?;
        }
        place.run(|| programs.attach_from_guest(interface, index, &pin))
    }

    /// Notes a qdisc on an interface as ours, before it is made, or after all as not ours.
    ///
    /// # Errors
    /// The note cannot be made or removed.
    pub fn own_qdisc(&self, index: IfIndex, owned: bool) -> Result<(), DatapathError> {
        if owned {
            self.pins.mark_filter(FilterMark { index, owns_qdisc: true })
        } else {
            self.pins.disown_qdisc(index)
        }
    }

    /// Makes a VLAN on an attached interface an attachment of its own, or tells the id that it has.
    ///
    /// # Errors
    /// The interface is not attached, or a map refuses.
    pub fn attach_subport(&mut self, index: IfIndex, vlan: VlanId) -> Result<AttachmentId, DatapathError> {
        let Some(attachment) = self.attachments.get_mut(&index) else {
            return Err(DatapathError::NotAttached { index });
        };
        if let Some(id) = attachment.subports.get(&vlan) {
            return Ok(*id);
        }
        let mut maps = lock(&self.maps);
        let id = maps.next_attachment()?;
        maps.put_gate(id)?;
        maps.put_port(self.place.key(index, Some(vlan)), port_entry(id, &PortPolicy::default()))?;
        attachment.subports.insert(vlan, id);
        Ok(id)
    }

    /// Makes nothing of a VLAN again; fine if it was nothing.
    ///
    /// # Errors
    /// A map refuses.
    pub fn let_go_subport(&mut self, index: IfIndex, vlan: VlanId) -> Result<(), DatapathError> {
        let attachment = self.attachments.get_mut(&index);
        let id = attachment.and_then(|attachment| attachment.subports.remove(&vlan));
        id.map_or(Ok(()), |id| self.maps().remove_port(self.place.key(index, Some(vlan)), id))
    }

    /// Tells the kernel what is known of the port behind an attachment, or behind a VLAN on it; nothing happens where
    /// nothing is attached.
    ///
    /// # Errors
    /// The map refuses.
    pub fn set_policy(
        &mut self,
        index: IfIndex,
        vlan: Option<VlanId>,
        policy: &PortPolicy,
    ) -> Result<(), DatapathError> {
        let Some(attachment) = self.attachments.get(&index) else { return Ok(()) };
        let id = vlan.map_or(Some(attachment.id), |vlan| attachment.subports.get(&vlan).copied());
        let key = self.place.key(index, vlan);
        let mut maps = self.maps();
        let (Some(id), Some(before)) = (id, maps.port(key)?) else { return Ok(()) };
        let entry = port_entry(id, policy);
        if entry == before { Ok(()) } else { maps.put_port(key, entry) }
    }

    /// Lets go of an interface that is gone or that is no guest's any more, with all VLANs on it. A filter, which the program
    /// is then left in, is to be taken off apart. Its client records go with the next [`Self::sweep`]; no one can reach them,
    /// as attachment ids are never used twice.
    ///
    /// # Errors
    /// A pin or an entry cannot be removed.
    pub fn let_go(&mut self, index: IfIndex) -> Result<Option<Attachment>, DatapathError> {
        let Some(attachment) = self.attachments.remove(&index) else {
            return Ok(None);
        };
        Pins::remove(&self.pins.guest(index))?;
        self.maps().remove_port(self.place.key(index, None), attachment.id)?;
        for (vlan, id) in &attachment.subports {
            self.maps().remove_port(self.place.key(index, Some(*vlan)), *id)?;
        }
        Ok(Some(attachment))
    }

    /// Removes links and entries of interfaces that are not attached: what a dead agent left of guests that went meanwhile.
    ///
    /// # Errors
    /// A pin or an entry cannot be removed.
    pub fn forget_strays(&mut self) -> Result<(), DatapathError> {
        let attached: BTreeMap<(u32, u32), AttachmentId> = self.ids().collect();
        let mut maps = lock(&self.maps);
        for (key, port) in maps.ports()? {
            if key.netns != self.place.number() {
                continue;
            }
            let is_stray =
                attached.get(&(key.ifindex, key.vlan)).is_none_or(|id| id.get() != port.attachment);
            if let Some(id) = AttachmentId::new(port.attachment).filter(|_| is_stray) {
                maps.remove_port(key, id)?;
            }
        }
        for (index, pin) in self.pins.guests()? {
            if !self.attachments.contains_key(&index) {
                Pins::remove(&pin)?;
            }
        }
        Ok(())
    }

    /// Removes clients that were idle for `idle` or whose attachment is gone, of all namespaces, and sets the counts of the others right.
    ///
    /// # Errors
    /// The map refuses.
    pub fn sweep(&mut self, idle: Duration) -> Result<usize, DatapathError> {
        self.maps().sweep(idle)
    }

    /// Every attachment by the fields of its key, interface index and VLAN id.
    fn ids(&self) -> impl Iterator<Item = ((u32, u32), AttachmentId)> {
        self.attachments.iter().flat_map(|(index, attachment)| {
            let subports = attachment.subports.iter().map(|(vlan, id)| (u32::from(vlan.get()), *id));
            let all = std::iter::once((0, attachment.id)).chain(subports);
            all.map(|(vlan, id)| ((index.0, vlan), id))
        })
    }

    /// The filters that this agent or an earlier one has made.
    ///
    /// # Errors
    /// The pin directory cannot be read.
    pub fn filters(&self) -> Result<Vec<FilterMark>, DatapathError> {
        self.pins.filters()
    }

    /// The filter on one interface.
    #[must_use]
    pub fn filter(&self, index: IfIndex) -> Option<FilterMark> {
        self.pins.filter(index)
    }

    /// Forgets a filter that was taken off.
    ///
    /// # Errors
    /// The note of it cannot be removed.
    pub fn forget_filter(&self, index: IfIndex) -> Result<(), DatapathError> {
        self.pins.forget_filter(index)
    }

    /// The attachments, by interface.
    #[must_use]
    pub fn attachments(&self) -> &BTreeMap<IfIndex, Attachment> {
        &self.attachments
    }

    /// A handle of its own for the heartbeat.
    ///
    /// # Errors
    /// The pin is gone.
    pub fn heartbeat(&self) -> Result<Heartbeat, DatapathError> {
        Heartbeat::open(&self.pins)
    }

    /// A handle of its own for reading counters and clients.
    ///
    /// # Errors
    /// A pin is gone.
    pub fn counters(&self) -> Result<Counters, DatapathError> {
        Counters::open(&self.pins)
    }
}

/// Everything that agents of whatever version have left under a pin directory, for who removes it.
#[derive(Debug)]
pub struct Remains(Pins);

impl Remains {
    /// `None` if there is no such directory on a BPF file system.
    ///
    /// # Errors
    /// An agent works there, or the directory cannot be read.
    pub fn find(pin_directory: &Path) -> Result<Option<Self>, DatapathError> {
        Ok(Pins::find(pin_directory)?.map(Self))
    }

    /// Filters, which no pin holds, and which are to be taken off apart.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn filters(&self) -> Result<Vec<FilterMark>, DatapathError> {
        self.0.filters()
    }

    /// Forgets a filter that was taken off.
    ///
    /// # Errors
    /// The note of it cannot be removed.
    pub fn forget_filter(&self, index: IfIndex) -> Result<(), DatapathError> {
        self.0.forget_filter(index)
    }

    /// What there is of other network namespaces, by their inodes.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn branches(&self) -> Result<Vec<(u32, Self)>, DatapathError> {
        let of = |inode| Ok((inode, Self(Pins::of_netns(self.0.directory(), inode)?)));
        self.0.netns()?.into_iter().map(of).collect()
    }

    /// Takes every link off, and removes every pin and, if nothing is left there, the directory.
    ///
    /// # Errors
    /// A pin cannot be removed.
    pub fn remove(self) -> Result<(), DatapathError> {
        self.0.remove_all()
    }
}

/// Noted first: whoever comes after a crash at any point here knows what to remove.
fn attach_filter(
    programs: &mut Programs,
    pins: &Pins,
    index: IfIndex,
    interface: &str,
    made_qdisc: bool,
    pin: &Path,
) -> Result<(), DatapathError> {
    pins.mark_filter(FilterMark { index, owns_qdisc: made_qdisc })?;
    // An agent of another ABI may have left its filter in the same place. Not replaced but removed, by its name: what
    // stands there may be somebody else's.
    let had_filter = remove_filter(interface, names::FROM_GUEST)?;
    // A qdisc of ours that somebody deleted took our filter along: without it, what is there now is somebody else's.
    if !made_qdisc && !had_filter {
        pins.disown_qdisc(index)?;
    }
    programs.attach_from_guest(interface, index, pin)
}

fn lock(maps: &Mutex<Maps>) -> MutexGuard<'_, Maps> {
    // Each call on it is whole by itself, so one that panicked leaves nothing half done.
    maps.lock().unwrap_or_else(PoisonError::into_inner)
}

fn port_entry(id: AttachmentId, policy: &PortPolicy) -> Port {
    let mut port = Port {
        attachment: id.get(),
        flags: if policy.confined { CONFINED } else { 0 },
        client_quota: if policy.shared { SHARED_CLIENT_QUOTA } else { CLIENT_QUOTA },
        ipv4_count: 0,
        network: policy.network.map_or([0; 16], |network| network.octets()),
        ipv4: [Ipv4Prefix::default(); MAX_PORT_IPV4],
        mac: [0; 6],
        _pad: [0; 2],
    };
    if let Some(mac) = policy.mac {
        port.mac = mac.0;
        port.flags |= CHECK_MAC;
    }
    if let Some(addresses) = policy.addresses.as_ref().filter(|addresses| addresses.len() <= MAX_PORT_IPV4) {
        for (slot, (address, len)) in port.ipv4.iter_mut().zip(addresses) {
            *slot = Ipv4Prefix::new(address.octets(), *len);
            port.ipv4_count += 1;
        }
        port.flags |= CHECK_IPV4;
    }
    port
}

/// The names of the programs, for who looks for them in the kernel.
pub const PROGRAMS: [&str; 2] = [names::FROM_GUEST, names::TO_GUEST];
