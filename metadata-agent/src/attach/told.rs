//! What others were told of each interface: the directory, which answers guests, and by its presence whoever must be asked
//! about single ports. They are told what is new of the interfaces that something happened to, and what they have then is
//! what telling them everything would give.

use std::collections::BTreeMap;
use std::sync::Arc;

use metadata_ebpf::identity::AttachmentId;
use tokio::sync::watch;

use crate::directory::{Binding, BindingChanges, Directory};
use crate::ids::IfIndex;
use crate::inventory::presence::{Presence, Present};

/// All that is told of one interface; by default that there is none.
#[derive(Clone, Debug, Default)]
pub(super) struct Account {
    pub(super) bindings: Vec<(AttachmentId, Binding)>,
    pub(super) present: Option<Present>,
}

/// Who is told, and what they know.
pub(super) struct Told {
    directory: Arc<Directory>,
    presence: watch::Sender<Presence>,
    attachments: BTreeMap<IfIndex, Vec<AttachmentId>>,
    present: BTreeMap<IfIndex, Present>,
}

impl Told {
    pub(super) fn new(directory: Arc<Directory>, presence: watch::Sender<Presence>) -> Self {
        Self { directory, presence, attachments: BTreeMap::new(), present: BTreeMap::new() }
    }

    /// Guests first: who is asked about a port has time.
    pub(super) fn tell(&mut self, accounts: BTreeMap<IfIndex, Account>) {
        let (mut change, mut presence_changed) = (BindingChanges::default(), false);
        for (index, Account { bindings, present }) in accounts {
            let ids: Vec<_> = bindings.iter().map(|(id, _)| *id).collect();
            let before =
                replace(&mut self.attachments, index, Some(ids.clone()).filter(|ids| !ids.is_empty()));
            change.removed.extend(before.unwrap_or_default().into_iter().filter(|id| !ids.contains(id)));
            change.updated.extend(bindings.into_iter().map(|(id, binding)| (id, Arc::new(binding))));
            presence_changed |= self.present.get(&index) != present.as_ref();
            replace(&mut self.present, index, present);
        }
        if !change.removed.is_empty() || !change.updated.is_empty() {
            self.directory.publish(&change);
        }
        // Most hosts have no source that must be asked.
        if presence_changed && !self.presence.is_closed() {
            self.presence.send_replace(self.present.values().cloned().collect());
        }
    }
}

fn replace<T>(map: &mut BTreeMap<IfIndex, T>, index: IfIndex, value: Option<T>) -> Option<T> {
    match value {
        Some(value) => map.insert(index, value),
        None => map.remove(&index),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use proptest::prelude::*;

    use super::*;
    use crate::directory::Owner;
    use crate::ids::VlanId;
    use crate::inventory::presence::Need;

    proptest! {
        /// Whatever is told of whom, and in whatever portions.
        #[test]
        fn what_is_told_bit_by_bit_adds_up(
            portions in proptest::collection::vec(proptest::collection::vec(account(), 0..4), 1..20),
        ) {
            let directory = Arc::new(Directory::default());
            let (sender, presence) = watch::channel(Presence::default());
            let mut told = Told::new(Arc::clone(&directory), sender);
            let mut last = BTreeMap::new();
            for portion in portions {
                last.extend(portion.iter().cloned());
                told.tell(portion.into_iter().collect());

                let wanted: BTreeMap<AttachmentId, (IfIndex, Option<VlanId>)> = last
                    .values()
                    .flat_map(|account| &account.bindings)
                    .map(|(id, binding)| (*id, (binding.index, binding.vlan)))
                    .collect();
                let found = directory.bindings();
                let found: BTreeMap<_, _> =
                    found.into_iter().map(|(id, binding)| (id, (binding.index, binding.vlan))).collect();
                prop_assert_eq!(directory.len(), wanted.len());
                prop_assert_eq!(found, wanted);
                let wanted: Vec<Present> = last.values().filter_map(|account| account.present.clone()).collect();
                prop_assert_eq!(presence.borrow().to_vec(), wanted);
            }
        }
    }

    #[test]
    fn presence_is_told_again_only_when_it_changes() {
        let (sender, mut presence) = watch::channel(Presence::default());
        let mut told = Told::new(Arc::default(), sender);
        let here = Account { bindings: Vec::new(), present: Some(present(3, true)) };
        told.tell([(IfIndex(3), here.clone())].into());
        assert!(presence.has_changed().unwrap());
        presence.mark_unchanged();
        told.tell([(IfIndex(3), here), (IfIndex(4), Account::default())].into());
        assert!(!presence.has_changed().unwrap());
        told.tell([(IfIndex(3), Account::default())].into());
        assert!(presence.has_changed().unwrap() && presence.borrow().is_empty());
    }

    fn present(index: u32, known: bool) -> Present {
        let need = if known { Need::Nothing } else { Need::Identity };
        let device = format!("tap{index}").parse().unwrap();
        Present { device, index: IfIndex(index), mac: None, port: None, need }
    }

    /// Of few interfaces, each with attachments of its own.
    fn account() -> impl Strategy<Value = (IfIndex, Account)> {
        let vlans = proptest::collection::btree_set(0..4u16, 0..3);
        (0..4u32, vlans, proptest::option::of(any::<bool>())).prop_map(|(index, vlans, known)| {
            let binding = |vlan: u16| {
                let id = AttachmentId::new(1 + index * 4 + u32::from(vlan)).unwrap();
                let (interface, since) = (format!("tap{index}"), Instant::now());
                let vlan = VlanId::try_from(u64::from(vlan)).ok();
                (id, Binding { interface, index: IfIndex(index), vlan, since, owner: Owner::Unknown })
            };
            let bindings = vlans.into_iter().map(binding).collect();
            (IfIndex(index), Account { bindings, present: known.map(|known| present(index, known)) })
        })
    }
}
