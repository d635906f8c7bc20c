//! How a program gets onto TC ingress: by a TCX link, pinned, where the kernel has TCX (6.6); by a filter before that.

use std::collections::BTreeMap;
use std::path::Path;
use std::{io, mem};

use aya::Ebpf;
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle, qdisc_detach_program};
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType, TcError};
use aya::util::KernelVersion;
use metadata_ebpf::abi::{names, slots};
use nix::net::if_::if_nametoindex;

use super::DatapathError;
use super::maps::Slots;
use super::pins::Pins;
use crate::ids::IfIndex;

/// Priority and handle of our filter: fixed, so that the next agent finds and replaces it in one step.
const CLSACT_PRIORITY: u16 = 7;
const CLSACT_HANDLE: TcHandle = TcHandle::new(0, 1);

/// The first kernel with TCX (commit e420bed02507).
const TCX_SINCE: KernelVersion = KernelVersion::new(6, 6, 0);

/// What the operator asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AttachMode {
    /// TCX where the kernel has it, else clsact.
    #[default]
    Auto,
    /// TCX, or an error.
    Tcx,
    /// clsact, on any kernel.
    Clsact,
}

/// How programs are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// TCX links: independent of qdiscs, gone with the interface or the pin.
    Tcx,
    /// Filters on the ingress hook of a qdisc, `ingress` or `clsact`.
    Clsact,
}

#[derive(Debug)]
pub(super) struct Programs {
    ebpf: Ebpf,
    hook: Hook,
    /// How the program is attached to the portal's interface.
    portal_hook: Hook,
    ids: BTreeMap<&'static str, u32>,
}

impl Programs {
    pub fn load(mut ebpf: Ebpf, mode: AttachMode) -> Result<Self, DatapathError> {
        let ids = load_all(&mut ebpf)?;
        let has_tcx = || KernelVersion::current().is_ok_and(|running| running >= TCX_SINCE);
        let hook = match mode {
            AttachMode::Tcx => Hook::Tcx,
            AttachMode::Auto if has_tcx() => Hook::Tcx,
            AttachMode::Auto | AttachMode::Clsact => Hook::Clsact,
        };
        Ok(Self { ebpf, hook, portal_hook: hook, ids })
    }

    pub fn hook(&self) -> Hook {
        self.hook
    }

    /// The same by the hook that is known already, without the maps, which the programs hold themselves.
    ///
    /// On the portal's interface there, which is ours and which nobody else has a reason to touch, the program is always a
    /// filter: a TCX link holds the lock of all network configuration over an RCU grace period (`tcx_entry_sync`), some ten
    /// milliseconds, and a network node has a thousand namespaces.
    pub fn load_by(mut ebpf: Ebpf, hook: Hook) -> Result<Self, DatapathError> {
        let maps: Vec<String> = ebpf.maps().map(|(name, _)| name.to_owned()).collect();
        let ids = load_all(&mut ebpf)?;
        for name in maps {
            drop(ebpf.take_map(&name));
        }
        Ok(Self { ebpf, hook, portal_hook: Hook::Clsact, ids })
    }

    /// Puts the programs where dispatchers find them.
    pub fn put_into(mut self, slots: &mut Slots) -> Result<(), DatapathError> {
        for (slot, name) in [(slots::FROM_GUEST, names::FROM_GUEST), (slots::TO_GUEST, names::TO_GUEST)] {
            let program = program(&mut self.ebpf, name)?.fd();
            let program = program.map_err(|source| fault("open", name, "the kernel", source))?;
            slots.put(slot, program)?;
        }
        Ok(())
    }

    /// The kernel's id of a program.
    pub fn id(&self, name: &'static str) -> Result<u32, DatapathError> {
        self.ids.get(name).copied().ok_or(DatapathError::Missing { name })
    }

    /// Whether a program is on an interface by TCX.
    pub fn is_attached(&self, name: &'static str, interface: &str) -> Result<bool, DatapathError> {
        is_on(self.id(name)?, name, interface)
    }

    /// Puts `md_to_guest` on the portal, in place of what an earlier agent put there by either hook.
    pub fn attach_to_guest(
        &mut self,
        interface: &str,
        index: IfIndex,
        pin: &Path,
    ) -> Result<(), DatapathError> {
        let hook = self.portal_hook;
        if !self.adopt(names::TO_GUEST, hook, interface, pin) {
            Pins::remove(pin)?;
            self.attach(names::TO_GUEST, hook, interface, index, pin)?;
        }
        match hook {
            Hook::Tcx => remove_filter(interface, names::TO_GUEST).map(drop),
            Hook::Clsact => Pins::remove(pin),
        }
    }

    pub fn attach_from_guest(
        &mut self,
        interface: &str,
        index: IfIndex,
        pin: &Path,
    ) -> Result<(), DatapathError> {
        self.attach(names::FROM_GUEST, self.hook, interface, index, pin)
    }

    /// Replaces the program of an earlier agent's attachment in one step. `false` if there is none that lives.
    pub fn adopt_from_guest(&mut self, interface: &str, pin: &Path) -> bool {
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
            .map_err(|source| fault("attach", name, interface, source))?;
        // aya attaches by name. If the name went to another interface meanwhile, dropping the link takes it off again.
        if if_nametoindex(interface) != Ok(index.0) {
            return Err(DatapathError::Vanished { interface: interface.to_owned() });
        }
        persist(link, interface, pin)
    }

    fn adopt(&mut self, name: &'static str, hook: Hook, interface: &str, pin: &Path) -> bool {
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
            return false;
        };
        let Ok(program) = program(&mut self.ebpf, name) else {
            return false;
        };
        let Ok(link) = program.attach_to_link(earlier).and_then(|id| program.take_link(id)) else {
            return false;
        };
        if hook == Hook::Clsact {
            mem::forget(link);
        }
        true
    }
}

/// Whether the program with this id is on an interface by TCX, in the namespace of the calling thread. Takes the kernel's lock
/// of all network configuration for a moment.
pub(super) fn is_on(id: u32, name: &'static str, interface: &str) -> Result<bool, DatapathError> {
    let (_, programs) = SchedClassifier::query_tcx(interface, TcAttachType::Ingress)
        .map_err(|source| fault("look for", name, interface, source))?;
    Ok(programs.iter().any(|program| program.id() == id))
}

/// The kernel's ids of the programs, by their names.
fn load_all(ebpf: &mut Ebpf) -> Result<BTreeMap<&'static str, u32>, DatapathError> {
    let mut ids = BTreeMap::new();
    for name in super::PROGRAMS {
        let program = program(ebpf, name)?;
        let info = program.load().and_then(|()| program.info());
        let info = info.map_err(|source| fault("load", name, "the kernel", source))?;
        ids.insert(name, info.id());
    }
    Ok(ids)
}

/// Makes an attachment outlive the process.
fn persist(link: SchedClassifierLink, interface: &str, pin: &Path) -> Result<(), DatapathError> {
    match FdLink::try_from(link) {
        Ok(link) => {
            let pinned = link.pin(pin);
            pinned.map(drop).map_err(|source| DatapathError::Pin {
                interface: interface.to_owned(),
                path: pin.to_owned(),
                source: Box::new(source),
            })
        }
        // A filter needs no pin; it stays until it is removed.
        Err(_) => Ok(()),
    }
}

/// Takes the filter of a program off an interface. `false` if it, or the interface, was not there.
///
/// # Errors
/// The kernel refuses.
pub fn remove_filter(interface: &str, program: &'static str) -> Result<bool, DatapathError> {
    match qdisc_detach_program(interface, TcAttachType::Ingress, program) {
        Ok(()) => Ok(true),
        Err(TcError::IoError(error)) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(_) if if_nametoindex(interface).is_err() => Ok(false),
        Err(source) => Err(fault("detach", program, interface, source.into())),
    }
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut SchedClassifier, DatapathError> {
    let program = ebpf.program_mut(name).ok_or(DatapathError::Missing { name })?;
    program.try_into().map_err(|source| fault("find", name, "the object", source))
}

fn fault(
    operation: &'static str,
    program: &'static str,
    interface: &str,
    source: ProgramError,
) -> DatapathError {
    DatapathError::Program { operation, program, interface: interface.to_owned(), source: Box::new(source) }
}
