//! The kernel side as the agent sees it: loads, attaches and pins the BPF programs, and keeps their
//! maps up to date. The only module that names aya.
//!
//! All state lives in the kernel, pinned under one bpffs directory. [`Datapath::open`] adopts what
//! an earlier agent of the same ABI left and rebuilds everything else, so start-up takes one path
//! whatever was there before.
//!
//! A redirect works within one network namespace, and interface indexes repeat between namespaces.
//! So every namespace except the host's has a dispatcher ([`NetnsDatapaths`]) in front of one
//! shared copy of the programs. All namespaces share the maps: an attachment id identifies one
//! interface of the host, and every counter exists once.

mod attachments;
mod error;
mod filters;
mod from_guest;
pub(crate) mod heartbeat;
mod hidden_pins;
mod maps;
mod netns_datapaths;
mod pins;
mod policy;
mod programs;
mod refusals;
mod restore;
mod tcx_scan;
#[cfg(feature = "trace-log")]
mod trace_log;

pub use attachments::Attachment;
pub use error::DatapathError;
pub(crate) use from_guest::FromGuestProgram;
pub use maps::Clock;
pub(crate) use maps::{Counters, Heartbeat};
pub(crate) use netns_datapaths::NetnsDatapaths;
pub(crate) use pins::{FilterRecord, StaleState};
pub(crate) use policy::{PortPolicy, SourceRule};
pub use programs::{AttachMode, DISPATCHER, OBJECT, raise_memlock_limit};
pub(crate) use programs::{FilterRemoval, Hook, remove_filter};
pub(crate) use refusals::{Refusal, RefusalRecord, RefusalStream};
pub(crate) use restore::PinState;
pub(crate) use tcx_scan::{ExpectedPrograms, find_detached};

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use metadata_ebpf::abi::{ABI_VERSION, Port, PortKey, Settings, names};
use uuid::Uuid;

use self::maps::Maps;
use self::netns_datapaths::DatapathNamespace;
use self::pins::Pins;
use self::programs::{ProgramSet, Programs};
use self::restore::PinnedMaps;
use crate::ids::{IfIndex, MacAddress};

/// Names of the programs in the kernel.
pub const PROGRAMS: [&str; 2] = [names::FROM_GUEST, names::TO_GUEST];

/// The portal as the programs of one namespace reach it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PortalLink {
    /// Index of this namespace's end of the veth pair.
    pub ifindex: IfIndex,
    /// Namespace id of the portal.
    pub nsid: u32,
    /// MAC address of the portal's end.
    pub mac: MacAddress,
}

/// Limits that the programs enforce.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Time without a heartbeat after which packets are left to the host's own path.
    pub heartbeat_stale_after: Duration,
    /// New connections per second and attachment; 0 disables the limit.
    pub syn_rate: u32,
    /// New connections that may arrive at once.
    pub syn_burst: u32,
}

/// The programs, maps and attachments of one network namespace.
pub struct Datapath {
    maps: Arc<Mutex<Maps>>,
    pins: Pins,
    /// Nothing in other namespaces, which use the maps of the host's.
    pinned_maps: PinnedMaps,
    programs: Programs,
    namespace: DatapathNamespace,
    attachments: BTreeMap<IfIndex, Attachment>,
    portal: Option<PortalLink>,
    /// Limits of the host's namespace, which apply to all.
    limits: Option<Limits>,
    is_adopted: bool,
    /// Entries that an earlier agent left for this namespace. For the host's namespace they are
    /// read from the map instead.
    inherited: Vec<(PortKey, Port)>,
}

impl Datapath {
    /// Loads the programs, on the pinned maps of an earlier agent if these have the same ABI.
    ///
    /// # Errors
    /// `CAP_BPF` (or `CAP_SYS_ADMIN`) or bpffs is missing, or the verifier rejects a program.
    pub fn open(pin_directory: &Path, mode: AttachMode) -> Result<Self, DatapathError> {
        let pins = Pins::open(pin_directory)?;
        let is_adopted = programs::abi_matches(&pins);
        if !is_adopted {
            pins.clear()?;
        }
        let mut ebpf = programs::load_object(&pins, ProgramSet::Host)?;
        #[cfg(feature = "trace-log")]
        trace_log::follow(&mut ebpf);
        let maps = Maps::take(&mut ebpf)?;
        let programs = Programs::load(ebpf, mode)?;
        let pinned_maps = PinnedMaps::open(&pins)?;
        Ok(Self {
            maps: Arc::new(Mutex::new(maps)),
            pins,
            pinned_maps,
            programs,
            namespace: DatapathNamespace::Host,
            attachments: BTreeMap::new(),
            portal: None,
            limits: None,
            is_adopted,
            inherited: Vec::new(),
        })
    }

    /// Returns true if the maps of an earlier agent are in use. If not, attachment ids start again,
    /// and nothing that still refers to earlier ids may stay: the portal's connections.
    #[must_use]
    pub fn is_adopted(&self) -> bool {
        self.is_adopted
    }

    /// Returns the hook that programs are attached to on this kernel.
    pub(crate) fn hook(&self) -> Hook {
        self.programs.hook()
    }

    /// Loads the shared programs of all other namespaces.
    ///
    /// # Errors
    /// The verifier rejects a program.
    pub(crate) fn netns_datapaths(&mut self) -> Result<NetnsDatapaths, DatapathError> {
        let datapaths = NetnsDatapaths::new(Arc::clone(&self.maps), &self.pins, self.hook())?;
        // Now with the slots of the shared programs, which the kernel empties once nothing has them
        // open or pinned.
        self.pinned_maps = PinnedMaps::open(&self.pins)?;
        Ok(datapaths)
    }

    /// Attaches `md_to_guest` to the portal and writes the settings of `md_from_guest`.
    ///
    /// # Errors
    /// The kernel refuses the attachment.
    pub(crate) fn connect_portal(
        &mut self,
        interface: &str,
        portal: PortalLink,
        limits: Limits,
    ) -> Result<(), DatapathError> {
        let next_attachment = self.maps().settings()?.next_attachment.max(1);
        self.programs.attach_to_guest(interface, portal.ifindex, &self.pins.portal())?;
        (self.portal, self.limits) = (Some(portal), Some(limits));
        let syn_interval_ns = 1_000_000_000_u64.checked_div(u64::from(limits.syn_rate)).unwrap_or(0);
        self.maps().put_settings(Settings {
            abi_version: ABI_VERSION,
            portal_ifindex: portal.ifindex.0,
            portal_nsid: portal.nsid,
            next_attachment,
            stale_after_ns: u64::try_from(limits.heartbeat_stale_after.as_nanos()).unwrap_or(u64::MAX),
            syn_interval_ns,
            syn_burst_ns: syn_interval_ns * u64::from(limits.syn_burst),
            hash_keys: Uuid::new_v4().as_u64_pair().into(),
            portal_mac: portal.mac.0,
            _pad: [0; 2],
        })
    }

    /// Connects the programs to the portal through a new interface, after the former one was
    /// removed externally.
    ///
    /// # Errors
    /// The kernel refuses the attachment, or [`Self::connect_portal`] was not called.
    pub(crate) fn reconnect_portal(
        &mut self,
        interface: &str,
        ifindex: IfIndex,
    ) -> Result<(), DatapathError> {
        let (Some(portal), Some(limits)) = (self.portal, self.limits) else {
            return Err(DatapathError::Missing { name: "portal" });
        };
        self.connect_portal(interface, PortalLink { ifindex, ..portal }, limits)
    }

    /// Returns this namespace's end of the veth pair into the portal, once it is connected.
    pub(crate) fn portal(&self) -> Option<IfIndex> {
        self.portal.map(|portal| portal.ifindex)
    }

    /// Opens a separate handle for the heartbeat.
    ///
    /// # Errors
    /// The pin is missing, or the kernel refuses to map it into memory.
    pub(crate) fn heartbeat(&self) -> Result<Heartbeat, DatapathError> {
        Heartbeat::open(&self.pins)
    }

    /// Returns a descriptor of the map of heartbeats, for the process that answers guests.
    ///
    /// # Errors
    /// The pin is missing, or descriptors are exhausted.
    pub(crate) fn heartbeat_descriptor(&self) -> Result<OwnedFd, DatapathError> {
        maps::heartbeat_descriptor(&self.pins)
    }

    /// Opens a separate handle for reading counters and clients.
    ///
    /// # Errors
    /// A pin is missing.
    pub(crate) fn counters(&self) -> Result<Counters, DatapathError> {
        Counters::open(&self.pins)
    }

    /// Follows the packets that the kernel refuses, from all namespaces.
    ///
    /// # Errors
    /// The pin is missing, or the runtime cannot poll the ring buffer.
    pub(crate) fn refusals(&self) -> Result<RefusalStream, DatapathError> {
        RefusalStream::new(maps::refusal_events(&self.pins)?)
    }

    fn maps(&self) -> MutexGuard<'_, Maps> {
        lock(&self.maps)
    }
}

fn lock(maps: &Mutex<Maps>) -> MutexGuard<'_, Maps> {
    // Each call is complete by itself, so a call that panicked leaves no partial state.
    maps.lock().unwrap_or_else(PoisonError::into_inner)
}
