//! VLANs on an attached interface that are attachments of their own.

use super::policy::{PortPolicy, port_entry};
use super::{Datapath, DatapathError, lock};
use crate::ids::{IfIndex, VlanId};
use metadata_ebpf::identity::AttachmentId;

impl Datapath {
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
        maps.put_attachment_state(id)?;
        maps.put_port(self.place.key(index, Some(vlan)), &port_entry(id, &PortPolicy::default()))?;
        attachment.subports.insert(vlan, id);
        Ok(id)
    }

    /// Makes nothing of a VLAN again; fine if it was nothing.
    ///
    /// # Errors
    /// A map refuses.
    pub fn detach_subport(&mut self, index: IfIndex, vlan: VlanId) -> Result<(), DatapathError> {
        let attachment = self.attachments.get_mut(&index);
        let id = attachment.and_then(|attachment| attachment.subports.remove(&vlan));
        id.map_or(Ok(()), |id| self.maps().remove_port(self.place.key(index, Some(vlan)), id))
    }
}
