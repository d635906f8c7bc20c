//! Datapaths for network namespaces other than the host's own, all on the host's maps.
//!
//! They share one copy of the programs, which is in slots of a pinned map. Each has [dispatchers](super::object) of a few
//! instructions that say which namespace it is and go on there. A new agent puts its own copy into the slots; were the map
//! not pinned, the kernel would empty it as the agent dies.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use metadata_ebpf::abi::{NetnsContext, Port, PortKey};
use metadata_ebpf::identity::AttachmentId;

use super::hook::{Hook, Programs};
use super::maps::{self, Maps};
use super::object::{self, Dispatchers, ProgramSet};
use super::pins::Pins;
use super::{Datapath, DatapathError, Place, PortalLink, lock};
use crate::net::netns::Netns;

/// Makes them, and removes what is left of those whose namespace is gone.
pub struct NetnsDatapaths {
    maps: Arc<Mutex<Maps>>,
    directory: PathBuf,
    hook: Hook,
    dispatchers: Dispatchers,
    /// Entries that an earlier agent left, by namespace.
    inherited: BTreeMap<u32, Vec<(PortKey, Port)>>,
}

impl NetnsDatapaths {
    pub(super) fn new(maps: Arc<Mutex<Maps>>, pins: &Pins, hook: Hook) -> Result<Self, DatapathError> {
        let mut dispatchers = Dispatchers::new(pins);
        let shared = Programs::load_by(object::load(pins, ProgramSet::Shared)?, hook)?;
        shared.put_into(&mut maps::slots(&mut dispatchers.load(NetnsContext::default())?)?)?;
        let mut inherited = BTreeMap::<_, Vec<_>>::new();
        for (key, port) in lock(&maps).ports()?.into_iter().filter(|(key, _)| key.netns != 0) {
            inherited.entry(key.netns).or_default().push((key, port));
        }
        Ok(Self { maps, directory: pins.directory().to_owned(), hook, dispatchers, inherited })
    }

    /// A datapath in a namespace, connected to the portal by the interface that `portal` tells. `legacy_port` is where a
    /// legacy path of that namespace listens, should it have one.
    ///
    /// # Errors
    /// As [`Datapath::open`] and [`Datapath::connect_portal`].
    pub fn open(
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
        let mut programs = Programs::load_by(self.dispatchers.load(context)?, self.hook)?;
        let pins = Pins::of_netns(&self.directory, inode)?;
        let place = Place::Netns { netns, inode };
        let pin = pins.portal();
        place.run(|| programs.attach_to_guest(interface, portal.ifindex, &pin))?;
        let maps = Arc::clone(&self.maps);
        let inherited = self.inherited.remove(&inode).unwrap_or_default();
        let (attachments, portal) = (BTreeMap::new(), Some(portal.ifindex));
        Ok(Datapath { maps, pins, programs, place, attachments, portal, is_adopted: true, inherited })
    }

    /// The namespaces of which something is there.
    ///
    /// # Errors
    /// The pin directory cannot be read.
    pub fn inodes(&self) -> Result<Vec<u32>, DatapathError> {
        Pins::unlocked(&self.directory).netns()
    }

    /// Removes what there is of a namespace that is gone: its pins, and the entries of its interfaces.
    ///
    /// # Errors
    /// A pin or an entry cannot be removed.
    pub fn remove(&mut self, inode: u32) -> Result<(), DatapathError> {
        let pins = Pins::of_netns(&self.directory, inode)?;
        for mark in pins.filters()? {
            pins.forget_filter(mark.index)?;
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
