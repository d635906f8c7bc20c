//! The guests' interfaces: attached as they come, let go as they leave, and told to kernel and proxy with what the
//! inventory knows of them.
//!
//! In: links of the host, snapshots of the inventory. Out: attachments and their policy in the datapath, the
//! [`Directory`]. An interface that cannot be attached is tried again and holds up no other.
//!
//! What happens to one interface is looked at for that one, and a snapshot for the devices of which it says something new:
//! no event costs more because the host has more guests.

mod attached;
mod lost;
mod names;
pub mod qdisc;
mod told;

use std::collections::{BTreeMap, BTreeSet};
use std::mem;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use futures_util::{Stream, StreamExt};
use metadata_ebpf::identity::AttachmentId;
use tokio::sync::watch;
use tokio::task::yield_now;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use crate::datapath::{Datapath, DatapathError, Hook, PortPolicy};
use crate::directory::{Directory, Owner};
use crate::ids::IfIndex;
use crate::inventory::presence::{Presence, Present};
use crate::inventory::{AddressPrefix, Entry, Inventory};
use crate::net::name_pattern::NamePattern;
use crate::net::netlink::{HookEvent, Link, LinkEvent, Netlink, NetlinkError};
use crate::proxy::UpstreamAuth;
use attached::{Attached, Kernel};
use lost::Losses;
use names::Names;
use qdisc::ClassifierError;
use told::{Account, Told};

/// How often interfaces that could not be attached are tried again.
const RETRY: Duration = Duration::from_secs(1);
/// How long news of one interface may wait for those of the next, while there are many at once.
const PUBLISH_EVERY: Duration = Duration::from_millis(100);
/// How often idle clients are looked for.
const SWEEP: Duration = Duration::from_secs(30);
/// A client that was not heard of for so long is forgotten. Far longer than any connection may be idle.
const CLIENT_IDLE: Duration = Duration::from_mins(10);

/// A kind of network interface, as `ip -details link` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkKind {
    /// A tap of a virtual machine.
    Tun,
    /// One end of a pair, as containers have.
    Veth,
}

impl LinkKind {
    fn as_str(self) -> &'static str {
        match self {
            Self::Tun => "tun",
            Self::Veth => "veth",
        }
    }
}

/// How strictly the source addresses of a guest's packets are compared with its port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceCheck {
    /// MAC address and IPv4 addresses.
    Strict,
    /// MAC address only.
    Mac,
    Off,
}

/// Which interfaces are guests', and what is asked of their packets.
#[derive(Clone, Debug)]
pub struct GuestRules {
    /// Patterns of names.
    pub names: Vec<NamePattern>,
    /// Kinds of links. OVN's and the DHCP agent's own `tap*` are veths or internal ports, while a virtual machine's is a tun.
    pub kinds: Vec<LinkKind>,
    /// What must be the port's own.
    pub source_check: SourceCheck,
}

impl GuestRules {
    /// Whether a link faces a guest.
    #[must_use]
    pub fn admit(&self, link: &Link) -> bool {
        let kind = self.kinds.iter().any(|kind| kind.as_str() == link.kind);
        kind && self.names.iter().any(|pattern| pattern.matches(&link.name))
    }

    /// What the kernel shall check of a port. A port whose IPv4 addresses no source knows is not checked for them.
    fn policy(&self, owner: &Owner) -> PortPolicy {
        let (network, mac, fixed_ips, allowed_addresses) = match owner {
            Owner::Known { port, .. } => (port.network, port.mac, &port.fixed_ips, &port.allowed_addresses),
            Owner::OnNetwork { facts, .. } => {
                (facts.network, facts.mac, &facts.fixed_ips, &facts.allowed_addresses)
            }
            Owner::Unknown | Owner::Disputed => return PortPolicy::default(),
        };
        let (check_mac, check_addresses) = match self.source_check {
            SourceCheck::Strict => (true, true),
            SourceCheck::Mac => (true, false),
            SourceCheck::Off => (false, false),
        };
        let ipv4 = |ips: &[IpAddr]| -> Vec<_> {
            ips.iter().filter_map(|ip| if let IpAddr::V4(ip) = ip { Some(*ip) } else { None }).collect()
        };
        let fixed = ipv4(fixed_ips);
        let fixed = fixed.into_iter().map(|ip| (ip, 32));
        let allowed = allowed_addresses.iter().filter_map(AddressPrefix::ipv4);
        let addresses = (check_addresses && fixed.len() > 0).then(|| fixed.chain(allowed).collect());
        PortPolicy { network, mac: mac.filter(|_| check_mac), addresses, ..PortPolicy::default() }
    }
}

/// An interface that could not be attached.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The interface.
    pub interface: String,
    /// Why not, the last time.
    pub error: String,
}

/// The interfaces that could not be attached, for `status`.
pub type Failures = Arc<ArcSwap<Vec<Failure>>>;

/// A step that could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum GuestsError {
    /// In the kernel side.
    #[error(transparent)]
    Datapath(#[from] DatapathError),
    /// With links.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// With a filter.
    #[error(transparent)]
    Classifier(#[from] ClassifierError),
}

/// The task that keeps attachments in step with the host.
pub struct Guests {
    datapath: Datapath,
    netlink: Netlink,
    rules: GuestRules,
    inventory: Arc<Inventory>,
    introduction: UpstreamAuth,
    attached: BTreeMap<IfIndex, Attached>,
    failed: BTreeMap<IfIndex, (Link, String)>,
    /// Attached, but somebody took the program off.
    lost: Losses,
    /// Not attached, because they are not an instance's: the host's own path is theirs.
    aside: BTreeMap<IfIndex, Link>,
    /// Of the interfaces in any of these.
    names: Names,
    /// The version of the snapshot that was followed last.
    followed: u64,
    failures: Failures,
    told: Told,
    /// All links are being looked at.
    many: bool,
}

impl Guests {
    /// Nothing is attached yet.
    #[must_use]
    pub fn new(
        datapath: Datapath,
        netlink: Netlink,
        rules: GuestRules,
        inventory: Arc<Inventory>,
        directory: Arc<Directory>,
        introduction: UpstreamAuth,
        presence: watch::Sender<Presence>,
    ) -> Self {
        Self {
            datapath,
            netlink,
            rules,
            inventory,
            introduction,
            attached: BTreeMap::new(),
            failed: BTreeMap::new(),
            lost: Losses::default(),
            aside: BTreeMap::new(),
            names: Names::default(),
            followed: 0,
            failures: Failures::default(),
            told: Told::new(directory, presence),
            many: false,
        }
    }

    /// Where failures can be read.
    #[must_use]
    pub fn failures(&self) -> Failures {
        Arc::clone(&self.failures)
    }

    /// Brings everything in step with the links that are there now. The watch must already run, or a link between this and
    /// it would be missed.
    ///
    /// # Errors
    /// Links cannot be listed, or what a dead agent left cannot be removed.
    pub async fn resync(&mut self) -> Result<(), GuestsError> {
        let links = self.netlink.links().await?;
        let there: BTreeSet<IfIndex> = links.iter().map(|link| link.index).collect();
        let gone = self.names.all().filter(|index| !there.contains(index));
        let mut changed: BTreeSet<IfIndex> = gone.collect();
        for index in &changed {
            self.let_go(*index).await;
        }
        self.many = true;
        let mut published = Instant::now();
        for link in links {
            let index = link.index;
            if self.present(link).await {
                changed.insert(index);
            }
            // Guests that are attached already are not to wait for the last one.
            if published.elapsed() >= PUBLISH_EVERY {
                self.publish(mem::take(&mut changed));
                published = Instant::now();
            }
            // An attachment takes the kernel some ten milliseconds (`synchronize_rcu` in tcx_entry_sync), and a host has
            // many: signals and the admin socket have their turn between two.
            yield_now().await;
        }
        self.many = false;
        self.datapath.remove_orphans()?;
        for mark in self.datapath.filters()? {
            if !self.attached.contains_key(&mark.index) || self.datapath.hook() == Hook::Tcx {
                self.take_filter_off(mark.index).await;
            }
        }
        self.publish(changed);
        Ok(())
    }

    /// Follows links, their hooks and the inventory until cancelled, or until the watch ends. Gives the datapath back.
    pub async fn run(
        mut self,
        mut events: impl Stream<Item = LinkEvent> + Unpin,
        mut hooks: impl Stream<Item = HookEvent> + Unpin,
        cancel: CancellationToken,
    ) -> Datapath {
        let mut snapshots = self.inventory.subscribe();
        let mut retry = interval(RETRY);
        let mut sweep = interval(SWEEP);
        let mut patrol = interval(lost::PATROL);
        let mut put_back = interval(lost::PUT_BACK);
        patrol.set_missed_tick_behavior(MissedTickBehavior::Delay);
        put_back.set_missed_tick_behavior(MissedTickBehavior::Delay);
        retry.set_missed_tick_behavior(MissedTickBehavior::Delay);
        sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = cancel.cancelled() => return self.datapath,
                event = events.next() => {
                    let Some(event) = event else { return self.datapath };
                    self.on_link(event).await;
                }
                event = hooks.next() => {
                    let Some(event) = event else { return self.datapath };
                    self.on_hook(event).await;
                }
                Ok(()) = snapshots.changed() => self.follow_inventory().await,
                _ = retry.tick(), if !self.failed.is_empty() => self.retry().await,
                _ = patrol.tick() => self.patrol(),
                _ = put_back.tick(), if !self.lost.is_empty() => self.put_back_due().await,
                _ = sweep.tick() => self.sweep(),
            }
        }
    }

    async fn on_link(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::Present(link) => {
                let index = link.index;
                if self.present(link).await {
                    self.publish([index]);
                }
            }
            LinkEvent::Gone(index) => {
                if self.let_go(index).await {
                    self.publish([index]);
                }
            }
            LinkEvent::Overrun => {
                warn!("link events were lost; looking at all links anew");
                if let Err(error) = self.resync().await {
                    error!(%error, "cannot look at all links");
                }
            }
        }
    }

    /// Whether anything changed.
    async fn present(&mut self, link: Link) -> bool {
        if !self.rules.admit(&link) {
            return self.let_go(link.index).await;
        }
        if self.is_no_instance(&link) {
            return self.step_aside(link).await;
        }
        self.aside.remove(&link.index);
        self.names.call(link.index, &link.name);
        match self.attached.get_mut(&link.index) {
            Some(attached) if attached.link.name == link.name && attached.link.mac == link.mac => false,
            Some(attached) => {
                attached.link = link;
                true
            }
            None => self.attach(link).await,
        }
    }

    /// Whether a source says for certain that no instance is behind a link.
    fn is_no_instance(&self, link: &Link) -> bool {
        let snapshot = self.inventory.load();
        matches!(snapshot.find_at(&link.name, link.index, link.mac), Ok(Some(Entry::NoInstance(_))))
    }

    /// Leaves a link to the host's own path. Whether anything changed.
    async fn step_aside(&mut self, link: Link) -> bool {
        if !self.aside.contains_key(&link.index) {
            info!(interface = link.name, "not an instance's port; its packets are left alone");
            self.let_go(link.index).await;
        }
        self.names.call(link.index, &link.name);
        self.aside.insert(link.index, link);
        true
    }

    /// Takes over what the inventory says anew.
    async fn follow_inventory(&mut self) {
        let interfaces: BTreeSet<IfIndex> = {
            let snapshot = self.inventory.load();
            let since = mem::replace(&mut self.followed, snapshot.version());
            match snapshot.changed_since(since) {
                Some(devices) => devices.filter_map(|device| self.names.interface(device.as_str())).collect(),
                None => self.names.all().collect(),
            }
        };
        for index in &interfaces {
            self.sort_out(*index).await;
        }
        self.publish(interfaces);
    }

    /// Attaches what turned out to be an instance's after all, and lets go what turned out not to be one's.
    async fn sort_out(&mut self, index: IfIndex) {
        let (attached, aside) = (self.attached.get(&index), self.aside.get(&index));
        let Some(link) = attached.map(|attached| &attached.link).or(aside) else { return };
        if self.is_no_instance(link) != aside.is_some() {
            self.present(link.clone()).await;
        }
    }

    async fn attach(&mut self, link: Link) -> bool {
        let index = link.index;
        match self.try_attach(&link).await {
            Ok(id) => {
                info!(interface = link.name, ifindex = %index, attachment = %id, "guest interface attached");
                self.failed.remove(&index);
                self.attached.entry(index).or_insert_with(|| Attached::new(id, link));
            }
            Err(error) => {
                let error = error.to_string();
                if self.failed.get(&index).is_none_or(|(_, before)| *before != error) {
                    warn!(interface = link.name, %error, "guest interface cannot be attached; trying again");
                }
                self.attached.remove(&index);
                self.failed.insert(index, (link, error));
            }
        }
        true
    }

    async fn try_attach(&mut self, link: &Link) -> Result<AttachmentId, GuestsError> {
        if let Some(id) = self.datapath.adopt(link.index, &link.name)? {
            return Ok(id);
        }
        let id = self.datapath.reserve_id()?;
        self.tell_ahead(id, link);
        self.attach_as(id, link).await?;
        Ok(id)
    }

    /// Tells of an attachment that is about to be made: the kernel runs the program some milliseconds before it says so
    /// (`tcx_entry_sync` waits for an RCU grace period), and a guest that asks in its first is then answered at once. A filter
    /// is said to be there as soon as it is; and while there are many to attach it is not worth it.
    fn tell_ahead(&mut self, id: AttachmentId, link: &Link) {
        if !self.many && self.datapath.hook() == Hook::Tcx {
            self.attached.insert(link.index, Attached::new(id, link.clone()));
            self.publish([link.index]);
        }
    }

    async fn attach_as(&mut self, id: AttachmentId, link: &Link) -> Result<(), GuestsError> {
        let made_qdisc = self.datapath.hook() == Hook::Clsact && self.provide_qdisc(link.index).await?;
        let policy = self.attached.get(&link.index).map(|attached| attached.policy(&self.rules));
        let policy = policy.unwrap_or_default();
        let attached = self.datapath.attach(id, link.index, &link.name, made_qdisc, &policy);
        if attached.is_err() {
            if made_qdisc {
                qdisc::delete_unused_qdisc(&self.netlink, link.index).await?;
            }
            self.take_filter_off(link.index).await;
        }
        Ok(attached?)
    }

    /// Whether there was anything to let go.
    async fn let_go(&mut self, index: IfIndex) -> bool {
        self.names.forget(index);
        let was_known = self.failed.remove(&index).is_some() | self.aside.remove(&index).is_some();
        let Some(attached) = self.attached.remove(&index) else {
            return was_known;
        };
        self.lost.forget(index);
        info!(interface = attached.link.name, attachment = %attached.id, "guest interface let go");
        if let Err(error) = self.datapath.detach(index) {
            warn!(interface = attached.link.name, %error, "something of the attachment stays behind");
        }
        self.take_filter_off(index).await;
        true
    }

    /// Takes a filter off that nobody needs any more; nothing happens where there is none. What stays is tried again at
    /// the end.
    async fn take_filter_off(&self, index: IfIndex) {
        let Some(mark) = self.datapath.filter(index) else { return };
        let taken: Result<(), GuestsError> = async {
            let links = self.netlink.links().await?;
            qdisc::take_off(&self.netlink, &links, mark).await?;
            Ok(self.datapath.forget_filter(index)?)
        }
        .await;
        if let Err(error) = taken {
            warn!(ifindex = %index, %error, "a filter stays behind");
        }
    }

    /// An interface that went while events were lost is not told of again, so this looks whether it is still there.
    async fn retry(&mut self) {
        let links = match self.netlink.links().await {
            Ok(links) => links,
            Err(error) => return warn!(%error, "links cannot be listed"),
        };
        let failed: Vec<IfIndex> = self.failed.keys().copied().collect();
        for index in failed.iter().copied() {
            match links.iter().find(|link| link.index == index) {
                Some(link) => self.present(link.clone()).await,
                None => self.let_go(index).await,
            };
        }
        self.publish(failed);
    }

    fn sweep(&mut self) {
        match self.datapath.sweep(CLIENT_IDLE) {
            Ok(0) => {}
            Ok(removed) => debug!(removed, "idle clients forgotten"),
            Err(error) => warn!(%error, "idle clients cannot be forgotten"),
        }
    }

    /// Asks the inventory about some interfaces, and tells kernel and proxy what changed: the kernel first, so that a guest
    /// that is known is checked from its first answered request on.
    fn publish(&mut self, interfaces: impl IntoIterator<Item = IfIndex>) {
        let snapshot = self.inventory.load();
        let mut kernel =
            Kernel { datapath: &mut self.datapath, rules: &self.rules, introduction: &self.introduction };
        let mut accounts = BTreeMap::new();
        for index in interfaces {
            let mut account = Account::default();
            let mut link = self.aside.get(&index);
            if let Some(attached) = self.attached.get_mut(&index) {
                let entry = snapshot.find_at(&attached.link.name, index, attached.link.mac);
                attached.own(index, entry, &mut kernel);
                let subports = attached.port_id().and_then(|port| snapshot.subports(&port));
                attached.seat(index, subports.map_or(&[], |subports| &**subports), &mut kernel);
                account.bindings = attached.bindings(index);
                link = Some(&attached.link);
            }
            account.present = link.and_then(|link| {
                Some(Present::from_snapshot(link.name.parse().ok()?, link.index, link.mac, &snapshot))
            });
            accounts.insert(index, account);
        }
        self.told.tell(accounts);
        self.tell_failures();
    }

    fn tell_failures(&self) {
        let failed = self.failed.values().map(|(link, error)| (&link.name, error));
        let lost = self.lost.errors();
        let lost = lost.filter_map(|(index, error)| Some((&self.attached.get(&index)?.link.name, error)));
        let failures = failed
            .chain(lost)
            .map(|(interface, error)| Failure { interface: interface.clone(), error: error.clone() });
        self.failures.store(Arc::new(failures.collect()));
    }
}
