//! Publishes per-interface changes to the directory, which answers guests, and to presence
//! subscribers: the sources that look up single ports.
//!
//! Only the differences of the interfaces at hand are published. They add up to what publishing
//! everything would give.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use metadata_ebpf::identity::AttachmentId;
use tokio::sync::watch;

use crate::directory::{Binding, BindingChanges, Directory, SharedBinding};
use crate::ids::IfIndex;
use crate::inventory::presence::{Presence, Present};

/// All that is published of one interface; nothing by default.
#[derive(Clone, Debug, Default)]
pub(super) struct InterfaceRecord {
    pub(super) own: Vec<(AttachmentId, Binding)>,
    pub(super) shared: Vec<(AttachmentId, SharedBinding)>,
    pub(super) agent: Option<AttachmentId>,
    pub(super) present: Option<Present>,
}

type PublishedIds = BTreeMap<IfIndex, Vec<AttachmentId>>;

/// The subscribers, and what they know.
pub(super) struct BindingPublisher {
    directory: Arc<Directory>,
    /// Subscribers to the presence of guests on the host.
    presence: Option<watch::Sender<Presence>>,
    own: PublishedIds,
    shared: PublishedIds,
    agent: Option<(AttachmentId, IfIndex)>,
    present: BTreeMap<IfIndex, Present>,
}

impl BindingPublisher {
    pub(super) fn new(directory: Arc<Directory>, presence: Option<watch::Sender<Presence>>) -> Self {
        Self {
            directory,
            presence,
            own: BTreeMap::new(),
            shared: BTreeMap::new(),
            agent: None,
            present: BTreeMap::new(),
        }
    }

    /// Publishes the interfaces that changed: to the directory first, because guests wait for it.
    pub(super) fn publish(&mut self, records: BTreeMap<IfIndex, InterfaceRecord>) {
        let (mut own, mut shared) = (BindingChanges::default(), BindingChanges::default());
        let mut agents = Vec::new();
        let mut presence_changed = false;
        for (index, InterfaceRecord { own: bindings, shared: shared_bindings, agent, present }) in records {
            agents.push((index, agent));
            difference(&mut self.own, index, bindings, &mut own);
            difference(&mut self.shared, index, shared_bindings, &mut shared);
            presence_changed |= self.present.get(&index) != present.as_ref();
            replace(&mut self.present, index, present);
        }
        if !own.removed.is_empty() || !own.updated.is_empty() {
            self.directory.publish(&own);
        }
        if !shared.removed.is_empty() || !shared.updated.is_empty() {
            self.directory.publish_shared(&shared);
        }
        // After the others: an interface may have been taken for a guest's until it was known.
        for (index, agent) in agents {
            self.publish_agent(index, agent);
        }
        // Most hosts have no source that looks up single ports.
        if let Some(presence) = self.presence.as_ref().filter(|presence| !presence.is_closed())
            && presence_changed
        {
            presence.send_replace(self.present.values().cloned().collect());
        }
    }

    /// Publishes the agent's own attachment, if this interface has it or had it.
    fn publish_agent(&mut self, index: IfIndex, id: Option<AttachmentId>) {
        let had_it = self.agent.is_some_and(|(_, former)| former == index);
        let agent = id.map(|id| (id, index));
        if agent.is_some() || had_it {
            self.agent = agent;
            self.directory.publish_agent(agent);
        }
    }

    /// Publishes interfaces that were just listed, before they are attached one after the other, so
    /// that a source can look up all of them at once. An empty list is published, too: it says that
    /// the host was scanned. Returns the interfaces.
    pub(super) fn publish_listed(&mut self, listed: impl Iterator<Item = Present>) -> BTreeSet<IfIndex> {
        let Some(presence) = self.presence.as_ref().filter(|presence| !presence.is_closed()) else {
            return BTreeSet::new();
        };
        let mut indexes = BTreeSet::new();
        for present in listed {
            indexes.insert(present.index);
            self.present.insert(present.index, present);
        }
        presence.send_replace(self.present.values().cloned().collect());
        indexes
    }

    /// Withdraws everything that was published.
    pub(super) fn withdraw(&mut self) {
        let agent = self.agent.as_ref().map(|(_, index)| index);
        let published = self.own.keys().chain(self.shared.keys()).chain(agent).chain(self.present.keys());
        self.publish(published.map(|index| (*index, InterfaceRecord::default())).collect());
    }
}

/// Notes the bindings of an interface, and adds what changed to `changes`.
fn difference<T>(
    published: &mut PublishedIds,
    index: IfIndex,
    bindings: Vec<(AttachmentId, T)>,
    changes: &mut BindingChanges<T>,
) {
    let ids: Vec<_> = bindings.iter().map(|(id, _)| *id).collect();
    let before = replace(published, index, Some(ids.clone()).filter(|ids| !ids.is_empty()));
    changes.removed.extend(before.unwrap_or_default().into_iter().filter(|id| !ids.contains(id)));
    changes.updated.extend(bindings.into_iter().map(|(id, binding)| (id, Arc::new(binding))));
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

    use metadata_ebpf::identity::ClientAddress;
    use proptest::prelude::*;

    use super::*;
    use crate::directory::{Credentials, Owner};
    use crate::ids::{NetworkOrRouter, VlanId};
    use crate::inventory::presence::Need;
    use crate::proxy::{ClientDirectory as _, LookupState, NetworkHeader};

    proptest! {
        /// Any interfaces, in any portions.
        #[test]
        fn portions_add_up_to_what_was_published_last(
            portions in proptest::collection::vec(proptest::collection::vec(record(), 0..4), 1..20),
        ) {
            let directory = directory();
            let (sender, presence) = watch::channel(Presence::default());
            let mut publisher = BindingPublisher::new(Arc::clone(&directory), Some(sender));
            let mut last = BTreeMap::new();
            for portion in portions {
                last.extend(portion.iter().cloned());
                publisher.publish(portion.into_iter().collect());

                let wanted: BTreeMap<AttachmentId, (IfIndex, Option<VlanId>)> = last
                    .values()
                    .flat_map(|record| &record.own)
                    .map(|(id, binding)| (*id, (binding.index, binding.vlan)))
                    .collect();
                let found = directory.bindings();
                let found: BTreeMap<_, _> =
                    found.into_iter().map(|(id, binding)| (id, (binding.index, binding.vlan))).collect();
                prop_assert_eq!(directory.len(), wanted.len());
                prop_assert_eq!(found, wanted);
                let wanted: Vec<Present> = last.values().filter_map(|record| record.present.clone()).collect();
                prop_assert_eq!(presence.borrow().to_vec(), wanted);
            }
        }
    }

    #[test]
    fn presence_is_sent_again_only_when_it_changes() {
        let (sender, mut presence) = watch::channel(Presence::default());
        let mut publisher = BindingPublisher::new(directory(), Some(sender));
        let here = InterfaceRecord { present: Some(present(3, true)), ..InterfaceRecord::default() };
        publisher.publish([(IfIndex(3), here.clone())].into());
        assert!(presence.has_changed().unwrap());
        presence.mark_unchanged();
        publisher.publish([(IfIndex(3), here), (IfIndex(4), InterfaceRecord::default())].into());
        assert!(!presence.has_changed().unwrap());
        publisher.publish([(IfIndex(3), InterfaceRecord::default())].into());
        assert!(presence.has_changed().unwrap() && presence.borrow().is_empty());
    }

    #[test]
    fn listed_interfaces_are_present_before_they_are_attached() {
        let (sender, mut presence) = watch::channel(Presence::default());
        let mut publisher = BindingPublisher::new(directory(), Some(sender));
        assert!(publisher.publish_listed(std::iter::empty()).is_empty());
        assert!(presence.has_changed().unwrap(), "an empty host was scanned, too");
        let listed = [3, 4].map(|index| present(index, false));
        assert_eq!(publisher.publish_listed(listed.iter().cloned()), [IfIndex(3), IfIndex(4)].into());
        assert_eq!(presence.borrow_and_update().to_vec(), listed);
        // One is attached; the other could not be.
        let attached = InterfaceRecord { present: Some(present(3, false)), ..InterfaceRecord::default() };
        publisher.publish([(IfIndex(3), attached)].into());
        assert!(!presence.has_changed().unwrap());
        publisher.publish([(IfIndex(4), InterfaceRecord::default())].into());
        assert_eq!(presence.borrow().to_vec(), listed[..1]);
    }

    #[test]
    fn each_namespace_publishes_and_withdraws_its_own_part_only() {
        let directory = directory();
        let ids = || directory.shared().iter().map(|(id, _)| id.get()).collect::<Vec<_>>();
        let mut publishers = [1, 2].map(|_| BindingPublisher::new(Arc::clone(&directory), None));
        for (id, publisher) in (1..).zip(&mut publishers) {
            // Interface indexes repeat between namespaces.
            publisher.publish([(IfIndex(2), shared(id))].into());
        }
        assert_eq!(ids(), [1, 2]);
        publishers[0].withdraw();
        assert_eq!(ids(), [2]);
        publishers[1].publish([(IfIndex(2), shared(3))].into());
        assert_eq!(ids(), [3], "the interface is another attachment now");
    }

    /// The agent's own interface may be attached before it is known as such.
    #[test]
    fn an_attachment_may_turn_out_to_be_the_agents() {
        let directory = directory();
        let mut publisher = BindingPublisher::new(Arc::clone(&directory), None);
        let id = AttachmentId::new(5).unwrap();
        let client = ClientAddress::ipv4(id, [169, 254, 169, 253]);
        let state = || directory.clients().lookup(&client);
        publisher.publish([(IfIndex(2), shared(5))].into());
        assert!(matches!(state(), LookupState::Shared(_)));
        let record = InterfaceRecord { agent: Some(id), ..InterfaceRecord::default() };
        publisher.publish([(IfIndex(2), record)].into());
        assert!(matches!(state(), LookupState::Agent));
        publisher.withdraw();
        assert!(matches!(state(), LookupState::Gone));
    }

    fn directory() -> Arc<Directory> {
        Arc::new(Directory::new(Credentials::ByNetwork(NetworkHeader::Neutron)))
    }

    fn shared(id: u32) -> InterfaceRecord {
        let scope = NetworkOrRouter::Network("11111111-1111-4111-8111-111111111111".parse().unwrap());
        let (namespace, interface) = ("qdhcp-1".into(), "tap1".to_owned());
        let binding = SharedBinding { namespace, interface, index: IfIndex(2), since: Instant::now(), scope };
        let shared = vec![(AttachmentId::new(id).unwrap(), binding)];
        InterfaceRecord { shared, ..InterfaceRecord::default() }
    }

    fn present(index: u32, known: bool) -> Present {
        let need = if known { Need::Nothing } else { Need::Identity };
        let device = format!("tap{index}").parse().unwrap();
        Present { device, index: IfIndex(index), mac: None, port: None, need }
    }

    /// Generates records of a few interfaces, each with its own attachments.
    fn record() -> impl Strategy<Value = (IfIndex, InterfaceRecord)> {
        let vlans = proptest::collection::btree_set(0..4u16, 0..3);
        (0..4u32, vlans, proptest::option::of(any::<bool>())).prop_map(|(index, vlans, known)| {
            let binding = |vlan: u16| {
                let id = AttachmentId::new(1 + index * 4 + u32::from(vlan)).unwrap();
                let (interface, since) = (format!("tap{index}"), Instant::now());
                let vlan = VlanId::try_from(u64::from(vlan)).ok();
                let (index, unknown_since, owner) = (IfIndex(index), since, Owner::Unknown);
                (id, Binding { interface, index, vlan, since, unknown_since, owner })
            };
            let own = vlans.into_iter().map(binding).collect();
            let present = known.map(|known| present(index, known));
            (IfIndex(index), InterfaceRecord { own, present, ..InterfaceRecord::default() })
        })
    }
}
