//! One attached interface: its clients, its policy, and the trunk subports on it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use metadata_ebpf::identity::AttachmentId;
use tracing::{info, warn};

use super::Changes;
use super::failures::{FailureTable, Step};
use super::publish::InterfaceRecord;
use super::wanted::{AttachSpec, Clients};
use crate::datapath::{Datapath, PortPolicy};
use crate::directory::{Binding, Owner, SharedBinding};
use crate::ids::VlanId;
use crate::inventory::presence::Present;
use crate::net::netlink::Link;

/// An interface with our program on it.
pub(super) struct Attached {
    pub(super) id: AttachmentId,
    pub(super) link: Link,
    since: Instant,
    unknown_since: Instant,
    clients: Clients,
    /// The policy in the map, or `None` if another agent wrote it.
    policy: Option<PortPolicy>,
    present: Option<Present>,
    subports: BTreeMap<VlanId, AttachedSubport>,
}

struct AttachedSubport {
    id: AttachmentId,
    since: Instant,
    unknown_since: Instant,
    owner: Owner,
}

/// The kernel side of one namespace, as an interface updates it.
pub(super) struct Kernel<'a> {
    pub(super) datapath: &'a mut Datapath,
    pub(super) failures: &'a mut FailureTable,
    pub(super) namespace: Option<&'a str>,
}

impl Kernel<'_> {
    fn record(&mut self, link: &Link, step: Step, error: String) {
        self.failures.record(self.namespace, (link.index, &link.name), step, error);
    }
}

impl Attached {
    /// Attached by this specification, but without the subports: [`Self::update`] attaches them.
    pub(super) fn new(id: AttachmentId, link: Link, spec: &AttachSpec, policy: Option<PortPolicy>) -> Self {
        log_owner(&link, &Clients::One(Owner::Unknown), &spec.clients);
        let now = Instant::now();
        Self {
            id,
            link,
            since: now,
            unknown_since: now,
            clients: spec.clients.clone(),
            policy,
            present: spec.present.clone(),
            subports: BTreeMap::new(),
        }
    }

    /// Returns true if no guest is behind the interface, but the agent itself.
    pub(super) fn is_agents(&self) -> bool {
        self.clients == Clients::Agent
    }

    /// Applies a new specification: to the kernel first, so that the packets of a guest are checked
    /// before its first request is answered.
    pub(super) fn update(
        &mut self,
        link: Link,
        spec: AttachSpec,
        kernel: &mut Kernel<'_>,
        changes: &mut Changes,
    ) {
        let AttachSpec { clients, policy, subports, present, unserved_subnets } = spec;
        let index = link.index;
        if self.link.name != link.name || self.link.mac != link.mac {
            changes.updated.insert(index);
        }
        self.link = link;

        // The kernel: the policy, and the subports, which belong to the same instance.
        if self.policy.as_ref() == Some(&policy) {
            kernel.failures.clear(index, Step::SetPolicy);
        } else {
            match kernel.datapath.set_policy(index, None, &policy) {
                Ok(()) => {
                    kernel.failures.clear(index, Step::SetPolicy);
                    self.policy = Some(policy);
                }
                Err(error) => kernel.record(&self.link, Step::SetPolicy, error.to_string()),
            }
        }
        self.update_subports(&subports, kernel, changes);
        match unserved_subnets {
            Some(unserved_subnets) => kernel.record(&self.link, Step::FitSubnets, unserved_subnets),
            None => kernel.failures.clear(index, Step::FitSubnets),
        }

        // Log a change of the owner.
        let clients = self.clients.changed_to(clients);
        if self.clients != clients {
            log_owner(&self.link, &self.clients, &clients);
            if let (Clients::One(before), Clients::One(next)) = (&self.clients, &clients)
                && before.is_lost_in(next)
            {
                self.unknown_since = Instant::now();
            }
            self.clients = clients;
            changes.updated.insert(index);
        }
        if self.present != present {
            self.present = present;
            changes.updated.insert(index);
        }
    }

    fn update_subports(
        &mut self,
        wanted: &BTreeMap<VlanId, (Owner, PortPolicy)>,
        kernel: &mut Kernel<'_>,
        changes: &mut Changes,
    ) {
        let Self { link, subports, .. } = self;
        let index = link.index;
        let removed = |vlan: &VlanId| !wanted.contains_key(vlan);
        for vlan in subports.keys().copied().filter(removed).collect::<Vec<_>>() {
            subports.remove(&vlan);
            changes.updated.insert(index);
            info!(namespace = kernel.namespace, interface = link.name, %vlan, "trunk subport detached");
            if let Err(error) = kernel.datapath.detach_subport(index, vlan) {
                warn!(interface = link.name, %vlan, %error, "cannot remove the entry of a trunk subport");
            }
        }
        let mut failed = None;
        for (vlan, (owner, policy)) in wanted {
            if subports.get(vlan).is_some_and(|subport| subport.owner == *owner) {
                continue;
            }
            let attached = kernel.datapath.attach_subport(index, *vlan);
            let attached =
                attached.and_then(|id| kernel.datapath.set_policy(index, Some(*vlan), policy).map(|()| id));
            let id = match attached {
                Ok(id) => id,
                Err(error) => {
                    failed = Some(format!("VLAN {vlan}: {error}"));
                    continue;
                }
            };
            info!(interface = link.name, %vlan, attachment = %id, "trunk subport attached");
            let now = Instant::now();
            let (since, unknown_since) = subports.get(vlan).map_or((now, now), |before| {
                (before.since, if before.owner.is_lost_in(owner) { now } else { before.unknown_since })
            });
            subports.insert(*vlan, AttachedSubport { id, since, unknown_since, owner: owner.clone() });
            changes.updated.insert(index);
        }
        match failed {
            Some(error) => kernel.record(link, Step::AttachSubport, error),
            None => kernel.failures.clear(index, Step::AttachSubport),
        }
    }

    /// Returns the record for the directory and for presence subscribers.
    pub(super) fn record(&self, namespace: Option<&Arc<str>>) -> InterfaceRecord {
        let (interface, index) = (&self.link.name, self.link.index);
        let mut record = InterfaceRecord { present: self.present.clone(), ..InterfaceRecord::default() };
        match (&self.clients, namespace) {
            (Clients::One(owner), _) => {
                let binding = |id, vlan, since, unknown_since, owner: &Owner| {
                    let (interface, owner) = (interface.clone(), owner.clone());
                    (id, Binding { interface, index, vlan, since, unknown_since, owner })
                };
                record.own.push(binding(self.id, None, self.since, self.unknown_since, owner));
                record.own.extend(self.subports.iter().map(|(vlan, port)| {
                    binding(port.id, Some(*vlan), port.since, port.unknown_since, &port.owner)
                }));
            }
            (Clients::Shared(scope), Some(namespace)) => {
                let (namespace, interface) = (Arc::clone(namespace), interface.clone());
                let binding = SharedBinding { namespace, interface, index, since: self.since, scope: *scope };
                record.shared.push((self.id, binding));
            }
            (Clients::Agent, _) => record.agent = Some(self.id),
            (Clients::Shared(_), None) => unreachable!("interfaces are shared in namespaces only"),
        }
        record
    }
}

fn log_owner(link: &Link, before: &Clients, now: &Clients) {
    let interface = &link.name;
    let (Clients::One(before), Clients::One(now)) = (before, now) else { return };
    match (now, before) {
        (Owner::Known(port), _) => {
            info!(interface, instance = %port.instance, project = %port.project, "guest identified");
        }
        (Owner::OnNetwork(record), _) => {
            let network = record.addressing.network.map(tracing::field::display);
            info!(interface, network, "guest's network identified");
        }
        (Owner::Disputed, Owner::Disputed) | (Owner::Unknown, Owner::Unknown) => {}
        (Owner::Disputed, _) => {
            warn!(interface, "sources disagree about this guest; it is not served");
        }
        (Owner::Unknown, _) => info!(interface, "guest identity withdrawn"),
    }
}
