//! Datapaths for network namespaces other than the host's, all on the host's maps.
//!
//! They share one copy of the programs, in the slots of a pinned map. Each namespace has
//! [dispatchers](super::programs::Dispatchers) of a few instructions, which state the namespace and
//! tail-call the shared copy. A new agent puts its own copy into the slots. If the map were not
//! pinned, the kernel would empty it when the agent dies.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use metadata_ebpf::abi::{NetnsContext, Port, PortKey};
use metadata_ebpf::identity::AttachmentId;

use super::maps::{self, Maps};
use super::pins::Pins;
use super::programs::{self, Dispatchers, Hook, ProgramSet, Programs};
use super::restore::PinnedMaps;
use super::{Datapath, DatapathError, PortalLink, lock};
use crate::ids::{IfIndex, VlanId};
use crate::net::netns::Netns;

/// Opens datapaths in other namespaces, and removes the state of namespaces that are gone.
pub(crate) struct NetnsDatapaths {
    maps: Arc<Mutex<Maps>>,
    directory: PathBuf,
    hook: Hook,
    dispatchers: Dispatchers,
    /// Entries that an earlier agent left, by namespace.
    inherited: BTreeMap<u32, Vec<(PortKey, Port)>>,
}

impl NetnsDatapaths {
    pub(super) fn new(maps: Arc<Mutex<Maps>>, pins: &Pins, hook: Hook) -> Result<Self, DatapathError> {
        // Load the shared programs and put them into the slots.
        let mut dispatchers = Dispatchers::new(pins);
        let shared = Programs::load_shared(programs::load_object(pins, ProgramSet::Shared)?, hook)?;
        shared.put_into(&mut maps::slots(&mut dispatchers.load(NetnsContext::default())?)?)?;

        // Collect the entries of an earlier agent.
        let mut inherited = BTreeMap::<_, Vec<_>>::new();
        for (key, port) in lock(&maps).ports()?.into_iter().filter(|(key, _)| key.netns != 0) {
            inherited.entry(key.netns).or_default().push((key, port));
        }
        Ok(Self { maps, directory: pins.directory().to_owned(), hook, dispatchers, inherited })
    }

    /// Opens a datapath in a namespace and connects it to the portal through `interface`. A legacy
    /// path of that namespace, if there is one, listens on `legacy_port`.
    ///
    /// # Errors
    /// As [`Datapath::open`] and [`Datapath::connect_portal`].
    pub(crate) fn open(
        &mut self,
        netns: Arc<Netns>,
        interface: &str,
        portal: PortalLink,
        legacy_port: u16,
    ) -> Result<Datapath, DatapathError> {
        let inode = netns.inode()?;
        let context = NetnsContext {
            netns: inode,
            portal_ifindex: portal.ifindex.0,
            portal_nsid: portal.nsid,
            legacy_port: legacy_port.into(),
        };
        let mut programs = Programs::load_shared(self.dispatchers.load(context)?, self.hook)?;
        let pins = Pins::of_netns(&self.directory, inode)?;
        let namespace = DatapathNamespace::Other { netns, inode };
        let pin = pins.portal();
        namespace.run(|| programs.attach_to_guest(interface, portal.ifindex, &pin))?;
        let maps = Arc::clone(&self.maps);
        let inherited = self.inherited.remove(&inode).unwrap_or_default();
        Ok(Datapath {
            maps,
            pins,
            pinned_maps: PinnedMaps::default(),
            programs,
            namespace,
            attachments: BTreeMap::new(),
            portal: Some(portal),
            limits: None,
            is_adopted: true,
            inherited,
        })
    }

    /// Returns the inodes of the namespaces that have state here.
    ///
    /// # Errors
    /// The pin directory cannot be read.
    pub(crate) fn inodes(&self) -> Result<Vec<u32>, DatapathError> {
        Pins::unlocked(&self.directory).netns()
    }

    /// Removes the state of a namespace that is gone: its pins, and the entries of its interfaces.
    ///
    /// # Errors
    /// A pin or an entry cannot be removed.
    pub(crate) fn remove(&mut self, inode: u32) -> Result<(), DatapathError> {
        let pins = Pins::of_netns(&self.directory, inode)?;
        for record in pins.filters()? {
            pins.forget_filter(record.index)?;
        }
        pins.remove_all()?;
        self.inherited.remove(&inode);
        let mut maps = lock(&self.maps);
        for (key, port) in maps.ports()?.into_iter().filter(|(key, _)| key.netns == inode) {
            if let Some(id) = AttachmentId::new(port.attachment) {
                maps.remove_port(key, id)?;
            }
        }
        Ok(())
    }
}

/// The namespace of a datapath.
pub(super) enum DatapathNamespace {
    Host,
    Other { netns: Arc<Netns>, inode: u32 },
}

impl DatapathNamespace {
    /// Returns the inode as the kernel's keys contain it: 0 for the host.
    pub(super) fn inode(&self) -> u32 {
        match self {
            Self::Host => 0,
            Self::Other { inode, .. } => *inode,
        }
    }

    pub(super) fn is_host(&self) -> bool {
        matches!(self, Self::Host)
    }

    pub(super) fn key(&self, index: IfIndex, vlan: Option<VlanId>) -> PortKey {
        PortKey { netns: self.inode(), ifindex: index.0, vlan: vlan.map_or(0, |vlan| vlan.get().into()) }
    }

    /// Runs `work` in the namespace, because aya looks up interfaces by name in that of the thread.
    pub(super) fn run<T: Send>(
        &self,
        work: impl FnOnce() -> Result<T, DatapathError> + Send,
    ) -> Result<T, DatapathError> {
        match self {
            Self::Host => work(),
            Self::Other { netns, .. } => netns.run(work)?,
        }
    }
}
