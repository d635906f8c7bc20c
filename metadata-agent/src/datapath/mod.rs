//! The kernel side as the agent handles it: programs loaded, attached and pinned, maps kept in step. The only module
//! that names aya.
//!
//! State lives in the kernel, pinned under one bpffs directory. [`Datapath::open`] adopts what a dead agent of the same ABI left and rebuilds everything else, so there is
//! one way in, whatever was there before.
//!
//! A redirection works inside one network namespace, and interface indexes repeat between namespaces. So for each
//! namespace but the host's there is a front that knows where it is ([`NetnsDatapaths`]), before one copy of the programs. All
//! share the maps: an attachment id is of one interface on the host, and what is there is counted once.

mod attachments;
mod branches;
mod error;
mod filters;
pub mod heartbeat;
mod hook;
mod maps;
mod object;
mod pins;
mod place;
mod policy;
mod remains;
mod subports;
mod tour;
#[cfg(feature = "trace-log")]
mod trace_log;

pub use attachments::Attachment;
pub use branches::NetnsDatapaths;
pub use error::DatapathError;
pub use hook::{AttachMode, Hook, remove_filter};
pub use maps::{ClientRecord, Clock, Counters, Heartbeat};
pub use object::{DISPATCHER, OBJECT};
pub use pins::FilterRecord;
pub use policy::PortPolicy;
pub use remains::StaleState;
pub use tour::{ExpectedPrograms, find_detached};

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use metadata_ebpf::abi::{ABI_VERSION, Port, PortKey, Settings, names};

use crate::ids::{IfIndex, MacAddress};
use hook::Programs;
use maps::Maps;
use object::ProgramSet;
use pins::Pins;
use place::Place;

/// The names of the programs, for who looks for them in the kernel.
pub const PROGRAMS: [&str; 2] = [names::FROM_GUEST, names::TO_GUEST];

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
    /// Entries of this namespace that an earlier agent left; those of the host's own are looked for in the map.
    inherited: Vec<(PortKey, Port)>,
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
        let mut ebpf = object::load(&pins, ProgramSet::Host)?;
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
            inherited: Vec::new(),
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
    ///
    /// # Errors
    /// When the verifier refuses the copy of the programs for them.
    pub fn netns_datapaths(&self) -> Result<NetnsDatapaths, DatapathError> {
        NetnsDatapaths::new(Arc::clone(&self.maps), &self.pins, self.hook())
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

    /// The host end of the portal, once it is connected.
    #[must_use]
    pub fn portal(&self) -> Option<IfIndex> {
        self.portal
    }

    /// Removes clients that were idle for `idle` or whose attachment is gone, of all namespaces, and sets the counts of the others right.
    ///
    /// # Errors
    /// The map refuses.
    pub fn sweep(&mut self, idle: Duration) -> Result<usize, DatapathError> {
        self.maps().sweep(idle)
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

fn lock(maps: &Mutex<Maps>) -> MutexGuard<'_, Maps> {
    // Each call on it is whole by itself, so one that panicked leaves nothing half done.
    maps.lock().unwrap_or_else(PoisonError::into_inner)
}
