//! The BPF objects, and the attachment of their programs to TC ingress.
//!
//! Where the kernel has TCX (6.6), a program is attached by a pinned TCX link; before that, by a
//! filter.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::{io, mem};

use aya::maps::{Array, Map, MapData};
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle, qdisc_detach_program};
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType, TcError};
use aya::util::KernelVersion;
use aya::{Ebpf, EbpfLoader, include_bytes_aligned};
use metadata_ebpf::abi::{ABI_VERSION, NetnsContext, Settings, names, slots};
use nix::net::if_::if_nametoindex;
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use tracing::debug;

use super::DatapathError;
use super::maps::Slots;
use super::pins::Pins;
use crate::ids::IfIndex;

/// Programs and maps as the build script compiled them.
pub static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/datapath.o"));
/// Dispatchers as the build script compiled them.
pub static DISPATCHER: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/dispatcher.o"));

/// Priority and handle of our filter: fixed, so that the next agent finds and replaces it in one
/// step.
const CLSACT_PRIORITY: u16 = 7;
const CLSACT_HANDLE: TcHandle = TcHandle::new(0, 1);

/// The first kernel with TCX (commit e420bed02507).
const TCX_SINCE: KernelVersion = KernelVersion::new(6, 6, 0);
/// The first kernel that does not count BPF maps as locked memory (commit 97306be45fbe).
const MEMORY_CGROUPS_SINCE: KernelVersion = KernelVersion::new(5, 11, 0);

/// Configured choice of the hook.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AttachMode {
    /// TCX if the kernel has it, else clsact.
    #[default]
    Auto,
    /// TCX, or an error.
    Tcx,
    /// clsact on any kernel.
    Clsact,
}

/// The TC ingress hook that programs are attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hook {
    /// TCX links: independent of qdiscs, removed with the interface or the pin.
    Tcx,
    /// Filters on the ingress hook of an `ingress` or `clsact` qdisc.
    Clsact,
}

#[derive(Debug)]
pub(super) struct Programs {
    ebpf: Ebpf,
    hook: Hook,
    /// Hook of the program on the portal's interface.
    portal_hook: Hook,
    ids: BTreeMap<&'static str, u32>,
}

impl Programs {
    pub(crate) fn load(mut ebpf: Ebpf, mode: AttachMode) -> Result<Self, DatapathError> {
        let ids = load_all(&mut ebpf)?;
        let has_tcx = || KernelVersion::current().is_ok_and(|running| running >= TCX_SINCE);
        let hook = match mode {
            AttachMode::Tcx => Hook::Tcx,
            AttachMode::Auto if has_tcx() => Hook::Tcx,
            AttachMode::Auto | AttachMode::Clsact => Hook::Clsact,
        };
        Ok(Self { ebpf, hook, portal_hook: hook, ids })
    }

    pub(crate) fn hook(&self) -> Hook {
        self.hook
    }

    /// Loads the programs of another namespace, for a hook that is already known. The maps are
    /// dropped, because the programs hold them.
    ///
    /// On the portal's interface in that namespace the program is always a filter. The interface is
    /// ours and no other program uses it. A TCX link would hold the lock of all network
    /// configuration (RTNL) for an RCU grace period (`tcx_entry_sync`), some ten milliseconds, and
    /// a network node has a thousand namespaces.
    pub(crate) fn load_shared(mut ebpf: Ebpf, hook: Hook) -> Result<Self, DatapathError> {
        let maps: Vec<String> = ebpf.maps().map(|(name, _)| name.to_owned()).collect();
        let ids = load_all(&mut ebpf)?;
        for name in maps {
            drop(ebpf.take_map(&name));
        }
        Ok(Self { ebpf, hook, portal_hook: Hook::Clsact, ids })
    }

    /// Puts the programs into the slots of the dispatchers.
    pub(crate) fn put_into(mut self, slots: &mut Slots) -> Result<(), DatapathError> {
        for (slot, name) in [(slots::FROM_GUEST, names::FROM_GUEST), (slots::TO_GUEST, names::TO_GUEST)] {
            let program = program(&mut self.ebpf, name)?.fd();
            let program = program.map_err(|source| program_error("open", name, "the kernel", source))?;
            slots.put(slot, program)?;
        }
        Ok(())
    }

    /// Returns the kernel's id of a program.
    pub(crate) fn id(&self, name: &'static str) -> Result<u32, DatapathError> {
        self.ids.get(name).copied().ok_or(DatapathError::Missing { name })
    }

    /// Returns true if a program is attached to an interface by TCX.
    pub(crate) fn is_attached(&self, name: &'static str, interface: &str) -> Result<bool, DatapathError> {
        is_attached(self.id(name)?, name, interface)
    }

    /// Attaches `md_to_guest` to the portal, in place of what an earlier agent attached by either
    /// hook.
    pub(crate) fn attach_to_guest(
        &mut self,
        interface: &str,
        index: IfIndex,
        pin: &Path,
    ) -> Result<(), DatapathError> {
        let hook = self.portal_hook;
        if self.adopt(names::TO_GUEST, hook, interface, pin) == Adoption::NoLink {
            Pins::remove(pin)?;
            self.attach(names::TO_GUEST, hook, interface, index, pin)?;
        }
        match hook {
            Hook::Tcx => remove_filter(interface, names::TO_GUEST).map(drop),
            Hook::Clsact => Pins::remove(pin),
        }
    }

    pub(crate) fn attach_from_guest(
        &mut self,
        interface: &str,
        index: IfIndex,
        pin: &Path,
    ) -> Result<(), DatapathError> {
        self.attach(names::FROM_GUEST, self.hook, interface, index, pin)
    }

    /// Replaces the program of an earlier agent's attachment in one step.
    pub(crate) fn adopt_from_guest(&mut self, interface: &str, pin: &Path) -> Adoption {
        self.adopt(names::FROM_GUEST, self.hook, interface, pin)
    }

    fn attach(
        &mut self,
        name: &'static str,
        hook: Hook,
        interface: &str,
        index: IfIndex,
        pin: &Path,
    ) -> Result<(), DatapathError> {
        let options = match hook {
            Hook::Tcx => TcAttachOptions::TcxOrder(LinkOrder::first()),
            Hook::Clsact => {
                let options =
                    NlOptions { priority: CLSACT_PRIORITY, handle: CLSACT_HANDLE, ..NlOptions::default() };
                TcAttachOptions::Netlink(options)
            }
        };
        let program = program(&mut self.ebpf, name)?;
        let link = program
            .attach_with_options(interface, TcAttachType::Ingress, options)
            .and_then(|id| program.take_link(id))
            .map_err(|source| program_error("attach", name, interface, source))?;
        // aya attaches by name. If the name moved to another interface meanwhile, dropping the link
        // detaches the program again.
        if if_nametoindex(interface) != Ok(index.0) {
            return Err(DatapathError::Vanished { interface: interface.to_owned() });
        }
        pin_link(link, interface, pin)
    }

    fn adopt(&mut self, name: &'static str, hook: Hook, interface: &str, pin: &Path) -> Adoption {
        let earlier = match hook {
            Hook::Tcx => {
                PinnedLink::from_pin(pin).ok().and_then(|pinned| FdLink::from(pinned).try_into().ok())
            }
            Hook::Clsact => SchedClassifierLink::attached(
                interface,
                TcAttachType::Ingress,
                CLSACT_PRIORITY,
                CLSACT_HANDLE,
                None,
            )
            .ok(),
        };
        let Some(earlier): Option<SchedClassifierLink> = earlier else {
            return Adoption::NoLink;
        };
        let Ok(program) = program(&mut self.ebpf, name) else {
            return Adoption::NoLink;
        };
        let Ok(link) = program.attach_to_link(earlier).and_then(|id| program.take_link(id)) else {
            return Adoption::NoLink;
        };
        if hook == Hook::Clsact {
            mem::forget(link);
        }
        Adoption::Adopted
    }
}

/// Returns true if the program with this id is attached to an interface by TCX, in the namespace of
/// the calling thread. Takes the kernel's RTNL lock for a moment.
pub(super) fn is_attached(id: u32, name: &'static str, interface: &str) -> Result<bool, DatapathError> {
    let (_, programs) = SchedClassifier::query_tcx(interface, TcAttachType::Ingress)
        .map_err(|source| program_error("look for", name, interface, source))?;
    Ok(programs.iter().any(|program| program.id() == id))
}

/// Loads the programs and returns the kernel's ids by name.
fn load_all(ebpf: &mut Ebpf) -> Result<BTreeMap<&'static str, u32>, DatapathError> {
    let mut ids = BTreeMap::new();
    for name in super::PROGRAMS {
        let program = program(ebpf, name)?;
        let info = program.load().and_then(|()| program.info());
        let info = info.map_err(|source| program_error("load", name, "the kernel", source))?;
        ids.insert(name, info.id());
    }
    Ok(ids)
}

/// Pins a link, so that the attachment outlives the process.
fn pin_link(link: SchedClassifierLink, interface: &str, pin: &Path) -> Result<(), DatapathError> {
    match FdLink::try_from(link) {
        Ok(link) => {
            let pinned = link.pin(pin);
            pinned.map(drop).map_err(|source| DatapathError::Pin {
                interface: interface.to_owned(),
                path: pin.to_owned(),
                source: Box::new(source),
            })
        }
        // A filter does not need a pin; it stays until it is removed.
        Err(_) => Ok(()),
    }
}

/// The outcome of taking over an earlier agent's attachment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Adoption {
    /// The attachment runs this agent's program now.
    Adopted,
    /// The interface has no live attachment.
    NoLink,
}

/// The outcome of removing a filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FilterRemoval {
    Removed,
    /// The filter or the interface did not exist.
    Absent,
}

/// Removes the filter of a program from an interface.
///
/// # Errors
/// The kernel refuses.
pub(crate) fn remove_filter(interface: &str, program: &'static str) -> Result<FilterRemoval, DatapathError> {
    match qdisc_detach_program(interface, TcAttachType::Ingress, program) {
        Ok(()) => Ok(FilterRemoval::Removed),
        Err(TcError::IoError(error)) if error.kind() == io::ErrorKind::NotFound => Ok(FilterRemoval::Absent),
        Err(_) if if_nametoindex(interface).is_err() => Ok(FilterRemoval::Absent),
        Err(source) => Err(program_error("detach", program, interface, source.into())),
    }
}

/// The copies of the programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ProgramSet {
    /// Of the host's namespace.
    Host,
    /// Shared by all other namespaces, behind dispatchers.
    Shared,
}

/// Loads programs and maps. Maps that are already pinned are used as they are.
pub(super) fn load_object(pins: &Pins, set: ProgramSet) -> Result<Ebpf, DatapathError> {
    let dispatched = match set {
        ProgramSet::Host => 0_u32,
        ProgramSet::Shared => 1,
    };
    let loaded = loader(pins).override_global(names::DISPATCHED, &dispatched, true).load(OBJECT);
    loaded.map_err(|source| DatapathError::Load { source: Box::new(source) })
}

/// Loads dispatchers.
pub(super) struct Dispatchers {
    loader: EbpfLoader<'static>,
    /// The contexts of all dispatchers so far. aya's loader requires that they live as long as the
    /// loader. There is at most one per uplink to the portal.
    contexts: HashMap<NetnsContext, &'static NetnsContext>,
}

impl Dispatchers {
    pub(super) fn new(pins: &Pins) -> Self {
        Self { loader: loader(pins), contexts: HashMap::new() }
    }

    pub(super) fn load(&mut self, context: NetnsContext) -> Result<Ebpf, DatapathError> {
        let context = *self.contexts.entry(context).or_insert_with(|| Box::leak(Box::new(context)));
        self.loader
            .override_global(names::NETNS_CONTEXT, context, true)
            .load(DISPATCHER)
            .map_err(|source| DatapathError::Load { source: Box::new(source) })
    }
}

/// Raises the limit of locked memory, which bounds BPF maps before Linux 5.11.
///
/// aya does so when the kernel answers EPERM. But for a device map the kernel answers EINVAL
/// (`dev_map_init_map`), so a device map that is created first would fail.
pub fn raise_memlock_limit() {
    if KernelVersion::current().is_ok_and(|running| running >= MEMORY_CGROUPS_SINCE) {
        return;
    }
    if let Err(error) = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY) {
        debug!(%error, "cannot raise the limit of locked memory");
    }
}

fn loader(pins: &Pins) -> EbpfLoader<'static> {
    raise_memlock_limit();
    let mut loader = EbpfLoader::new();
    // Kernel type information serves programs with CO-RE relocations. Ours have none, and it takes
    // megabytes.
    loader.btf(None).default_map_pin_directory(pins.directory());
    loader
}

/// Returns true if an agent of this ABI created the pinned maps. Maps of another layout cannot even
/// be read.
pub(super) fn abi_matches(pins: &Pins) -> bool {
    let version = || {
        let map = MapData::from_pin(pins.map(names::CONFIG)).ok()?;
        if usize::try_from(map.info().ok()?.value_size()).ok()? != size_of::<Settings>() {
            return None;
        }
        let config = Array::<_, Settings>::try_from(Map::Array(map)).ok()?;
        Some(config.get(&0, 0).ok()?.abi_version)
    };
    version() == Some(ABI_VERSION)
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut SchedClassifier, DatapathError> {
    let program = ebpf.program_mut(name).ok_or(DatapathError::Missing { name })?;
    program.try_into().map_err(|source| program_error("find", name, "the object", source))
}

fn program_error(
    operation: &'static str,
    program: &'static str,
    interface: &str,
    source: ProgramError,
) -> DatapathError {
    DatapathError::Program { operation, program, interface: interface.to_owned(), source: Box::new(source) }
}
