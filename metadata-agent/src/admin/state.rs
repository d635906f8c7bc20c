//! Readiness, metrics and state of the agent, read from the components at each request.

use std::collections::BTreeMap;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use metadata_ebpf::identity::{AttachmentId, GuestAddress};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tokio::sync::watch;
use tracing::warn;

use crate::admin::AdminState;
use crate::admin::readiness::Readiness;
use crate::attach::{Failure, Failures, RefusalEpisodes};
use crate::data_path_probe::{ProbeReports, ProbeState, ProbeStep};
use crate::data_plane::{LastBeat, Restarts};
use crate::datapath::{Clock, Counters, Hook, RefusalRecord};
use crate::directory::{Binding, Directory, Owner, SharedBinding};
use crate::ids::NetworkOrRouter;
use crate::inventory::Inventory;
use crate::namespaces::{IdleNamespace, NamespaceReports};
use crate::net::damage::DamageReports;
use crate::sources::SourceState;

/// The time after which a silent client is not shown any more.
const CLIENT_IDLE: Duration = Duration::from_mins(10);

/// The longest wait for the data plane to have what is shown.
const SETTLED: Duration = Duration::from_secs(1);

/// Components that are present while guests are served.
#[derive(Clone)]
pub(crate) struct Running {
    pub counters: Arc<Counters>,
    pub directory: Arc<Directory>,
    pub failures: Failures,
    pub refusals: RefusalEpisodes,
    pub namespaces: NamespaceReports,
    pub hook: Hook,
    pub restarts: Restarts,
}

/// The last heartbeat, and its age at which the agent does not count as live any more.
#[derive(Clone, Debug)]
pub(crate) struct Liveness {
    pub last_beat: LastBeat,
    pub stale_after: Duration,
}

impl Liveness {
    fn is_live(&self) -> bool {
        self.last_beat.is_within(self.stale_after)
    }
}

/// Everything that the admin socket reads from.
pub(crate) struct AgentState {
    settings: watch::Receiver<Value>,
    readiness: Readiness,
    liveness: Liveness,
    inventory: Arc<Inventory>,
    sources: Vec<watch::Receiver<SourceState>>,
    registry: Registry,
    running: watch::Receiver<Option<Running>>,
    since: Instant,
}

impl AgentState {
    /// Adds the packet counters and the gauges of this module to the registry.
    pub(crate) fn new(
        settings: watch::Receiver<Value>,
        readiness: Readiness,
        liveness: Liveness,
        inventory: Arc<Inventory>,
        sources: Vec<watch::Receiver<SourceState>>,
        mut registry: Registry,
        running: watch::Receiver<Option<Running>>,
    ) -> Self {
        let gauges = Gauges {
            running: running.clone(),
            inventory: Arc::clone(&inventory),
            sources: sources.clone(),
            damage: readiness.damage().clone(),
            probes: readiness.probes().clone(),
        };
        registry.register_collector(Box::new(gauges));
        Self { settings, readiness, liveness, inventory, sources, registry, running, since: Instant::now() }
    }
}

impl AdminState for AgentState {
    /// An agent that starts counts as live. After that, its heartbeat must be recent.
    fn live(&self) -> bool {
        self.running.borrow().is_none() || self.liveness.is_live()
    }

    /// A guest that asks after that is answered accordingly.
    fn settled(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        let running = self.running.borrow().clone();
        Box::pin(async move {
            if let Some(running) = running {
                running.directory.clients().copied_within(SETTLED).await;
            }
        })
    }

    fn waiting_for(&self) -> Vec<String> {
        self.readiness.waiting_for()
    }

    fn metrics(&self) -> String {
        let mut out = String::new();
        if let Err(error) = text::encode(&mut out, &self.registry) {
            warn!(%error, "cannot encode metrics");
        }
        out
    }

    fn state(&self) -> Value {
        let running = self.running.borrow().clone();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "pid": std::process::id(),
            "uptime_seconds": self.since.elapsed().as_secs(),
            "waiting_for": self.waiting_for(),
            "live": self.live(),
            "heartbeat_seconds_ago": self.liveness.last_beat.age().map(|age| age.as_secs_f64()),
            "config": *self.settings.borrow(),
            "sources": self.sources.iter().map(|source| json!(*source.borrow())).collect::<Vec<_>>(),
            "damage": damage_state(self.readiness.damage()),
            "data_path": self.readiness.probes().state().as_ref().map(probe_state),
            "inventory": self.inventory.load().counts(),
            "datapath": running.as_ref().map(datapath_state),
            "attachments": running.as_ref().map(attachments_state),
            "failed": running.as_ref().map(failures_state),
            "namespaces": running.as_ref().map(namespaces_state),
        })
    }
}

fn damage_state(reports: &DamageReports) -> Value {
    let found: BTreeMap<_, _> =
        reports.counts().into_iter().map(|(kind, count)| (kind.label(), count)).collect();
    json!({ "found": found, "unrepaired": reports.unrepaired() })
}

fn probe_state(state: &ProbeState) -> Value {
    json!({
        "last_success_seconds_ago": state.last_success.map(|success| success.at.elapsed().as_secs_f64()),
        "took_seconds": state.last_success.map(|success| success.took.as_secs_f64()),
        "failures": state.failures,
        "failing_step": state.failing().map(|error| error.step.label()),
        "error": state.error.as_ref().map(ToString::to_string),
    })
}

fn datapath_state(running: &Running) -> Value {
    let packets = running.counters.packets().unwrap_or_default();
    let packets: BTreeMap<_, _> =
        packets.into_iter().map(|(reason, count)| (reason.label(), count)).collect();
    json!({ "hook": hook_label(running.hook), "packets": packets })
}

fn hook_label(hook: Hook) -> &'static str {
    match hook {
        Hook::Tcx => "tcx",
        Hook::Clsact => "clsact",
    }
}

fn attachments_state(running: &Running) -> Value {
    let now = Clock::now_ns();
    let mut clients: BTreeMap<u32, Vec<Value>> = BTreeMap::new();
    for record in running.counters.clients().unwrap_or_default() {
        let age = |ns: u64| Duration::from_nanos(now.saturating_sub(ns)).as_secs_f64();
        if age(record.client.last_seen_ns) > CLIENT_IDLE.as_secs_f64() {
            continue;
        }
        clients.entry(record.address.attachment.get()).or_default().push(json!({
            "address": guest_address(record.address.guest),
            "mac": crate::ids::MacAddress(record.client.guest_mac),
            "metadata_mac": crate::ids::MacAddress(record.client.metadata_mac),
            "connections": record.client.connections,
            "first_seen_seconds_ago": age(record.client.first_seen_ns),
            "last_seen_seconds_ago": age(record.client.last_seen_ns),
        }));
    }
    let mut states = Vec::new();
    for (id, binding) in running.directory.bindings() {
        let refused = refused_state(running, id, now);
        states.push(attachment_state(id.get(), &binding, clients.remove(&id.get()), refused.as_ref()));
    }
    for (id, binding) in running.directory.shared() {
        let refused = refused_state(running, id, now);
        states.push(shared_state(id.get(), &binding, clients.remove(&id.get()), refused.as_ref()));
    }
    Value::Array(states)
}

/// Returns the refused packets of an attachment; null if there are none.
fn refused_state(running: &Running, id: AttachmentId, now_ns: u64) -> Option<Value> {
    let RefusalRecord { packets, last } = running.counters.refusals(id).ok()??;
    let packets: BTreeMap<_, _> =
        packets.into_iter().map(|(reason, count)| (reason.label(), count)).collect();
    Some(json!({
        "packets": packets,
        "last": {
            "reason": last.reason.label(),
            "mac": last.mac,
            "address": last.address,
            "seconds_ago": Duration::from_nanos(now_ns.saturating_sub(last.at_ns)).as_secs_f64(),
        },
    }))
}

fn shared_state(
    id: u32,
    binding: &SharedBinding,
    clients: Option<Vec<Value>>,
    refused: Option<&Value>,
) -> Value {
    let (network, router) = match binding.scope {
        NetworkOrRouter::Network(network) => (Some(network), None),
        NetworkOrRouter::Router(router) => (None, Some(router)),
    };
    json!({
        "attachment": id,
        "namespace": *binding.namespace,
        "interface": binding.interface,
        "ifindex": binding.index,
        "attached_seconds_ago": binding.since.elapsed().as_secs(),
        "identity": "shared",
        "network": network,
        "router": router,
        "clients": clients.unwrap_or_default(),
        "refused": refused,
    })
}

fn attachment_state(
    id: u32,
    binding: &Binding,
    clients: Option<Vec<Value>>,
    refused: Option<&Value>,
) -> Value {
    json!({
        "attachment": id,
        "interface": binding.interface,
        "ifindex": binding.index,
        "vlan": binding.vlan,
        "attached_seconds_ago": binding.since.elapsed().as_secs(),
        "identity": match binding.owner {
            Owner::Known(_) => "known",
            Owner::OnNetwork(_) => "on_network",
            Owner::Unknown => "unknown",
            Owner::Disputed => "disputed",
        },
        "port": match &binding.owner {
            Owner::Known(port) => json!(**port),
            Owner::OnNetwork(record) => json!(**record),
            Owner::Unknown | Owner::Disputed => Value::Null,
        },
        "clients": clients.unwrap_or_default(),
        "refused": refused,
    })
}

fn failures_state(running: &Running) -> Value {
    let failed = running.failures.load();
    failed.iter().map(|failure| json!({ "interface": failure.interface, "error": failure.error })).collect()
}

fn namespaces_state(running: &Running) -> Value {
    let report = running.namespaces.load();
    let failure = |failure: &Failure| json!({ "namespace": failure.interface, "error": failure.error });
    let idle = |idle: &IdleNamespace| json!({ "namespace": *idle.name, "reason": idle.reason });
    json!({
        "served": report.served,
        "idle": report.idle.iter().map(idle).collect::<Vec<_>>(),
        "passed_over": report.passed_over,
        "failed": report.failures.iter().map(failure).collect::<Vec<_>>(),
    })
}

fn guest_address(guest: GuestAddress) -> String {
    match guest {
        GuestAddress::Ipv4(octets) => std::net::Ipv4Addr::from(octets).to_string(),
        GuestAddress::Ipv6LinkLocal(interface) => {
            let mut octets = [0; 16];
            octets[..2].copy_from_slice(&[0xfe, 0x80]);
            octets[8..].copy_from_slice(&interface);
            std::net::Ipv6Addr::from(octets).to_string()
        }
    }
}

/// Collects packet counters and gauges at each scrape.
struct Gauges {
    running: watch::Receiver<Option<Running>>,
    inventory: Arc<Inventory>,
    sources: Vec<watch::Receiver<SourceState>>,
    damage: DamageReports,
    probes: ProbeReports,
}

impl fmt::Debug for Gauges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Gauges")
    }
}

impl Collector for Gauges {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let counts = self.inventory.load().counts();
        gauge(&mut encoder, "ports", "Ports that sources know", counts.ports)?;
        gauge(
            &mut encoder,
            "ports_incomplete",
            "Ports without an instance or project in any source so far",
            counts.incomplete,
        )?;
        gauge(
            &mut encoder,
            "ports_no_instance",
            "Ports that belong to no instance according to Neutron",
            counts.no_instance,
        )?;
        gauge(
            &mut encoder,
            "ports_disputed",
            "Ports about which sources contradict each other",
            counts.disputed,
        )?;
        let by_source = |of: fn(&SourceState) -> usize| -> Vec<(&str, usize)> {
            let states = self.sources.iter().map(watch::Receiver::borrow);
            states.map(|state| (state.source.label(), of(&state))).collect()
        };
        let ready = by_source(|state| usize::from(state.ready));
        let faults = by_source(|state| state.faults.len());
        let ready_help = "1 if the source has sent everything that it knows";
        gauges(&mut encoder, "source_ready", ready_help, "source", &ready)?;
        gauges(&mut encoder, "source_faults", "Current errors of the source", "source", &faults)?;
        damage(&mut encoder, &self.damage)?;
        probes(&mut encoder, &self.probes)?;
        let Some(running) = self.running.borrow().clone() else {
            return Ok(());
        };
        gauge(&mut encoder, "attachments", "Guest interfaces attached", running.directory.len())?;
        let restarts = ConstCounter::new(running.restarts.count());
        let help = "Data-plane processes that were started because another one ended or hung";
        let metric =
            encoder.encode_descriptor("metadata_data_plane_restarts", help, None, restarts.metric_type())?;
        restarts.encode(metric)?;
        let report = running.namespaces.load();
        gauge(&mut encoder, "namespaces", "Served namespaces of routers and DHCP servers", report.served)?;
        let help = "Namespaces without an interface that guests are behind";
        gauge(&mut encoder, "namespaces_idle", help, report.idle.len())?;
        let failed = report.failures.len();
        gauge(&mut encoder, "namespaces_failed", "Namespaces with errors", failed)?;
        let failed = running.failures.load().len();
        gauge(&mut encoder, "attachments_failed", "Guest interfaces that could not be attached", failed)?;
        let refused: Vec<_> =
            running.refusals.count().into_iter().map(|(reason, count)| (reason.label(), count)).collect();
        let refused_help = "Guest interfaces with refused packets in the last ten minutes";
        gauges(&mut encoder, "attachments_refused", refused_help, "reason", &refused)?;
        packets(&mut encoder, &running.counters)
    }
}

fn gauge(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    value: usize,
) -> Result<(), fmt::Error> {
    let gauge = ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
    let name = format!("metadata_{name}");
    let metric = encoder.encode_descriptor(&name, help, None, gauge.metric_type())?;
    gauge.encode(metric)
}

/// Encodes one gauge with a value for each value of a label.
fn gauges(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    label: &str,
    values: &[(&str, usize)],
) -> Result<(), fmt::Error> {
    let name = format!("metadata_{name}");
    let mut family = encoder.encode_descriptor(&name, help, None, ConstGauge::new(0_i64).metric_type())?;
    for (of, value) in values {
        let labels = [(label, *of)];
        let metric = family.encode_family(&labels)?;
        ConstGauge::new(i64::try_from(*value).unwrap_or(i64::MAX)).encode(metric)?;
    }
    Ok(())
}

fn damage(encoder: &mut DescriptorEncoder<'_>, reports: &DamageReports) -> Result<(), fmt::Error> {
    let help = "Changes by other software that can keep guests from being served, and were found";
    let kind = ConstCounter::new(0_u64).metric_type();
    let mut family = encoder.encode_descriptor("metadata_damage", help, None, kind)?;
    for (kind, count) in reports.counts() {
        let labels = [("kind", kind.label())];
        ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
    }
    gauge(encoder, "damage_unrepaired", "Such changes that are not repaired", reports.unrepaired().len())
}

fn probes(encoder: &mut DescriptorEncoder<'_>, reports: &ProbeReports) -> Result<(), fmt::Error> {
    let Some(state) = reports.state() else { return Ok(()) };
    let failing = state.failing().map(|error| error.step);
    let steps = ProbeStep::ALL.map(|step| (step.label(), usize::from(failing == Some(step))));
    let help = "1 for the step at which the agent's own requests through the datapath fail";
    gauges(encoder, "data_path_failing", help, "step", &steps)?;
    let Some(success) = state.last_success else { return Ok(()) };
    let time = success.time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let help = "Time of the last such request that was answered, in seconds since 1970";
    gauge(encoder, "data_path_success_timestamp_seconds", help, usize::try_from(time.as_secs()).unwrap_or(0))
}

fn packets(encoder: &mut DescriptorEncoder<'_>, counters: &Counters) -> Result<(), fmt::Error> {
    let packets = counters.packets().map_err(|error| {
        warn!(%error, "cannot read packet counters");
        fmt::Error
    })?;
    let help = "Metadata packets by the verdict's reason";
    let kind = ConstCounter::new(0_u64).metric_type();
    let mut family = encoder.encode_descriptor("metadata_packets", help, None, kind)?;
    for (reason, count) in packets {
        let labels = [("reason", reason.label())];
        let metric = family.encode_family(&labels)?;
        ConstCounter::new(count).encode(metric)?;
    }
    Ok(())
}
