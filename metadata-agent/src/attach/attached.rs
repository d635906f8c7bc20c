//! One attached interface: whose it is, and whose the VLANs on it are.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use metadata_ebpf::identity::AttachmentId;
use tracing::{info, warn};

use super::GuestRules;
use crate::datapath::{Datapath, PortPolicy};
use crate::directory::{Binding, Owner};
use crate::ids::{IfIndex, PortId, VlanId};
use crate::inventory::{AmbiguousPortError, Entry, Port, PortRecord, Subport};
use crate::net::netlink::Link;
use crate::proxy::UpstreamAuth;

/// A guest's interface with our program on it.
pub(super) struct Attached {
    pub(super) id: AttachmentId,
    pub(super) link: Link,
    since: Instant,
    owner: Owner,
    subports: BTreeMap<VlanId, Seated>,
}

/// A trunk's subport on it.
struct Seated {
    id: AttachmentId,
    since: Instant,
    owner: Owner,
}

/// What the kernel is told of ports through, and Nova of instances.
pub(super) struct Kernel<'a> {
    pub(super) datapath: &'a mut Datapath,
    pub(super) rules: &'a GuestRules,
    pub(super) introduction: &'a UpstreamAuth,
}

impl Kernel<'_> {
    /// The kernel first, so that a guest that is known is checked from its first answered request on.
    fn tell(&mut self, link: &Link, index: IfIndex, vlan: Option<VlanId>, owner: &Owner) {
        if let Err(error) = self.datapath.set_policy(index, vlan, &self.rules.policy(owner)) {
            warn!(interface = link.name, %error, "the kernel checks this port as before");
        }
    }
}

impl Attached {
    pub(super) fn new(id: AttachmentId, link: Link) -> Self {
        Self { id, link, since: Instant::now(), owner: Owner::Unknown, subports: BTreeMap::new() }
    }

    /// Neutron's id of the port, once it is known.
    pub(super) fn port_id(&self) -> Option<PortId> {
        match &self.owner {
            Owner::Known { port, .. } => port.id,
            Owner::OnNetwork { facts, .. } => facts.id,
            Owner::Unknown | Owner::Disputed => None,
        }
    }

    /// What the kernel shall check of the untagged side, as far as it is known whose that is.
    pub(super) fn policy(&self, rules: &GuestRules) -> PortPolicy {
        rules.policy(&self.owner)
    }

    /// Takes over whose the untagged side is.
    pub(super) fn own(
        &mut self,
        index: IfIndex,
        entry: Result<Option<&Entry>, AmbiguousPortError>,
        kernel: &mut Kernel<'_>,
    ) {
        // One that is no instance's is let go with the next snapshot, and not known until then.
        let owner = match entry {
            Ok(Some(entry)) => Owner::from_entry(entry, kernel.introduction),
            Ok(None) => Owner::Unknown,
            Err(AmbiguousPortError) => Owner::Disputed,
        };
        if matches!(owner, Owner::Known { .. } | Owner::OnNetwork { .. }) && owner == self.owner {
            return;
        }
        kernel.tell(&self.link, index, None, &owner);
        tell_of(&self.link, &self.owner, &owner);
        self.owner = owner;
    }

    /// Takes over which subports there are. All of them are the instance's that the interface is.
    pub(super) fn seat(&mut self, index: IfIndex, wanted: &[Subport], kernel: &mut Kernel<'_>) {
        // Told ahead of its attachment: VLANs have to wait for that.
        if !kernel.datapath.attachments().contains_key(&index) {
            return;
        }
        let Self { link, owner, subports, .. } = self;
        let gone = |vlan: &VlanId| !wanted.iter().any(|subport| subport.vlan == *vlan);
        for vlan in subports.keys().copied().filter(gone).collect::<Vec<_>>() {
            subports.remove(&vlan);
            info!(interface = link.name, %vlan, "trunk subport let go");
            if let Err(error) = kernel.datapath.detach_subport(index, vlan) {
                warn!(interface = link.name, %vlan, %error, "something of the subport stays behind");
            }
        }
        for subport in wanted {
            let vlan = subport.vlan;
            let Some(entry) = entry_of(owner, subport) else { continue };
            let owner = Owner::from_entry(&entry, kernel.introduction);
            if subports.get(&vlan).is_some_and(|seated| seated.owner == owner) {
                continue;
            }
            let id = match kernel.datapath.attach_subport(index, vlan) {
                Ok(id) => id,
                Err(error) => {
                    warn!(interface = link.name, %vlan, %error, "trunk subport cannot be attached");
                    continue;
                }
            };
            let since = subports.get(&vlan).map_or_else(Instant::now, |seated| seated.since);
            kernel.tell(link, index, Some(vlan), &owner);
            info!(interface = link.name, %vlan, attachment = %id, "trunk subport known");
            subports.insert(vlan, Seated { id, since, owner });
        }
    }

    pub(super) fn bindings(&self, index: IfIndex) -> Vec<(AttachmentId, Binding)> {
        let binding = move |id, vlan, since, owner: &Owner| {
            let interface = self.link.name.clone();
            (id, Binding { interface, index, vlan, since, owner: owner.clone() })
        };
        let subports = self.subports.iter();
        let subports =
            subports.map(|(vlan, seated)| binding(seated.id, Some(*vlan), seated.since, &seated.owner));
        std::iter::once(binding(self.id, None, self.since, &self.owner)).chain(subports).collect()
    }
}

/// A subport as a port of whoever its parent is; `None` while that is not known.
fn entry_of(parent: &Owner, subport: &Subport) -> Option<Entry> {
    let Subport { id, network, mac, fixed_ips, allowed_addresses, .. } = subport.clone();
    match parent {
        Owner::Known { port, .. } => {
            let Port { device, instance, project, .. } = Port::clone(port);
            let port = Port { id, device, instance, project, network, mac, fixed_ips, allowed_addresses };
            Some(Entry::Agreed(Arc::new(port)))
        }
        Owner::OnNetwork { .. } => {
            let facts =
                PortRecord { id, network, mac, fixed_ips, allowed_addresses, ..PortRecord::default() };
            Some(Entry::Incomplete(Arc::new(facts)))
        }
        Owner::Unknown | Owner::Disputed => None,
    }
}

fn tell_of(link: &Link, before: &Owner, now: &Owner) {
    let interface = &link.name;
    match (now, before) {
        (Owner::Known { port, .. }, _) => {
            info!(interface, instance = %port.instance, project = %port.project, "guest known");
        }
        (Owner::OnNetwork { facts, .. }, _) => {
            let network = facts.network.map(tracing::field::display);
            info!(interface, network, "guest's network known");
        }
        (Owner::Disputed, Owner::Disputed) | (Owner::Unknown, Owner::Unknown) => {}
        (Owner::Disputed, _) => {
            warn!(interface, "sources contradict each other about this guest; it is not served");
        }
        (Owner::Unknown, _) => info!(interface, "guest not known any more"),
    }
}
