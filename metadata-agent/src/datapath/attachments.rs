//! The attachments of one namespace: guest interfaces with their programs, and VLANs on them.

use std::collections::BTreeMap;
use std::sync::Arc;

use metadata_ebpf::abi::names;
use metadata_ebpf::identity::AttachmentId;

use super::filters::attach_filter;
use super::netns_datapaths::DatapathNamespace;
use super::pins::Pins;
use super::policy::port_entry;
use super::programs::Adoption;
use super::{Datapath, DatapathError, ExpectedPrograms, FilterRecord, Hook, PortPolicy, lock};
use crate::ids::{IfIndex, MacAddress, VlanId};

/// A guest-facing interface that carries `md_from_guest`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// Part of the identity addresses of the attachment's clients.
    pub id: AttachmentId,
    pub interface: String,
    /// VLANs on the interface that are attachments of their own.
    pub subports: BTreeMap<VlanId, AttachmentId>,
}

impl Datapath {
    /// Adopts the attachment that an earlier agent left on an interface, if its program still runs
    /// and the interface is the same.
    ///
    /// # Errors
    /// A map operation fails.
    pub fn adopt(&mut self, index: IfIndex, interface: &str) -> Result<Option<AttachmentId>, DatapathError> {
        if let Some(attachment) = self.attachments.get(&index) {
            return Ok(Some(attachment.id));
        }
        let pin = self.pins.guest(index);
        let Some(port) = self.maps().port(self.namespace.key(index, None))? else { return Ok(None) };
        let Some(id) = AttachmentId::new(port.attachment) else { return Ok(None) };
        if !self.maps().has_device(id)? {
            return Ok(None);
        }
        let Self { namespace, programs, .. } = self;
        let adoption = namespace.run(|| Ok(programs.adopt_from_guest(interface, &pin)))?;
        let id = Some(id).filter(|_| adoption == Adoption::Adopted);
        if let Some(id) = id {
            self.insert(id, index, interface);
        }
        Ok(id)
    }

    /// Reserves an id for [`Self::attach`], so that the caller can prepare for its clients.
    ///
    /// # Errors
    /// A map operation fails.
    pub(crate) fn reserve_id(&mut self) -> Result<AttachmentId, DatapathError> {
        self.maps().next_attachment()
    }

    /// Attaches `md_from_guest` to an interface under an id from [`Self::reserve_id`]. The policy
    /// applies from the first packet on.
    ///
    /// A [`Hook::Clsact`] needs a qdisc on the interface. `made_qdisc` states that the caller has
    /// just created it. Where programs are attached by TCX, a filter of an earlier agent stays: see
    /// [`Self::filter`].
    ///
    /// # Errors
    /// The interface is gone, or the kernel refuses. Then at most the filter of [`Self::filter`] is
    /// left.
    pub(crate) fn attach(
        &mut self,
        id: AttachmentId,
        index: IfIndex,
        interface: &str,
        mac: Option<MacAddress>,
        made_qdisc: bool,
        policy: &PortPolicy,
    ) -> Result<(), DatapathError> {
        let pin = self.pins.guest(index);
        Pins::remove(&pin)?;
        // The entry exists before the program runs, so no packet finds an unknown interface.
        let key = self.namespace.key(index, None);
        self.maps().put_attachment(key, id, policy.is_shared(), mac)?;
        self.maps().put_port(key, &port_entry(id, policy))?;
        let Self { namespace, programs, pins, maps, .. } = self;
        let attached = namespace.run(|| {
            lock(maps).put_device(id, index)?;
            match programs.hook() {
                Hook::Tcx => programs.attach_from_guest(interface, index, &pin)?,
                Hook::Clsact => attach_filter(programs, pins, index, interface, made_qdisc, &pin)?,
            }
            // Otherwise the program may be on the interface's successor.
            if lock(maps).has_device(id)? { Ok(()) } else { Err(DatapathError::Replaced { index }) }
        });
        if attached.is_err() {
            Pins::remove(&pin)?;
            self.maps().remove_port(key, id)?;
            return attached;
        }
        self.insert(id, index, interface);
        Ok(())
    }

    fn insert(&mut self, id: AttachmentId, index: IfIndex, interface: &str) {
        let attachment = Attachment { id, interface: interface.to_owned(), subports: BTreeMap::new() };
        self.attachments.insert(index, attachment);
    }

    /// Returns true if the program of a guest's interface or of the portal is attached by TCX.
    /// `interface` is the current name.
    ///
    /// # Errors
    /// The kernel refuses the query, for example because the interface is gone.
    pub(crate) fn is_attached(&self, index: IfIndex, interface: &str) -> Result<bool, DatapathError> {
        self.namespace.run(|| self.programs.is_attached(self.program_of(index), interface))
    }

    /// Returns the kernel's id of the program of a guest's interface or of the portal.
    ///
    /// # Errors
    /// The object lacks the program.
    pub(crate) fn program_id(&self, index: IfIndex) -> Result<u32, DatapathError> {
        self.programs.id(self.program_of(index))
    }

    fn program_of(&self, index: IfIndex) -> &'static str {
        if self.portal() == Some(index) { names::TO_GUEST } else { names::FROM_GUEST }
    }

    /// Returns true if the interface of an attachment is gone. An interface that has its index now
    /// is another one and belongs to another guest.
    ///
    /// # Errors
    /// A map operation fails.
    pub(crate) fn is_replaced(&self, index: IfIndex) -> Result<bool, DatapathError> {
        match self.attachments.get(&index) {
            Some(attachment) => Ok(!self.maps().has_device(attachment.id)?),
            None => Ok(false),
        }
    }

    /// Attaches the program of a guest's interface or of the portal again after it was detached
    /// externally. `interface` is the current name. The attachment stays the same, so connections
    /// continue.
    ///
    /// # Errors
    /// The interface is gone or lacks the qdisc that the program needs, or the kernel refuses.
    pub(crate) fn reattach(&mut self, index: IfIndex, interface: &str) -> Result<(), DatapathError> {
        // The successor of the interface must not become the same attachment.
        if self.is_replaced(index)? {
            return Err(DatapathError::Replaced { index });
        }
        let Self { namespace, programs, pins, portal, attachments, .. } = self;
        if portal.is_some_and(|portal| portal.ifindex == index) {
            let pin = pins.portal();
            return namespace.run(|| programs.attach_to_guest(interface, index, &pin));
        }
        if !attachments.contains_key(&index) {
            return Err(DatapathError::NotAttached { index });
        }
        let pin = pins.guest(index);
        Pins::remove(&pin)?;
        if programs.hook() == Hook::Clsact {
            pins.record_filter(FilterRecord { index, owns_qdisc: false })?;
        }
        namespace.run(|| programs.attach_from_guest(interface, index, &pin))?;
        if self.is_replaced(index)? {
            Pins::remove(&self.pins.guest(index))?;
            return Err(DatapathError::Replaced { index });
        }
        Ok(())
    }

    /// Writes the policy of an attachment, or of a VLAN on it, to the kernel. Does nothing if there
    /// is no such attachment.
    ///
    /// # Errors
    /// A map operation fails.
    pub(crate) fn set_policy(
        &mut self,
        index: IfIndex,
        vlan: Option<VlanId>,
        policy: &PortPolicy,
    ) -> Result<(), DatapathError> {
        let Some(attachment) = self.attachments.get(&index) else { return Ok(()) };
        let id = vlan.map_or(Some(attachment.id), |vlan| attachment.subports.get(&vlan).copied());
        let key = self.namespace.key(index, vlan);
        let mut maps = self.maps();
        let (Some(id), Some(before)) = (id, maps.port(key)?) else { return Ok(()) };
        let entry = port_entry(id, policy);
        if entry == before { Ok(()) } else { maps.put_port(key, &entry) }
    }

    /// Detaches the program from an interface, with all VLANs on it. A filter is not removed: that
    /// is left to the caller.
    ///
    /// # Errors
    /// A pin or an entry cannot be removed.
    pub fn detach(&mut self, index: IfIndex) -> Result<Option<Attachment>, DatapathError> {
        let Some(attachment) = self.attachments.remove(&index) else {
            return Ok(None);
        };
        Pins::remove(&self.pins.guest(index))?;
        self.maps().remove_port(self.namespace.key(index, None), attachment.id)?;
        for (vlan, id) in &attachment.subports {
            self.maps().remove_port(self.namespace.key(index, Some(*vlan)), *id)?;
        }
        Ok(Some(attachment))
    }

    /// Makes a VLAN on an attached interface an attachment of its own, or returns the id that it
    /// already has.
    ///
    /// # Errors
    /// The interface is not attached, or a map operation fails.
    pub(crate) fn attach_subport(
        &mut self,
        index: IfIndex,
        vlan: VlanId,
    ) -> Result<AttachmentId, DatapathError> {
        let Some(attachment) = self.attachments.get_mut(&index) else {
            return Err(DatapathError::NotAttached { index });
        };
        if let Some(id) = attachment.subports.get(&vlan) {
            return Ok(*id);
        }
        let key = self.namespace.key(index, Some(vlan));
        let mut maps = lock(&self.maps);
        let maps = &mut *maps;
        let id = maps.next_attachment()?;
        maps.put_attachment(key, id, false, None)?;
        let prepared = self.namespace.run(|| {
            maps.put_device(id, index)?;
            if !maps.has_device(attachment.id)? {
                return Err(DatapathError::Replaced { index });
            }
            maps.put_port(key, &port_entry(id, &PortPolicy::default()))
        });
        if prepared.is_err() {
            maps.remove_port(key, id)?;
        }
        prepared?;
        attachment.subports.insert(vlan, id);
        Ok(id)
    }

    /// Removes the attachment of a VLAN, if there is one.
    ///
    /// # Errors
    /// A map operation fails.
    pub(crate) fn detach_subport(&mut self, index: IfIndex, vlan: VlanId) -> Result<(), DatapathError> {
        let attachment = self.attachments.get_mut(&index);
        let id = attachment.and_then(|attachment| attachment.subports.remove(&vlan));
        id.map_or(Ok(()), |id| self.maps().remove_port(self.namespace.key(index, Some(vlan)), id))
    }

    /// Removes the links and map entries that an earlier agent left for interfaces that are not
    /// attached now.
    ///
    /// # Errors
    /// A pin or an entry cannot be removed.
    pub(crate) fn remove_orphans(&mut self) -> Result<(), DatapathError> {
        // The map holds the entries of all namespaces: scanning it once per namespace would be
        // quadratic.
        let attached: BTreeMap<(u32, u32), AttachmentId> = self.ids().collect();
        let inherited = std::mem::take(&mut self.inherited);
        let mut maps = lock(&self.maps);
        let entries = if self.namespace.is_host() { maps.ports()? } else { inherited };
        for (key, port) in entries {
            if key.netns != self.namespace.inode() {
                continue;
            }
            let is_orphan =
                attached.get(&(key.ifindex, key.vlan)).is_none_or(|id| id.get() != port.attachment);
            if let Some(id) = AttachmentId::new(port.attachment).filter(|_| is_orphan) {
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

    /// Returns every attachment by interface index and VLAN id, the fields of its key.
    fn ids(&self) -> impl Iterator<Item = ((u32, u32), AttachmentId)> {
        self.attachments.iter().flat_map(|(index, attachment)| {
            let subports = attachment.subports.iter().map(|(vlan, id)| (u32::from(vlan.get()), *id));
            let all = std::iter::once((0, attachment.id)).chain(subports);
            all.map(|(vlan, id)| ((index.0, vlan), id))
        })
    }

    /// Returns the programs that [`find_detached`] should find. `None` for the host's own
    /// namespace, and where programs are attached as filters.
    ///
    /// # Errors
    /// The object lacks the program.
    pub(crate) fn expected_programs(&self) -> Result<Option<ExpectedPrograms>, DatapathError> {
        let DatapathNamespace::Other { netns, .. } = &self.namespace else { return Ok(None) };
        if self.hook() != Hook::Tcx {
            return Ok(None);
        }
        let interface = |(index, attachment): (&IfIndex, &Attachment)| (*index, attachment.interface.clone());
        Ok(Some(ExpectedPrograms {
            netns: Arc::clone(netns),
            program: self.programs.id(names::FROM_GUEST)?,
            interfaces: self.attachments.iter().map(interface).collect(),
        }))
    }
}
