//! Programs on guest-facing interfaces: put there, adopted, put back, let go, and the policy that they keep.

use std::collections::BTreeMap;
use std::path::Path;

use metadata_ebpf::abi::names;
use metadata_ebpf::identity::AttachmentId;

use super::hook::{Hook, Programs, remove_filter};
use super::pins::{FilterRecord, Pins};
use super::policy::{PortPolicy, port_entry};
use super::{Datapath, DatapathError, lock};
use crate::ids::{IfIndex, VlanId};

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

impl Datapath {
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

    /// An id for [`Self::attach`], so that whoever needs it can prepare.
    ///
    /// # Errors
    /// The map refuses.
    pub fn reserve_id(&mut self) -> Result<AttachmentId, DatapathError> {
        self.maps().next_attachment()
    }

    /// Attaches `md_from_guest` to an interface that carries none, under an id from [`Self::reserve_id`], and with a policy from
    /// the first packet on. Where that takes a qdisc it must be there; `made_qdisc`: the caller made it just now.
    ///
    /// A filter of an earlier agent stays where programs are attached by TCX now: see [`Self::filter`].
    ///
    /// # Errors
    /// The interface is gone, or the kernel refuses. Only what [`Self::filter`] tells can be left behind then.
    pub fn attach(
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
        self.maps().put_attachment_state(id)?;
        self.maps().put_port(key, &port_entry(id, policy))?;
        let Self { place, programs, pins, .. } = self;
        let attached = place.run(|| match programs.hook() {
            Hook::Tcx => programs.attach_from_guest(interface, index, &pin),
            Hook::Clsact => attach_filter(programs, pins, index, interface, made_qdisc, &pin),
        });
        if attached.is_err() {
            self.maps().remove_port(key, id)?;
            return attached;
        }
        self.note(id, index, interface);
        Ok(())
    }

    fn note(&mut self, id: AttachmentId, index: IfIndex, interface: &str) {
        let attachment = Attachment { id, interface: interface.to_owned(), subports: BTreeMap::new() };
        self.attachments.insert(index, attachment);
    }

    /// Whether the program of an interface, a guest's or the portal's, is on it by TCX. `interface` is its name now.
    ///
    /// # Errors
    /// The kernel does not tell, as of an interface that is gone.
    pub fn is_attached(&self, index: IfIndex, interface: &str) -> Result<bool, DatapathError> {
        self.place.run(|| self.programs.is_attached(self.program_of(index), interface))
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

    /// Puts the program back on an interface that somebody took it off, a guest's or the portal's. `interface` is its name now.
    /// It is the same attachment: connections go on.
    ///
    /// # Errors
    /// The interface is gone or has no qdisc where the program needs one, or the kernel refuses otherwise.
    pub fn reattach(&mut self, index: IfIndex, interface: &str) -> Result<(), DatapathError> {
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
            pins.record_filter(FilterRecord { index, owns_qdisc: false })?;
        }
        place.run(|| programs.attach_from_guest(interface, index, &pin))
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
        if entry == before { Ok(()) } else { maps.put_port(key, &entry) }
    }

    /// Lets go of an interface that is gone or that is no guest's any more, with all VLANs on it. A filter, which the program
    /// is then left in, is to be taken off apart. Its client records go with the next [`Self::sweep`]; no one can reach them,
    /// as attachment ids are never used twice.
    ///
    /// # Errors
    /// A pin or an entry cannot be removed.
    pub fn detach(&mut self, index: IfIndex) -> Result<Option<Attachment>, DatapathError> {
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
    pub fn remove_orphans(&mut self) -> Result<(), DatapathError> {
        let attached: BTreeMap<(u32, u32), AttachmentId> = self.ids().collect();
        let inherited = std::mem::take(&mut self.inherited);
        let mut maps = lock(&self.maps);
        // All entries of all namespaces: not to be looked through for each of them.
        let known = if self.place.is_host() { maps.ports()? } else { inherited };
        for (key, port) in known {
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

    /// Every attachment by the fields of its key, interface index and VLAN id.
    fn ids(&self) -> impl Iterator<Item = ((u32, u32), AttachmentId)> {
        self.attachments.iter().flat_map(|(index, attachment)| {
            let subports = attachment.subports.iter().map(|(vlan, id)| (u32::from(vlan.get()), *id));
            let all = std::iter::once((0, attachment.id)).chain(subports);
            all.map(|(vlan, id)| ((index.0, vlan), id))
        })
    }

    /// The attachments, by interface.
    #[must_use]
    pub fn attachments(&self) -> &BTreeMap<IfIndex, Attachment> {
        &self.attachments
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
    pins.record_filter(FilterRecord { index, owns_qdisc: made_qdisc })?;
    // An agent of another ABI may have left its filter in the same place. Not replaced but removed, by its name: what
    // stands there may be somebody else's.
    let had_filter = remove_filter(interface, names::FROM_GUEST)?;
    // A qdisc of ours that somebody deleted took our filter along: without it, what is there now is somebody else's.
    if !made_qdisc && !had_filter {
        pins.disown_qdisc(index)?;
    }
    programs.attach_from_guest(interface, index, pin)
}
